"""Networks compiled for inference: by ``torch.compile``, or on the CPU by OpenVINO."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import MissingExtraError, missing
from ..reference import Model
from . import openvino
from .fingerprint import fingerprint
from .inspection import tensors_of

__all__ = ["Compiled", "compiled", "unavailable_error"]


class Compiled:
    """A module compiled on the CPU, with its weights as constants of the code."""

    def __init__(self, run: nn.Module, compiler: str) -> None:
        self._run = weakref.ref(run)  # this is kept with the model, and must not keep it alive
        self._weights = [each.detach().clone() for each in tensors_of(run)]
        self._state = fingerprint(run, reads_classes=True) if compiler == "openvino" else None
        self._call = openvino.Exported(self._run) if compiler == "openvino" else _frozen(self._run)

    def is_of(self, run: Model) -> bool:
        """Returns whether the compiled code still computes what a network does."""
        if not isinstance(run, nn.Module) or run is not self._run():
            return False
        now = tensors_of(run)
        if len(now) != len(self._weights) or not all(map(torch.equal, now, self._weights)):
            return False
        # torch.compile itself guards what else it has read.
        return self._state is None or self._state.is_unchanged_in(fingerprint(run, reads_classes=True))

    def __call__(self, *args: Tensor, **kwargs: Any) -> Tensor:
        return self._call(*args, **kwargs)


def _frozen(alive: weakref.ref[nn.Module]) -> Model:
    """Compiles a module by ``torch.compile``, which caches the code on disk, from where other processes load it."""

    def network(*args: Tensor, **kwargs: Any) -> Tensor:
        f: Tensor = alive()(*args, **kwargs)  # type: ignore[misc]
        return f

    network.__code__ = network.__code__.replace()  # its own code object, since PyTorch finds compiled code by it
    code: Model = torch.compile(network)

    def call(*args: Tensor, **kwargs: Any) -> Tensor:
        with torch._inductor.config.patch(freezing=True):
            return code(*args, **kwargs)

    return call


def _why_not_frozen(run: Model, reads_classes: bool = False) -> str | None:
    """Returns why the weights of a network cannot be constants, or None: all its tensors must be parameters and
    buffers that a call does not change.
    """
    if not isinstance(run, nn.Module):
        return "it is not an nn.Module"
    running = (module for module in run.modules() if getattr(module, "running_mean", None) is not None)
    if any(getattr(module, "training", False) for module in running):  # a frozen script has no training mode
        return "a batch norm in training mode changes in each call (call model.eval() first)"
    found = fingerprint(run, reads_classes)
    if not found.is_whole:
        return "it holds parts whose changes cannot be seen"
    return None if len(found.places) == len(tensors_of(run)) else "it holds tensors besides parameters and buffers"


def unavailable_error(
    compiler: str, run: Model, dtype: torch.dtype, device: torch.device
) -> ValueError | MissingExtraError | None:
    """Returns an error that says why a compiler cannot compile a network and what to do instead, or None if it can."""
    if compiler != "openvino":
        return None
    if device.type != "cpu":
        return ValueError(f"compile='openvino' needs the CPU, got device {device}; use compile=True")
    if not openvino.is_installed():
        return MissingExtraError(f"{missing('openvino', **openvino.NEEDED)}, or use compile=True")
    if dtype != torch.float32:
        # In bf16 it would round t as well, and be twice as far from the exact result as PyTorch is.
        instead = "leave compile out" if dtype == torch.float64 else "use compile=True"
        return ValueError(f"compile='openvino' needs a network in float32, got {dtype}; {instead}")
    reason = _why_not_frozen(run, reads_classes=True)
    if reason is None:
        return None
    return ValueError(f"compile='openvino' cannot run this model: {reason}; or use compile=True")


def compiled(run: Model, compiler: str, device: torch.device, known: Compiled | None) -> Model | None:
    """Compiles a network for inference, without CUDA graphs of its own: the graph engine captures the rows.

    Args:
        known: what another sampler has compiled, which is returned if it is still valid.

    Returns:
        The compiled network, or None if OpenVINO cannot run it any more.
    """
    if device.type == "cuda":
        # With Triton's convolution templates, PyTorch 2.11 gave wrong 3x3 results; cuDNN's convolutions are as fast.
        options = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
        return torch.compile(run, dynamic=False, options={**options, "max_autotune_conv_backends": "ATEN"})
    if known is not None and known.is_of(run):
        return known
    reason = _why_not_frozen(run, reads_classes=compiler == "openvino")
    if reason is None and isinstance(run, nn.Module):
        return Compiled(run, compiler)
    return None if compiler == "openvino" else torch.compile(run)
