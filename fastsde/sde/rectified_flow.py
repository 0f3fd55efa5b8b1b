"""Rectified flow, also known as flow matching with the conditional optimal-transport path.

    alpha(t) = 1 - t,    sigma(t) = t,    t in [0, 1]
    x_t = (1 - t) x_0 + t eps,    dx/dt = eps - x_0

(Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747). Noise is at t = 1, as in every process here;
both papers have it at t = 0. A network that predicts flow predicts their velocity with the opposite sign.

The velocity is finite everywhere, but the drift and the diffusion of the SDE with these marginals are not at t = 1:

    f = -1 / (1 - t),    g^2 = 2 t / (1 - t)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .process import Process, as_time

__all__ = ["RectifiedFlow"]


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """Rectified flow (Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747).

        x_t = (1 - t) x_0 + t eps,    dx/dt = eps - x_0,    t in [0, 1]

    Noise is at t = 1, as in every process here; both papers have it at t = 0. There is no reverse SDE at t = 1, where
    alpha is 0: sample by the probability flow, or by ``ddpm``.
    """

    name: str = field(default="rectified_flow", init=False, repr=False)

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1 - as_time(t)

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        return -torch.ones_like(as_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return as_time(t)

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_time(t))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        t = as_time(t)
        return 2 * t / (1 - t)
