"""The process of EDM, whose time is the noise level itself.

    dx = sqrt(2 t) dw,    t in [0, sigma_max]
    alpha(t) = 1,    sigma(t) = t

(Karras et al. 2022, arXiv:2206.00364, table 1). A network that predicts x_0 is their denoiser D(x; sigma).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..validation import check_number
from .process import Process, as_time

__all__ = ["EDM"]


@dataclass(frozen=True)
class EDM(Process):
    """The process of EDM (Karras et al. 2022, arXiv:2206.00364), from the prior N(0, sigma_max^2 I) at t = sigma_max.

        dx = sqrt(2 t) dw,    alpha(t) = 1,    sigma(t) = t,    t in [0, sigma_max]

    Args:
        sigma_min: the lowest noise level that a network is trained at, positive.
        sigma_max: the highest noise level, where samples start.

    Raises:
        TypeError, ValueError: if the two are not finite numbers or not in that order.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    name: str = field(default="edm", init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("sigma_min", self.sigma_min), check_number("sigma_max", self.sigma_max)
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"expected 0 < sigma_min < sigma_max, got sigma_min={self.sigma_min} and sigma_max={self.sigma_max}"
            )

    @property
    def t_max(self) -> float:
        return self.sigma_max

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    @property
    def spacing(self) -> str:
        """Steps of equal size in t, up to 80, would have almost no points at low noise."""
        return "karras"

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_time(t))

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(as_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return as_time(t)

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_time(t))

    def exact_step(self, t: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variance = (t - after) * (t + after)
        return torch.ones_like(t), variance, variance
