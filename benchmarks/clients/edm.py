"""The stochastic sampler of EDM, which is published as a repository and not as a package: written anew from the paper.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv:2206.00364, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import sqrt

import torch
from torch import Tensor

from .case import SHAPE, Case, case

TITLE, PACKAGES = "EDM", ()

SIGMA_MIN, SIGMA_MAX, RHO, STEPS = 0.002, 80.0, 7.0, 8
CHURN, CHURN_FROM, CHURN_TO, NOISE = 4.0, 0.05, 50.0, 1.003

Network = Callable[..., Tensor]


def denoised(net: Network, x: Tensor, sigma: Tensor, data: float = 0.5) -> Tensor:
    """Returns D(x; sigma) of a network in fp32, with the preconditioning of Table 1, for a state in float64."""
    sigma = sigma.float().reshape(-1, 1, 1, 1)
    both = sigma**2 + data**2
    x = x.to(torch.float32)
    f = net(x / both.sqrt(), sigma.flatten().log() / 4)
    return (data**2 / both * x + sigma * data / both.sqrt() * f).to(torch.float64)


def sampler(heun: bool) -> Callable[[Network], Tensor]:
    def edm_sampler(net: Network) -> Tensor:
        latents = torch.randn(SHAPE)
        ramp = torch.arange(STEPS, dtype=torch.float64) / (STEPS - 1)
        first, last = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
        times = torch.cat([(first + ramp * (last - first)) ** RHO, torch.zeros(1)])
        x = latents.to(torch.float64) * times[0]
        for t, after in pairwise(times):
            churned = min(CHURN / STEPS, sqrt(2) - 1) if CHURN_FROM <= t <= CHURN_TO else 0.0
            raised = t + churned * t
            x_hat = x + (raised**2 - t**2).sqrt() * NOISE * torch.randn_like(x)
            slope = (x_hat - denoised(net, x_hat, raised)) / raised
            x = x_hat + (after - raised) * slope
            if heun and after > 0:
                corrected = (x - denoised(net, x, after)) / after
                x = x_hat + (after - raised) * (slope + corrected) / 2
        return x

    return edm_sampler


def cases() -> list[Case]:
    return [case(f"published sampler, heun={heun}, churn", sampler(heun)) for heun in (False, True)]
