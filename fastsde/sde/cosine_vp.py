"""The variance-preserving process with the cosine schedule.

    alpha(t) = cos(theta(t)) / cos(theta(0)),    sigma^2 = 1 - alpha^2,    theta(t) = pi/2 (t + s) / (1 + s)

(Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17). alpha is computed from the remaining angle phi = pi/2 - theta, which
keeps its precision near t = 1, where it is 0, and sigma as a product of sines, which keeps its precision near t = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..validation import check_number
from .process import Process, as_time, preserving_step

__all__ = ["CosineVPSDE"]


@dataclass(frozen=True)
class CosineVPSDE(Process):
    """The cosine schedule in continuous time (Nichol & Dhariwal 2021, arXiv:2102.09672).

        alpha(t) = cos(theta(t)) / cos(theta(0)),    sigma^2 = 1 - alpha^2,    theta(t) = pi/2 (t + s) / (1 + s)

    Args:
        s: the paper's offset, which keeps beta from being too small near t = 0; at least 0.
        t_max: where sampling starts, in (0, 1]. At 1 alpha is 0 and beta infinite, which the paper avoids by clipping
            beta; the default is where DPM-Solver (arXiv:2206.00927) starts. From 1, sampling works only with networks
            that predict x0, v or flow, and with solvers that need no reverse SDE and no x_0 from pure noise.

    Raises:
        TypeError, ValueError: if the two are not numbers in their range.
    """

    s: float = 0.008
    t_max: float = 0.9946
    name: str = field(default="cosine_vp", init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("s", self.s, "at least 0 and finite", lambda s: 0 <= s < math.inf)
        check_number("t_max", self.t_max, "in (0, 1]", lambda t: 0 < t <= 1)

    @property
    def _speed(self) -> float:
        return math.pi / (2 * (1 + self.s))

    @property
    def _start(self) -> float:
        """theta(0)."""
        return self._speed * self.s

    def _left(self, t: Tensor | float) -> Tensor:
        """Returns phi(t) = pi/2 - theta(t)."""
        return self._speed * (1 - as_time(t))

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.sin(self._left(t)) / math.cos(self._start)

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        return -self._speed / math.cos(self._start) * torch.sin(self._speed * (as_time(t) + self.s))

    def sigma(self, t: Tensor | float) -> Tensor:
        angle = self._speed * as_time(t)
        return torch.sqrt(torch.sin(angle) * torch.sin(angle + 2 * self._start)) / math.cos(self._start)

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        """Returns -alpha alpha' / sigma: infinite at t = 0, unless s is 0."""
        t = as_time(t)
        rate = -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)
        return rate if self.s else torch.where(t == 0, self._speed, rate)

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        return -2 * self.drift_coefficient(t)

    def exact_step(self, t: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        middle = self._left((t + after) / 2)
        growth = 2 * torch.cos(middle) * torch.sin(self._speed * (t - after) / 2) / torch.sin(self._left(t))
        return preserving_step(growth)
