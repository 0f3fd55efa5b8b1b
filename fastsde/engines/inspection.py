"""Questions about a network that are answered without running it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.mlp import is_sequential
from ..reference import Model
from .fingerprint import modules_of

__all__ = [
    "check_call",
    "check_output",
    "device_of",
    "dtype_of",
    "for_gradients",
    "prefers_channels_last",
    "random_layers",
    "tensors_of",
]

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Returns the parameters and buffers of a module."""
    return list(_tensors(model))


def _tensors(model: object) -> Iterator[Tensor]:
    """Yields the parameters and buffers of a module; none for a function."""
    if isinstance(model, nn.Module):
        yield from model.parameters()
        yield from model.buffers()


def device_of(model: object) -> torch.device | None:
    """Returns the device of a network's first parameter or buffer, or None if it has none."""
    tensor = next(_tensors(model), None)
    return None if tensor is None else tensor.device


def dtype_of(model: Model) -> torch.dtype:
    """Returns the dtype of a network's first floating-point parameter or buffer; fp32 if it has none."""
    return next((tensor.dtype for tensor in _tensors(model) if tensor.is_floating_point()), torch.float32)


def for_gradients(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a network's arguments with copies of those made in inference mode, which autograd refuses."""
    with torch.inference_mode(False):
        return {
            name: value.clone() if isinstance(value, Tensor) and value.is_inference() else value
            for name, value in kwargs.items()
        }


def prefers_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Returns whether a network runs faster in channels_last: one with convolutions, on a GPU."""
    return device.type == "cuda" and any(isinstance(module, _CONVOLUTIONS) for module in model.modules())


def random_layers(model: Model) -> list[str]:
    """Returns the layers in training mode that make samples depend on more than their seed: dropout and batch norm."""
    layers = (layer for module in modules_of(model) for layer in module.modules())
    return list(dict.fromkeys(type(layer).__name__ for layer in layers if _is_random(layer)))


def _is_random(layer: Any) -> bool:
    if not getattr(layer, "training", False):  # a frozen script has no such attribute
        return False
    if isinstance(layer, nn.modules.dropout._DropoutNd):
        return bool(layer.p > 0)
    if isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)):
        return bool(layer.dropout > 0)
    return isinstance(layer, nn.modules.batchnorm._BatchNorm)


def check_call(model: Model, name: str, kwargs: Mapping[str, Any]) -> None:
    """Raises TypeError if a network's signature does not accept ``model(x, t, **kwargs)``.

    Args:
        name: the argument that ``kwargs`` came in, such as "model_kwargs".
    """
    args = (None,) if is_sequential(model) else (None, None)
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):  # it has none that Python can read
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        call = ", ".join(["x", "t", *(f"{key}=..." for key in kwargs)])
        raise TypeError(
            f"model must be callable as model(x, t, **{name}), got {type(model).__name__}{signature} and {name} with "
            f"{', '.join(map(repr, kwargs)) or 'nothing'}: model({call}) fails, {error}"
        ) from error


def check_output(f: Any, shape: Sequence[int], device: torch.device) -> Tensor:
    """Returns a network's output for x of a shape on a device. Raises TypeError or ValueError for a wrong one."""
    if not isinstance(f, Tensor):
        hint = ", such as lambda x, t: model(x, t).sample" if hasattr(f, "sample") else ""
        raise TypeError(f"model must return a tensor, got {type(f).__name__}: wrap it in a function{hint}")
    if not f.is_floating_point():
        raise TypeError(f"model must return a floating-point tensor, got {f.dtype}")
    if f.device != device:
        raise ValueError(f"model must return a tensor on {device}, got {f.device}")
    if f.shape != shape:
        raise ValueError(f"model must return the shape of x, {list(shape)}, got {list(f.shape)}")
    return f
