"""A measurement y of data by a differentiable operator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from ..validation import check_tensor
from .correction import Change, Correction, Point

__all__ = ["Measurement", "Operator"]

Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Measurement(Correction):
    """A correction towards y = operator(x_0) + noise.

    Args:
        operator: maps data ``[B, *shape]`` to measurements ``[B, ...]``, each from its own sample alone, by
            differentiable PyTorch operations, in the dtype of the state.
        y: the measured value, floating-point: one for each sample ``[B, ...]``, or one for all of them.
    """

    operator: Operator
    y: Tensor

    def __post_init__(self) -> None:
        if not callable(self.operator):
            raise TypeError(f"operator must be callable, got {type(self.operator).__name__}")
        check_tensor("y", self.y, floating=True)

    @property
    def name(self) -> str:
        return "measurement"

    @abstractmethod
    def __call__(self, point: Point) -> Change: ...

    def prepared(self, n: int, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Self:
        check_tensor("y", self.y, device=device, finite=True)
        with torch.inference_mode(False), torch.enable_grad():
            one = torch.zeros((1, *shape), dtype=dtype, device=device, requires_grad=True)
            measured = check_tensor("the result of operator", self.operator(one), device=device, floating=True)
        if not measured.requires_grad:
            raise ValueError("operator must be differentiable, but its result has no gradient with respect to the data")
        if measured.ndim == 0 or len(measured) != 1:
            raise ValueError(
                f"operator must return the batch first, got shape {list(measured.shape)} for data {list(one.shape)}"
            )
        each = measured.shape[1:]
        if self.y.shape not in (each, (1, *each), (n, *each)):
            raise ValueError(
                f"y must have shape {list(each)} or {[n, *each]}, as the operator returns, got {list(self.y.shape)}"
            )
        return replace(self, y=self.y.to(dtype).expand(n, *each))

    def part(self, part: slice) -> Self:
        return replace(self, y=self.y[part])

    def residual(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the operator's result for ``data`` and y minus it, both ``[B, ...]`` in the dtype of y."""
        measured = self.operator(data)
        check_tensor("the result of operator", measured, shape=self.y.shape, device=self.y.device)
        return measured, self.y - measured
