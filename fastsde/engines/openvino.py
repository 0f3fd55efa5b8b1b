"""Networks run by OpenVINO on the CPU: exported by ``torch.export``, with their weights as constants.

OpenVINO runs a network, not a loop: it is called as the network would be, row by row. It computes in fp32, and its
threads sleep between calls. What is exported is a copy, since an export leaves symbolic tensors wherever the network
keeps something, and the constants would follow some of the weights, but not all of them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import logging
import random
import sys
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..comparison import is_near, largest
from ..extras import require
from ..notices import first_line
from .fingerprint import fingerprint
from .inspection import tensors_of

__all__ = ["NEEDED", "Exported", "is_installed", "library"]

NEEDED = {"extra": "openvino", "what": "compile='openvino'"}  # arguments of `fastsde.extras.require`
_CALLS, _BYTES = 8, 1 << 29  # kept per network: one for each batch size, and for other conditions; each has the weights
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)
_Call = Callable[[list[Tensor]], Tensor]


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
            found = require("openvino", **NEEDED)
            require("openvino.tools.ovc", **NEEDED)
    finally:
        if absent:
            del sys.modules["openvino_telemetry"]
    return found


@functools.cache
def _core() -> Any:
    return library().Core()


class Exported:
    """A module that OpenVINO runs, exported for each combination of shapes, dtypes and other arguments.

    Args:
        alive: refers to the module, which this does not keep alive.
    """

    def __init__(self, alive: weakref.ref[nn.Module]) -> None:
        self._alive, self._lock = alive, threading.Lock()
        self._calls: OrderedDict[Any, _Checked | str] = OrderedDict()  # or why there is none

    def __call__(self, *args: Tensor, **kwargs: Any) -> Tensor:
        """Calls the module. The first call with each combination also checks the result.

        Raises:
            ValueError: if the module cannot be exported, or OpenVINO's result differs by more than rounding.
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
                try:
                    call = _Checked(_Flat(run, leaves, spec), tensors)
                except Exception as error:  # whatever the exporter, OpenVINO or the network raise
                    call = first_line(error)
                self._calls[key] = call
                size = sum(tensor.nbytes for tensor in tensors_of(run))
                while len(self._calls) > max(2, min(_CALLS, _BYTES // max(1, size))):
                    self._calls.popitem(last=False)
            self._calls.move_to_end(key)
            if isinstance(call, str):
                raise ValueError(call)
            if call.has_new_labels(tensors):  # OpenVINO looks up anything without an error
                run(*args, **kwargs)
                call.accept_labels(tensors)
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
    """Returns what an exported module depends on of an argument."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype
    if not isinstance(leaf, _CONSTANTS):
        raise ValueError(f"it is given a {type(leaf).__name__}")
    return type(leaf), repr(leaf)


class _Checked:
    """A module as OpenVINO runs it, for tensors of the same shapes and dtypes as these, on which it was checked.

    Raises:
        ValueError: if the module cannot be exported, changes anything, or OpenVINO's result differs from PyTorch's by
            more than rounding.
    """

    def __init__(self, module: _Flat, tensors: list[Tensor]) -> None:
        expected = _alone(module, tensors)
        self._call = _exported(module, tensors)
        # The values of integers, such as labels, for which the module itself raises no error; t has one value a row.
        self._ranges = {place: _range(each) for place, each in enumerate(tensors) if _is_checked(place, each)}
        found = self._call(tensors)
        if not isinstance(expected, Tensor) or expected.shape != found.shape or expected.dtype != found.dtype:
            raise ValueError("its output is not one tensor, of the same shape and dtype as PyTorch's")
        if not is_near(found, expected):
            error, scale = float((found - expected).abs().max()), largest(expected)
            raise ValueError(
                f"OpenVINO's output differs from PyTorch's by up to {error:.3g}, of outputs up to {scale:.3g}"
            )

    def has_new_labels(self, tensors: list[Tensor]) -> bool:
        """Returns whether integers are beyond those that the module is known to take."""
        return self._wider(tensors) != self._ranges

    def accept_labels(self, tensors: list[Tensor]) -> None:
        """Records that the module takes these integers."""
        self._ranges = self._wider(tensors)

    def _wider(self, tensors: list[Tensor]) -> dict[int, tuple[int, int]]:
        wider = {}
        for place, (low, high) in self._ranges.items():
            least, most = _range(tensors[place])
            wider[place] = min(least, low), max(most, high)
        return wider

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        return self._call(tensors)


def _is_checked(place: int, tensor: Tensor) -> bool:
    return place > 1 and not tensor.is_floating_point() and tensor.dtype != torch.bool


def _range(tensor: Tensor) -> tuple[int, int]:
    return int(tensor.min()), int(tensor.max())


def _alone(module: _Flat, tensors: list[Tensor]) -> Any:
    """Returns the module's output for copies of the tensors.

    Raises:
        ValueError: if that changes the module, the tensors, or the state of a random generator.
    """
    for _ in range(2):  # the first call may fill caches
        before, held = fingerprint(module.run, reads_classes=True), [each.clone() for each in module.buffers()]
        states, given = _random_states(), [tensor.clone() for tensor in tensors]
        f = module(*given)
        if not all(map(_equal, _random_states(), states)):
            torch.set_rng_state(states[0])
            random.setstate(states[1])
            np.random.set_state(states[2])  # noqa: NPY002
            raise ValueError("it draws random numbers")
        if not all(map(_equal, given, tensors)):
            raise ValueError("it writes to its arguments")
        after, buffers = fingerprint(module.run, reads_classes=True), list(module.buffers())
        if after.is_unchanged_in(before) and all(map(_equal, buffers, held)):
            return f
        if len(buffers) == len(held):
            with torch.no_grad():
                for buffer, value in zip(buffers, held, strict=True):
                    buffer.copy_(value)
    raise ValueError("a call of it changes what it holds")


def _random_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(np.all(a == b))


def _exported(module: _Flat, tensors: list[Tensor]) -> _Call:
    """Returns a function of tensors of the same shapes and dtypes."""
    openvino = library()
    with torch.inference_mode(False), torch.no_grad(), _quiet():
        program = torch.export.export(copy.deepcopy(module), tuple(map(torch.zeros_like, tensors)), strict=False)
        model = openvino.convert_model(program)
    names = list(program.graph_signature.user_inputs)
    used = [names.index(each.any_name) for each in model.inputs]  # arguments that it does not use are dropped
    model.reshape({place: list(tensors[i].shape) for place, i in enumerate(used)})
    options = {
        "INFERENCE_PRECISION_HINT": "f32",  # by default bf16 where the CPU multiplies it
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    request = _core().compile_model(model, "CPU", options).create_infer_request()

    def call(tensors: list[Tensor]) -> Tensor:
        request.infer([tensors[i].numpy() for i in used], share_inputs=True, share_outputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data).clone()  # the next call writes there again

    return call


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what PyTorch's exporter and OpenVINO print, which is about their own code."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
