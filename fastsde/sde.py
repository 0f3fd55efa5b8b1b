"""The variance-preserving SDE, the one forward process of this package.

    dx = -1/2 beta(t) x dt + sqrt(beta(t)) dw,    beta(t) = beta_min + (beta_max - beta_min) t,    t in [0, 1]

Its marginal is Gaussian (Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential
Equations", eq. 29 and 33):

    B(t) = beta_min t + 1/2 (beta_max - beta_min) t^2
    alpha(t) = exp(-B(t) / 2),    sigma(t)^2 = -expm1(-B(t))
    p(x_t | x_0) = N(alpha x_0, sigma^2 I)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import noise
from .validation import check_number, check_shape

__all__ = ["VPSDE", "match_dims"]


def match_dims(t: Tensor, x: Tensor) -> Tensor:
    """``t`` of shape ``[B]`` (or a scalar) reshaped so that it broadcasts over ``x`` of shape ``[B, *shape]``."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def _tensor(t: Tensor | float) -> Tensor:
    return t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class VPSDE:
    """The variance-preserving SDE with a linear ``beta``.

    Every function of time takes a float or a tensor of any shape; a float is computed in float64, a tensor in its own
    dtype.

    Args:
        beta_min: beta at t = 0, at least 0.
        beta_max: beta at t = 1, positive and at least ``beta_min``.

    Raises:
        ValueError: if the two are not finite or not in that order.
    """

    t_max: ClassVar[float] = 1.0  # the time of the prior
    prior_std: ClassVar[float] = 1.0
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
        """The noise rate beta(t)."""
        return self.beta_min + (self.beta_max - self.beta_min) * _tensor(t)

    def integral_beta(self, t: Tensor | float) -> Tensor:
        """B(t), the integral of beta from 0 to t."""
        t = _tensor(t)
        return (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t) * t

    def alpha(self, t: Tensor | float) -> Tensor:
        """The factor of x_0 in x_t."""
        return torch.exp(-0.5 * self.integral_beta(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        """The standard deviation of x_t given x_0."""
        # expm1, never a difference from 1: in fp32 at t = 1e-5, 1 - alpha^2 is 4.7 % off.
        return torch.sqrt(-torch.expm1(-self.integral_beta(t)))

    def drift(self, x: Tensor, t: Tensor | float) -> Tensor:
        """-1/2 beta(t) x, for x ``[B, *shape]`` and t a scalar or ``[B]``."""
        return -0.5 * match_dims(self.beta(t), x).to(x) * x

    def diffusion(self, t: Tensor | float) -> Tensor:
        """sqrt(beta(t))."""
        return torch.sqrt(self.beta(t))

    def marginal_prob(self, x_0: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mean (shaped like ``x_0``) and standard deviation (broadcasts over it) of p(x_t | x_0)."""
        x_0 = x_0 if x_0.is_floating_point() else x_0.float()
        t = _tensor(t)
        if t.ndim and t.shape != x_0.shape[: t.ndim]:
            raise ValueError(f"t must be a scalar or [B] beside x_0 {list(x_0.shape)}, got {list(t.shape)}")
        alpha, sigma = (match_dims(value, x_0).to(x_0) for value in (self.alpha(t), self.sigma(t)))
        return alpha * x_0, sigma

    def prior_sampling(
        self, shape: Sequence[int], *, seed: int = 0, keys: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draws from the prior N(0, I) at t = 1, by the noise contract: the very x that ``sample`` starts from.

        Args:
            shape: ``(B, *shape)``.
            seed: the seed of the draw; ignored where ``keys`` are given.
            keys: ``[B, 2]`` int64, one key a sample (`fastsde.noise`).
        """
        shape = check_shape("shape", shape)
        if not shape:
            raise ValueError("shape must have the batch first, got ()")
        if keys is None:
            keys = noise.sample_keys(seed, shape[0], device=device)
        elif len(keys) != shape[0]:
            raise ValueError(f"keys must have one key for each of the {shape[0]} samples, got {len(keys)}")
        return noise.normal(keys, 0, shape[1:])

    def prior_logp(self, x: Tensor) -> Tensor:
        """log density ``[B]`` of ``x`` ``[B, *shape]`` under the prior N(0, I)."""
        x = x.reshape(len(x), math.prod(x.shape[1:]))
        return -0.5 * x.shape[1] * math.log(2 * math.pi) - 0.5 * x.square().sum(1)
