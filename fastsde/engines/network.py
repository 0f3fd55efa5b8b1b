"""The user's network as an engine calls it: fed in its own dtype."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..reference import Model

__all__ = ["Network", "device_of", "dtype_of"]


def device_of(model: Model) -> torch.device | None:
    """The device of a network's first parameter or buffer, if it has any."""
    if isinstance(model, nn.Module):
        for tensor in _tensors(model):
            return tensor.device
    return None


def dtype_of(model: Model) -> torch.dtype:
    """The dtype of a network's first floating-point parameter or buffer; fp32 where it has none."""
    if isinstance(model, nn.Module):
        for tensor in _tensors(model):
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _has_other_dtype(model: nn.Module, dtype: torch.dtype) -> bool:
    return any(tensor.is_floating_point() and tensor.dtype != dtype for tensor in _tensors(model))


class Network:
    """``model(x, t, **kwargs)`` run in ``dtype``.

    Without a ``dtype`` the model runs as it is, fed with the dtype of its first weight. With one that its weights do
    not have, a copy of it is run; `refresh` brings the copy's weights up to date. x, t and floating-point arguments
    are cast.

    Raises:
        TypeError: where the model does not return a floating-point tensor.
        ValueError: where it returns a tensor of another shape or device than x.
    """

    def __init__(self, model: Model, dtype: torch.dtype | None = None, compile: bool = False) -> None:
        self.model = model
        self.dtype = dtype_of(model) if dtype is None else dtype
        self.cache: dict[str, Any] = {}  # what an engine keeps of this network
        self._copy: nn.Module | None = None
        if isinstance(model, nn.Module) and dtype is not None and _has_other_dtype(model, dtype):
            self._copy = copy.deepcopy(model).to(dtype)
        run = model if self._copy is None else self._copy
        self._run: Model = torch.compile(run) if compile else run

    def refresh(self) -> None:
        """Copies the weights of the model again where a copy of it is run, since they may have changed."""
        if self._copy is not None and isinstance(self.model, nn.Module):
            with torch.no_grad():
                for ours, theirs in zip(_tensors(self._copy), _tensors(self.model), strict=True):
                    ours.copy_(theirs)
            for module, original in zip(self._copy.modules(), self.model.modules(), strict=True):
                module.training = original.training

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        f: Any = self._run(x.to(self.dtype), t.to(self.dtype), **{name: self._cast(v) for name, v in kwargs.items()})
        if not isinstance(f, Tensor):
            hint = ", such as lambda x, t: model(x, t).sample" if hasattr(f, "sample") else ""
            raise TypeError(f"model must return a tensor, got {type(f).__name__}: wrap it in a function{hint}")
        if not f.is_floating_point():
            raise TypeError(f"model must return a floating-point tensor, got {f.dtype}")
        if f.device != x.device:
            raise ValueError(f"model must return a tensor on {x.device}, got {f.device}")
        if f.shape != x.shape:
            raise ValueError(f"model must return the shape of x, {list(x.shape)}, got {list(f.shape)}")
        result: Tensor = f
        return result

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
