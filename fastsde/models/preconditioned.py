"""EDM's preconditioning around a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..sde import Process

__all__ = ["Preconditioned"]


class Preconditioned(nn.Module):
    """D(x, t) = c_skip x / alpha + c_out f(c_in x / alpha, c_noise), which predicts x_0 (Karras et al. 2022,
    arXiv:2206.00364, table 1). The paper's sigma is the noise of x / alpha, that is sigma / alpha.

    With n = sqrt(sigma^2 + alpha^2 sigma_data^2) this is alpha (sigma_data / n)^2 x + sigma sigma_data / n f(x / n,
    c_noise), c_noise = ln(sigma / alpha) / 4, as trained by `fastsde.objective.Objective`.

    Args:
        network: f, called as ``network(x, tau)``.
        sde: the process; its ``alpha(t)`` and ``sigma(t)`` are computed in float64.
        sigma_data: the standard deviation of the data.
    """

    def __init__(self, network: nn.Module, sde: Process, sigma_data: float) -> None:
        super().__init__()
        self.network, self.sde, self.sigma_data = network, sde, sigma_data

    @property
    def shape(self) -> Any:
        """The shape of one sample, if the network has it."""
        return self.network.shape

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """Predicts x_0 for x ``[B, *shape]`` at times t ``[B]``; the network is also called with the conditions."""
        alpha, sigma = self.sde.alpha(t.double()), self.sde.sigma(t.double())
        scaled = alpha * self.sigma_data
        norm = torch.hypot(sigma, scaled)
        tau = (torch.log(sigma / alpha) / 4).to(torch.float32 if t.dtype != torch.float64 else t.dtype)

        def times(factor: Tensor, value: Tensor) -> Tensor:
            return factor.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) * value

        f = self.network(times(1 / norm, x), tau, **conditions)
        return times(scaled * self.sigma_data / norm**2, x) + times(sigma * self.sigma_data / norm, f)
