"""The sub-variance-preserving SDE.

    dx = -1/2 beta(t) x dt + sqrt(beta(t) (1 - exp(-2 B(t)))) dw,    t in [0, 1]

with beta and its integral B as in the VP-SDE, whose variance is an upper bound of this one's (Song et al. 2021,
arXiv:2011.13456, eq. 12 and 29):

    alpha(t) = exp(-B(t) / 2),    sigma(t) = -expm1(-B(t))
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .vp import LinearBeta

__all__ = ["SubVPSDE"]


@dataclass(frozen=True)
class SubVPSDE(LinearBeta):
    """The sub-variance-preserving SDE with a linear beta (Song et al. 2021, arXiv:2011.13456).

        dx = -1/2 beta(t) x dt + sqrt(beta(t) (1 - exp(-2 B(t)))) dw,    t in [0, 1]
        alpha(t) = exp(-B(t) / 2),    sigma(t) = 1 - exp(-B(t)),    beta and B as for VPSDE

    Args:
        beta_min: beta at t = 0, at least 0.
        beta_max: beta at t = 1, positive and at least ``beta_min``.

    Raises:
        TypeError, ValueError: if the two are not finite numbers or not in that order.
    """

    name: str = field(default="sub_vp", init=False, repr=False)

    def sigma(self, t: Tensor | float) -> Tensor:
        return -torch.expm1(-self.integral_beta(t))

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        return self.beta(t) * torch.exp(-self.integral_beta(t))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        return self.beta(t) * -torch.expm1(-2 * self.integral_beta(t))
