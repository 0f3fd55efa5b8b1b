"""The user's network as an engine calls it: in its own dtype inside, in the state's dtype outside."""

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
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return None


def dtype_of(model: Model) -> torch.dtype:
    """The dtype of a network's first floating-point parameter or buffer; fp32 where it has none."""
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32


class Network:
    """``model(x, t, **kwargs)`` run in ``dtype``, for a state of ``state_dtype``.

    Where the model's weights have another dtype, a copy of it is run; `refresh` brings its weights up to date.

    Raises:
        TypeError: where the model does not return a tensor.
        ValueError: where it returns a tensor of another shape than x.
    """

    def __init__(self, model: Model, dtype: torch.dtype, state_dtype: torch.dtype, compile: bool = False) -> None:
        self.model, self.dtype, self.state_dtype = model, dtype, state_dtype
        self._copy: nn.Module | None = None
        if isinstance(model, nn.Module) and any(
            tensor.is_floating_point() and tensor.dtype != dtype for tensor in model.parameters()
        ):
            self._copy = copy.deepcopy(model).to(dtype)
        run = model if self._copy is None else self._copy
        self._run: Model = torch.compile(run) if compile else run

    def refresh(self) -> None:
        """Copies the weights of the model again where a copy of it is run, since they may have changed."""
        if self._copy is not None and isinstance(self.model, nn.Module):
            self._copy.load_state_dict(self.model.state_dict())
            for ours, theirs in zip(self._copy.modules(), self.model.modules(), strict=True):
                ours.training = theirs.training

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        f: Any = self._run(x.to(self.dtype), t.to(self.dtype), **{name: self._cast(v) for name, v in kwargs.items()})
        if not isinstance(f, Tensor):
            hint = ", such as lambda x, t: model(x, t).sample" if hasattr(f, "sample") else ""
            raise TypeError(f"model must return a tensor, got {type(f).__name__}: wrap it in a function{hint}")
        if f.shape != x.shape:
            raise ValueError(f"model must return the shape of x, {list(x.shape)}, got {list(f.shape)}")
        result: Tensor = f.to(self.state_dtype)
        return result

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
