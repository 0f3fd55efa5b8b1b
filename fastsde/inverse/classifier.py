"""Guidance by the gradient of a log-probability."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..validation import check_number, check_tensor
from .correction import Change, Correction, Point

__all__ = ["ClassifierGuidance"]


@dataclass(frozen=True, eq=False)
class ClassifierGuidance(Correction):
    """Classifier guidance (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4): adds scale grad_x log p(y | x_t) to
    the score. Samples are those of p(x) p(y | x)^scale, as far as this is known at each time.

    Args:
        log_prob: ``(x, t) -> [B]``, log p(y | x_t) up to a constant for the network's input x ``[B, *shape]`` and times
            t ``[B]``, each from its own sample alone, by differentiable PyTorch operations. With ``max_batch`` it is
            called with parts of the batch.
        scale: the weight of the gradient.

    Raises:
        TypeError, ValueError: for an invalid argument; the message names it.
    """

    log_prob: Callable[[Tensor, Tensor], Tensor]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.log_prob):
            raise TypeError(f"log_prob must be callable, got {type(self.log_prob).__name__}")
        check_number("scale", self.scale)

    @property
    def name(self) -> str:
        return "classifier guidance"

    @property
    def uses_data(self) -> bool:
        return False

    def __call__(self, point: Point) -> Change:
        log_prob = self.log_prob(point.x, point.t)
        check_tensor("the result of log_prob", log_prob, shape=(len(point.x),), device=point.x.device, floating=True)
        if not log_prob.requires_grad:
            raise ValueError("log_prob must be differentiable, but its result has no gradient with respect to x")
        (gradient,) = torch.autograd.grad(log_prob.sum(), point.x)
        return Change(score=self.scale * gradient)
