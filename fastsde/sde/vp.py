"""The variance-preserving SDE with a linear beta: the process of the tutorial, and the default.

    dx = -1/2 beta(t) x dt + sqrt(beta(t)) dw,    beta(t) = beta_min + (beta_max - beta_min) t,    t in [0, 1]

Its marginal is Gaussian (Song et al. 2021, arXiv:2011.13456, eq. 29 and 33):

    B(t) = beta_min t + 1/2 (beta_max - beta_min) t^2
    alpha(t) = exp(-B(t) / 2),    sigma(t)^2 = -expm1(-B(t))
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..validation import check_number
from .process import Process, as_time, preserving_step

__all__ = ["VPSDE"]


@dataclass(frozen=True)
class LinearBeta(Process):
    """Base class of processes with drift -1/2 beta(t) x and beta linear in t; see `VPSDE` for the arguments."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        check_number("beta_min", self.beta_min), check_number("beta_max", self.beta_max)
        if not 0 <= self.beta_min <= self.beta_max or self.beta_max == 0:
            raise ValueError(
                f"expected 0 <= beta_min <= beta_max and beta_max > 0, got beta_min={self.beta_min} and "
                f"beta_max={self.beta_max}"
            )

    def beta(self, t: Tensor | float) -> Tensor:
        """Returns the noise rate beta(t)."""
        return self.beta_min + (self.beta_max - self.beta_min) * as_time(t)

    def integral_beta(self, t: Tensor | float) -> Tensor:
        """Returns B(t), the integral of beta from 0 to t."""
        t = as_time(t)
        return (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t) * t

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.exp(-0.5 * self.integral_beta(t))

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        return self.drift_coefficient(t) * self.alpha(t)

    def drift_coefficient(self, t: Tensor | float) -> Tensor:
        return -0.5 * self.beta(t)


@dataclass(frozen=True)
class VPSDE(LinearBeta):
    """The variance-preserving SDE with a linear beta (Song et al. 2021, arXiv:2011.13456), the default process.

        dx = -1/2 beta(t) x dt + sqrt(beta(t)) dw,    beta(t) = beta_min + (beta_max - beta_min) t,    t in [0, 1]
        alpha(t) = exp(-B(t) / 2),    sigma(t)^2 = 1 - exp(-B(t)),    B(t) = integral of beta from 0 to t

    Every function of time takes a float or a tensor of any shape; a float is computed in float64, a tensor in its own
    dtype.

    Args:
        beta_min: beta at t = 0, at least 0.
        beta_max: beta at t = 1, positive and at least ``beta_min``.

    Raises:
        TypeError, ValueError: if the two are not finite numbers or not in that order.
    """

    name: str = field(default="vp", init=False, repr=False)

    def sigma(self, t: Tensor | float) -> Tensor:
        # expm1 instead of a difference from 1: in fp32 at t = 1e-5, 1 - alpha^2 is 4.7 % off.
        return torch.sqrt(-torch.expm1(-self.integral_beta(t)))

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        """Returns beta alpha^2 / (2 sigma): infinite at t = 0, unless beta is 0 there."""
        t = as_time(t)
        rate = 0.5 * self.beta(t) * torch.exp(-self.integral_beta(t)) / self.sigma(t)
        return rate if self.beta_min else torch.where(t == 0, math.sqrt(0.5 * self.beta_max), rate)

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        return self.beta(t)

    def exact_step(self, t: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # scale = e^(I/2), weight = 2 (e^(I/2) - 1) and variance = e^I - 1 with I the integral of beta over the step.
        return preserving_step(torch.expm1((self.integral_beta(t) - self.integral_beta(after)) / 2))
