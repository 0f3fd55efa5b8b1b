"""Modules run instead of the user's model: a copy in another dtype or layout, or its inference form."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.hooks import has_gradient_hooks
from ..models.unet import UNet
from ..reference import Model
from .fingerprint import Fingerprint, fingerprint
from .inspection import prefers_channels_last, tensors_of
from .unet_gradients import FixedUNet, has_native_gradients
from .unet_inference import UNetInference, supports

__all__ = ["Derived", "derived", "form_of"]

_LOCK = threading.RLock()  # guards the derived modules
_UNETS = "optimized", "fixed"  # forms of a U-Net


def _has_other_dtype(model: nn.Module, dtype: torch.dtype) -> bool:
    return any(tensor.is_floating_point() and tensor.dtype != dtype for tensor in tensors_of(model))


@dataclass
class Derived:
    """A module run instead of a model and, for a copy, the model's fingerprint when the copy was made."""

    module: nn.Module
    model: Fingerprint | None = None


def form_of(
    model: Model, dtype: torch.dtype | None, optimize: bool, device: torch.device, gradients: bool = False
) -> str:
    """Returns "itself", or the form run instead: "copy", or "channels_last", a copy in that layout.

    Args:
        optimize: a U-Net may also be "optimized" for inference or, with ``gradients``, "fixed", with those of x alone.
    """
    if not isinstance(model, nn.Module):
        return "itself"
    if optimize and not gradients and supports(model):
        return "optimized"
    if optimize and gradients and _has_fixed_form(model, dtype):
        return "fixed"
    if dtype is None or not _has_other_dtype(model, dtype):
        return "itself"
    return "channels_last" if prefers_channels_last(model, device) else "copy"


def _has_fixed_form(model: nn.Module, dtype: torch.dtype | None) -> bool:
    return dtype in (None, torch.float32) and has_native_gradients(model) and not has_gradient_hooks(model)


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
        if form in _UNETS and isinstance(model, UNet):  # `form_of` has checked all but config and weights
            unet = None if known is None else known.module
            if isinstance(unet, (UNetInference, FixedUNet)) and unet.config == model.config:
                unet.refresh(model)
            else:
                unet = FixedUNet(model) if form == "fixed" else UNetInference(model, dtype)
                kept[key] = Derived(unet)
            return unet
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
