"""Modules run instead of the user's model: a copy in another dtype or layout, its inference form, or compiled code."""

from __future__ import annotations

import copy
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.unet import UNet
from ..reference import Model
from .fingerprint import Fingerprint, fingerprint
from .inspection import prefers_channels_last, tensors_of
from .unet_inference import UNetInference, supports

__all__ = ["Derived", "Frozen", "can_be_frozen", "compiled", "derived", "form_of"]

_LOCK = threading.RLock()  # guards the derived modules


def _has_other_dtype(model: nn.Module, dtype: torch.dtype) -> bool:
    return any(tensor.is_floating_point() and tensor.dtype != dtype for tensor in tensors_of(model))


@dataclass
class Derived:
    """A module run instead of a model and, for a copy, the model's fingerprint when the copy was made."""

    module: nn.Module
    model: Fingerprint | None = None


def form_of(model: Model, dtype: torch.dtype | None, optimize: bool, device: torch.device) -> str:
    """Returns "itself", or the form run instead: "optimized", "copy" or "channels_last", a copy in that layout."""
    if not isinstance(model, nn.Module):
        return "itself"
    if optimize and supports(model):
        return "optimized"
    if dtype is None or not _has_other_dtype(model, dtype):
        return "itself"
    return "channels_last" if prefers_channels_last(model, device) else "copy"


def derived(
    model: nn.Module, form: str, dtype: torch.dtype, device: torch.device, kept: dict[Any, Derived]
) -> nn.Module:
    """Returns the module run instead of the model, with its current weights. It is rebuilt if more has changed.

    Args:
        kept: where the derived modules are kept, by form, dtype and device.
    """
    key = (form, dtype, device)
    with _LOCK, torch.inference_mode(False), torch.no_grad():  # its weights are written to in other modes too
        known = kept.get(key)
        if form == "optimized" and isinstance(model, UNet):  # `supports` has checked all but config and weights
            if known is not None and isinstance(known.module, UNetInference) and known.module.config == model.config:
                known.module.refresh(model)
            else:
                known = kept[key] = Derived(UNetInference(model, dtype))
            return known.module
        found = fingerprint(model)
        if known is None or known.model is None or not found.is_copied_as(known.model):
            known = kept[key] = Derived(_copy(model, form, dtype), found)
        else:
            for tensor, original in zip(tensors_of(known.module), tensors_of(model), strict=True):
                tensor.copy_(original)
        return known.module


def _copy(model: nn.Module, form: str, dtype: torch.dtype) -> nn.Module:
    try:
        made: Any = copy.deepcopy(model)  # the stubs of PyTorch 2.11 lack ``to(memory_format=...)``
    except Exception as error:
        raise ValueError(
            f"dtype is {dtype}, which needs a copy of the model, but copying failed: {error}; convert its weights "
            f"yourself and leave dtype out, or pass a function that calls it under torch.autocast"
        ) from error
    layout = {"memory_format": torch.channels_last} if form == "channels_last" else {}
    result: nn.Module = made.to(dtype=dtype, **layout)
    return result


class Frozen:
    """A network compiled by ``torch.compile`` on the CPU, with its weights as constants of the code.

    PyTorch caches the compiled code on disk, from where other processes load it.
    """

    def __init__(self, run: nn.Module) -> None:
        alive = self._run = weakref.ref(run)  # this is kept with the model, and must not keep it alive
        self._weights = [each.detach().clone() for each in tensors_of(run)]

        def network(*args: Tensor, **kwargs: Any) -> Tensor:
            f: Tensor = alive()(*args, **kwargs)  # type: ignore[misc]
            return f

        network.__code__ = network.__code__.replace()  # its own code object, since PyTorch finds compiled code by it
        self._compiled: Model = torch.compile(network)

    def is_of(self, run: Model) -> bool:
        """Returns whether the compiled code still computes what a network does."""
        if not isinstance(run, nn.Module) or run is not self._run():
            return False
        now = tensors_of(run)
        return len(now) == len(self._weights) and all(map(torch.equal, now, self._weights))

    def __call__(self, *args: Tensor, **kwargs: Any) -> Tensor:
        with torch._inductor.config.patch(freezing=True):
            return self._compiled(*args, **kwargs)


def can_be_frozen(run: nn.Module) -> bool:
    """Returns whether all tensors of a network are parameters and buffers that a call does not change."""
    running = (module for module in run.modules() if getattr(module, "running_mean", None) is not None)
    counts = any(getattr(module, "training", False) for module in running)  # a frozen script has no training mode
    found = fingerprint(run)
    return not counts and found.is_whole and len(found.places) == len(tensors_of(run))


def compiled(run: Model, device: torch.device) -> Model:
    """Compiles a network for inference, without CUDA graphs of its own: the graph engine captures the rows."""
    if device.type != "cuda":
        return torch.compile(run)
    # With Triton's convolution templates, PyTorch 2.11 gave wrong 3x3 results; cuDNN's convolutions are as fast.
    options = {**torch._inductor.list_mode_options("max-autotune-no-cudagraphs"), "max_autotune_conv_backends": "ATEN"}
    return torch.compile(run, dynamic=False, options=options)
