"""The variance-exploding SDE.

    dx = sigma(t) sqrt(2 log(sigma_max / sigma_min)) dw,    t in [0, 1]

This is the convention of score_sde (Song et al. 2021, arXiv:2011.13456, appendix C), in which sigma is exponential in t
and sigma(0) is sigma_min rather than 0: data at t = 0 already have noise of sigma_min, and g^2 = d sigma^2 / dt.

    alpha(t) = 1,    sigma(t) = sigma_min (sigma_max / sigma_min)^t
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..validation import check_number
from .process import Process, as_time

__all__ = ["VESDE"]


@dataclass(frozen=True)
class VESDE(Process):
    """The variance-exploding SDE (Song et al. 2021, arXiv:2011.13456), from the prior N(0, sigma_max^2 I) at t = 1.

        dx = sigma(t) sqrt(2 log(sigma_max / sigma_min)) dw,    t in [0, 1]
        alpha(t) = 1,    sigma(t) = sigma_min (sigma_max / sigma_min)^t

    Args:
        sigma_min: sigma at t = 0, positive: the noise that remains in samples.
        sigma_max: sigma at t = 1, above ``sigma_min``; about the largest distance between two data points.

    Raises:
        TypeError, ValueError: if the two are not finite numbers or not in that order.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    name: str = field(default="ve", init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("sigma_min", self.sigma_min), check_number("sigma_max", self.sigma_max)
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"expected 0 < sigma_min < sigma_max, got sigma_min={self.sigma_min} and sigma_max={self.sigma_max}"
            )

    @property
    def t_min(self) -> float:
        return 1e-5

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_time(t))

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(as_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return self.sigma_min * torch.exp(self._rate * as_time(t))

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        return self._rate * self.sigma(t)

    def exact_step(self, t: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variance = self.sigma(after).square() * torch.expm1(2 * self._rate * (t - after))
        return torch.ones_like(t), variance, variance
