"""Networks run by OpenVINO on the CPU: exported by ``torch.export``, with their weights as constants.

OpenVINO runs a network, not a loop: it is called as the network would be, row by row. It computes in fp32, and its
threads sleep between calls.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["Exported", "is_installed", "library"]

_CALLS = 8  # kept per network: one for each batch size, and for other conditions
_TOLERANCE = 1e-3  # of the check, relative to the largest output; roundings are a hundredth of this
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


def is_installed() -> bool:
    """Returns whether OpenVINO is installed, without importing it."""
    return importlib.util.find_spec("openvino") is not None


def library() -> Any:
    """Returns the imported library.

    Raises:
        ImportError: if it is not installed.
    """
    # It would send statistics of its use over the network, from a process of its own; without that module it does not.
    absent = "openvino_telemetry" not in sys.modules
    if absent:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        with _quiet():
            found = importlib.import_module("openvino")
            importlib.import_module("openvino.tools.ovc")
    finally:
        if absent:
            del sys.modules["openvino_telemetry"]
    return found


class Exported:
    """A module that OpenVINO runs, compiled for each number of samples when it is first called with it.

    Args:
        alive: refers to the module, which this does not keep alive.
    """

    def __init__(self, alive: weakref.ref[nn.Module]) -> None:
        self._alive, self._lock = alive, threading.Lock()
        self._calls: OrderedDict[Any, Callable[[list[Tensor]], Tensor]] = OrderedDict()

    def __call__(self, *args: Tensor, **kwargs: Any) -> Tensor:
        """Calls the module. Its first call also checks the result.

        Raises:
            ValueError: if the module cannot be exported, or OpenVINO's result is another.
        """
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf.detach().contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
        run = self._alive()
        assert run is not None
        if torch.is_autocast_enabled("cpu") or not all(tensor.numel() for tensor in tensors):
            f: Tensor = run(*args, **kwargs)
            return f
        key = (torch.get_num_threads(), str(spec), *map(_kind, leaves))
        with self._lock:  # a request to OpenVINO runs one call at a time
            call = self._calls.get(key)
            if call is None:
                module = _Flat(run, leaves, spec)
                call = _checked(_compiled(module, tensors), module, tensors)
                self._calls[key] = call
                while len(self._calls) > _CALLS:
                    self._calls.popitem(last=False)
            self._calls.move_to_end(key)
            return call(tensors)


class _Flat(nn.Module):
    """A module as a function of tensors alone."""

    def __init__(self, run: nn.Module, leaves: list[Any], spec: Any) -> None:
        super().__init__()
        self.run, self._spec = run, spec
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.training = run.training  # and not that of its modules

    def forward(self, *tensors: Tensor) -> Tensor:
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        f: Tensor = self.run(*args, **kwargs)
        return f


def _kind(leaf: Any) -> Any:
    """Returns what a compiled call depends on of an argument."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype
    if not isinstance(leaf, _CONSTANTS):
        raise ValueError(f"it is given a {type(leaf).__name__}")
    return type(leaf), leaf


def _compiled(module: _Flat, tensors: list[Tensor]) -> Callable[[list[Tensor]], Tensor]:
    """Returns a function of tensors of the same shapes and dtypes."""
    openvino = library()
    with torch.inference_mode(False), torch.no_grad(), _quiet():
        program = torch.export.export(module, tuple(map(torch.zeros_like, tensors)), strict=False)
        model = openvino.convert_model(program)
        model.reshape({place: list(tensor.shape) for place, tensor in enumerate(tensors)})
    options = {
        "INFERENCE_PRECISION_HINT": "f32",  # by default bf16 where the CPU multiplies it
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def call(tensors: list[Tensor]) -> Tensor:
        request.infer([tensor.numpy() for tensor in tensors], share_inputs=True, share_outputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data).clone()  # the next call writes there again

    return call


def _checked(
    call: Callable[[list[Tensor]], Tensor], module: _Flat, tensors: list[Tensor]
) -> Callable[[list[Tensor]], Tensor]:
    """Returns the function, after a comparison with the module on these tensors.

    Raises:
        ValueError: if they differ by more than rounding.
    """
    before = torch.get_rng_state()
    expected, found = module(*(tensor.clone() for tensor in tensors)), call(tensors)
    if not torch.equal(torch.get_rng_state(), before):
        torch.set_rng_state(before)
        raise ValueError("it draws random numbers")
    if not isinstance(expected, Tensor) or expected.shape != found.shape or expected.dtype != found.dtype:
        raise ValueError("its output is not one tensor of the same shape and dtype")
    finite = expected[torch.isfinite(expected)]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    if not torch.allclose(found, expected, rtol=0, atol=_TOLERANCE * scale, equal_nan=True):
        error = float((found - expected).abs().max())
        raise ValueError(f"OpenVINO's output differs from PyTorch's by up to {error:.3g}, of outputs up to {scale:.3g}")
    return call


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the warnings of PyTorch's exporter and of OpenVINO, which are about their own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
