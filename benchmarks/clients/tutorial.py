"""The loop of the well-known tutorial on score-based generative models: Euler-Maruyama on the swiss roll.

Written anew: the reverse process of Song et al. 2021, arXiv:2011.13456, for beta from 0.1 to 20, with a network that is
called as ``network(cat((x, t), -1))``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .case import Case, Loop

TITLE, PACKAGES = "tutorial", ()


def generate_samples(score_network: nn.Module, nsamples: int, steps: int = 1000) -> Tensor:
    x = torch.randn((nsamples, 2))
    times = torch.linspace(1, 0, steps)
    for i in range(len(times) - 1):
        t, size = times[i].expand(nsamples, 1), times[i] - times[i + 1]
        beta = 0.1 + (20 - 0.1) * t
        score = score_network(torch.cat((x, t), -1)).detach()
        drift = -0.5 * beta * x - beta * score
        x = x - drift * size + (beta * size).sqrt() * torch.randn_like(x)
    return x


class Network(nn.Module):
    """Three columns in, two out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.Softplus(), nn.Linear(16, 2))

    def forward(self, joined: Tensor) -> Tensor:
        out: Tensor = self.layers(joined)
        return out


def cases() -> list[Case]:
    def make(dtype: torch.dtype) -> Loop:
        network = Network().to(dtype).requires_grad_(False)
        return Loop(generate_samples, (network, 8))

    return [Case("generate_samples, cat((x, t), -1), 999 steps", make)]
