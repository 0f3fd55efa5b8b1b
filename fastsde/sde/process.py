"""The base class of processes: a Gaussian p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I), and what follows from it.

    dx = f(t) x dt + g(t) dw,    f = alpha' / alpha,    g^2 = 2 sigma (sigma' - f sigma)

and backwards in time (Anderson 1982; Song et al. 2021, arXiv:2011.13456, eq. 6 and 13)

    dx = [f x - g^2 score] dt + g dw           the reverse SDE
    dx = [f x - 1/2 g^2 score] dt              the probability flow, also alpha' x_0 + sigma' eps

To add a process, put a frozen dataclass of `Process` into a file of this folder.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import noise
from ..quadrature import gauss_legendre
from ..validation import check_shape

__all__ = ["Process", "as_time", "check_process", "match_dims"]

_NODES, _PIECES = 16, 24


def match_dims(t: Tensor, x: Tensor) -> Tensor:
    """Reshapes ``t`` ``[B]`` (or a scalar) so that it broadcasts over ``x`` ``[B, *shape]``."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def as_time(t: Tensor | float) -> Tensor:
    """Returns a floating-point tensor as it is, and a number as a float64 tensor on the CPU."""
    if not isinstance(t, Tensor):
        return torch.tensor(t, dtype=torch.float64, device="cpu")
    return t if t.is_floating_point() else t.to(torch.get_default_dtype())


class Process(ABC):
    """A forward process with Gaussian marginals p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I).

        dx = f(t) x dt + g(t) dw,    f = alpha' / alpha,    g^2 = 2 sigma (sigma' - f sigma)

    Every function of time takes a float or a tensor of any shape; a float is computed in float64, a tensor in its own
    dtype. A subclass defines ``alpha``, ``sigma`` and their derivatives, and overrides whatever it has a better formula
    for. A derivative that does not exist is infinite or NaN.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the process, the same as its file's."""

    @property
    def t_max(self) -> float:
        """The time of the prior."""
        return 1.0

    @property
    def t_min(self) -> float:
        """The smallest time that a network is usually trained at, above 0."""
        return 1e-4

    @property
    def spacing(self) -> str:
        """The default spacing of the times of a trajectory (`fastsde.solvers.times.spaced`)."""
        return "uniform"

    @property
    def prior_std(self) -> float:
        """The standard deviation of the prior N(0, prior_std^2 I), from which samples start."""
        return 1.0

    @abstractmethod
    def alpha(self, t: Tensor | float) -> Tensor:
        """Returns the factor of x_0 in x_t."""

    @abstractmethod
    def sigma(self, t: Tensor | float) -> Tensor:
        """Returns the standard deviation of x_t given x_0."""

    @abstractmethod
    def alpha_dot(self, t: Tensor | float) -> Tensor:
        """Returns the derivative of alpha with respect to t."""

    @abstractmethod
    def sigma_dot(self, t: Tensor | float) -> Tensor:
        """Returns the derivative of sigma with respect to t."""

    def drift_coefficient(self, t: Tensor | float) -> Tensor:
        """Returns f(t), the factor of x in the drift: infinite where alpha is 0."""
        return self.alpha_dot(t) / self.alpha(t)

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        """Returns g(t)^2: infinite where alpha is 0."""
        sigma = self.sigma(t)
        return 2 * sigma * (self.sigma_dot(t) - self.drift_coefficient(t) * sigma)

    def drift(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Returns f(t) x, for x ``[B, *shape]`` and t a scalar or ``[B]``."""
        return match_dims(self.drift_coefficient(t), x).to(x) * x

    def diffusion(self, t: Tensor | float) -> Tensor:
        """Returns g(t), the factor of dw."""
        return torch.sqrt(self.squared_diffusion(t))

    def exact_step(self, t: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Solves the reverse SDE from ``t`` down to ``after`` with the score constant over the step.

            x' = scale x + weight score + sqrt(variance) z,    scale = alpha' / alpha, primes for ``after``,
            weight = integral of (alpha' / alpha) g^2,    variance = integral of (alpha' / alpha)^2 g^2

        by Gauss-Legendre quadrature, which has no cancellation however small the step. The pieces become shorter
        towards ``t``, where g^2 may grow without bound.

        Args:
            t: the times before the steps, float64 ``[K]``.
            after: the times after them, float64 ``[K]``.

        Returns:
            scale, weight and variance, float64 ``[K]``.
        """
        below, weights = _quadrature()
        s = t - (t - after) * below[:, None]
        scale, rate = self.alpha(after) / self.alpha(s), self.squared_diffusion(s)
        weight, variance = ((t - after) * (weights[:, None] * scale**power * rate).sum(0) for power in (1, 2))
        return self.alpha(after) / self.alpha(t), weight, variance

    def marginal_prob(self, x_0: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Returns the mean (shaped like ``x_0``) and the standard deviation (broadcasts over it) of p(x_t | x_0)."""
        x_0 = x_0 if x_0.is_floating_point() else x_0.float()
        t = as_time(t)
        if t.ndim and t.shape != x_0.shape[: t.ndim]:
            raise ValueError(f"t must be a scalar or [B] to match x_0 {list(x_0.shape)}, got {list(t.shape)}")
        alpha, sigma = (match_dims(value, x_0).to(x_0) for value in (self.alpha(t), self.sigma(t)))
        return alpha * x_0, sigma

    def prior_sampling(
        self, shape: Sequence[int], *, seed: int = 0, keys: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draws from the prior at ``t_max`` by the noise contract: exactly the x that `fastsde.sample` starts from.

        Args:
            shape: ``(B, *shape)``.
            seed: the seed of the draw; ignored if ``keys`` are given.
            keys: ``[B, 2]`` int64, one key per sample (`fastsde.noise`).
            device: where the keys of a seed are made, and so the draw.
        """
        shape = check_shape("shape", shape)
        if not shape:
            raise ValueError("shape must have the batch first, got ()")
        if keys is None:
            keys = noise.sample_keys(seed, shape[0], device=device)
        elif len(keys) != shape[0]:
            raise ValueError(f"keys must have one key for each of the {shape[0]} samples, got {len(keys)}")
        return self.prior_std * noise.normal(keys, 0, shape[1:])

    def prior_logp(self, x: Tensor) -> Tensor:
        """Returns the log density ``[B]`` of ``x`` ``[B, *shape]`` under the prior."""
        x = x.reshape(len(x), math.prod(x.shape[1:])) / self.prior_std
        constant = 0.5 * math.log(2 * math.pi) + math.log(self.prior_std)
        return -constant * x.shape[1] - 0.5 * x.square().sum(1)


def check_process(name: str, value: object) -> None:
    """Raises unless the value is an instance of `Process`."""
    if isinstance(value, type):
        raise TypeError(f"{name} must be a process, got the class {value.__name__}: give an instance of it")
    if not isinstance(value, Process):
        raise TypeError(f"{name} must be a process such as fastsde.VPSDE(), got {type(value).__name__}")


def preserving_step(growth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `Process.exact_step` for alpha^2 + sigma^2 = 1, from growth = alpha' / alpha - 1."""
    return 1 + growth, 2 * growth, growth * (2 + growth)


@functools.cache
def _quadrature() -> tuple[Tensor, Tensor]:
    """Returns Gauss-Legendre nodes in (0, 1) and weights for the pieces [1/2, 1], [1/4, 1/2], .. and the rest to 0."""
    nodes, weights = gauss_legendre(_NODES)
    ends = [0.0, *(2.0**-power for power in reversed(range(_PIECES)))]
    pieces = list(itertools.pairwise(ends))
    points = [low + (high - low) * (1 + nodes) / 2 for low, high in pieces]
    shares = [(high - low) * weights / 2 for low, high in pieces]
    return torch.cat(points), torch.cat(shares)
