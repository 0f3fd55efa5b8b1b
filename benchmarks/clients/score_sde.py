"""The predictors and correctors of score_sde, which is published as a repository: written anew from the paper.

Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", arXiv:2011.13456:
Euler-Maruyama, reverse diffusion (Algorithms 2 and 3), ancestral sampling (appendix F), Langevin correctors (Algorithms
4 and 5) and the probability flow (appendix D), with the variance-preserving process.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .case import SHAPE, Case, case

TITLE, PACKAGES = "score_sde", ()

BETA_MIN, BETA_MAX, SCALES, EPSILON, STEPS = 0.1, 20.0, 1000, 1e-3, 12
BETAS = torch.linspace(BETA_MIN / SCALES, BETA_MAX / SCALES, SCALES)
ALPHAS = 1 - BETAS
CUMULATED = torch.cumprod(ALPHAS, 0)

Network = Callable[..., Tensor]
Score = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Score, Tensor, Tensor], tuple[Tensor, Tensor]]


def index(t: Tensor) -> Tensor:
    return (t * (SCALES - 1)).long()


def wide(value: Tensor) -> Tensor:
    return value[:, None, None, None]


def beta_at(t: Tensor) -> Tensor:
    return BETA_MIN + t * (BETA_MAX - BETA_MIN)


def score_of(net: Network) -> Score:
    """Returns the score of a network that predicts noise."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        log_mean = -(t**2) * (BETA_MAX - BETA_MIN) / 4 - t * BETA_MIN / 2
        return -net(x, t * (SCALES - 1)) / wide((1 - torch.exp(2 * log_mean)).sqrt())

    return score


# Predictors: each returns the next state, and the same without its noise. --------------------------------------------


def euler(score: Score, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    size = -1.0 / STEPS
    beta = wide(beta_at(t))
    drift = -0.5 * beta * x - beta * score(x, t)
    mean = x + drift * size
    return mean + (beta * -size).sqrt() * torch.randn_like(x), mean


def reverse_diffusion(score: Score, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.randn_like(x)
    beta = wide(BETAS[index(t)])
    forward = (1 - beta).sqrt() * x - x
    mean = x - (forward - beta * score(x, t))
    return mean + beta.sqrt() * noise, mean


def ancestral(score: Score, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    beta = wide(BETAS[index(t)])
    mean = (x + beta * score(x, t)) / (1 - beta).sqrt()
    return mean + beta.sqrt() * torch.randn_like(x), mean


# Correctors ----------------------------------------------------------------------------------------------------------


def langevin_by_norms(score: Score, x: Tensor, t: Tensor, ratio: float = 0.16) -> tuple[Tensor, Tensor]:
    """Takes two Langevin steps, whose size follows from the norms of the score and of the noise."""
    alpha = ALPHAS[index(t)].to(x.dtype)
    mean = x
    for _ in range(2):
        grad, noise = score(x, t), torch.randn_like(x)
        norms = (torch.norm(one.reshape(len(one), -1), dim=-1).mean() for one in (noise, grad))
        quotient = next(norms) / next(norms)
        size = wide((ratio * quotient) ** 2 * 2 * alpha)
        mean = x + size * grad
        x = mean + (size * 2).sqrt() * noise
    return x, mean


def annealed_langevin(score: Score, x: Tensor, t: Tensor, ratio: float = 0.16) -> tuple[Tensor, Tensor]:
    """Takes two Langevin steps, whose size follows from the time."""
    log_mean = -(t**2) * (BETA_MAX - BETA_MIN) / 4 - t * BETA_MIN / 2
    std = (1 - torch.exp(2 * log_mean)).sqrt()
    size = wide((ratio * std) ** 2 * 2 * ALPHAS[index(t)])
    mean = x
    for _ in range(2):
        grad, noise = score(x, t), torch.randn_like(x)
        mean = x + size * grad
        x = mean + noise * (size * 2).sqrt()
    return x, mean


def sampler(predictor: Step, corrector: Step | None = None) -> Callable[[Network], Tensor]:
    """Returns Algorithm 1, whose last step has no noise."""

    def loop(net: Network) -> Tensor:
        score = score_of(net)
        with torch.no_grad():
            x = mean = torch.randn(SHAPE)
            for now in torch.linspace(1, EPSILON, STEPS):
                t = torch.ones(len(x)) * now
                if corrector is not None:
                    x, mean = corrector(score, x, t)
                x, mean = predictor(score, x, t)
        return mean

    return loop


def flow_by_euler(net: Network) -> Tensor:
    score = score_of(net)
    times = torch.linspace(1, EPSILON, STEPS + 1)
    x = torch.randn(SHAPE)
    for now, size in zip(times[:-1], times.diff(), strict=True):
        t = now.expand(len(x))
        beta = wide(beta_at(t))
        x = x + size * (-0.5 * beta * x - 0.5 * beta * score(x, t))
    return x


def flow_by_scipy(net: Network) -> Tensor:
    """Integrates the probability flow by scipy's adaptive Runge-Kutta method, on numpy arrays."""
    from scipy.integrate import solve_ivp

    score = score_of(net)
    x = torch.randn(SHAPE)

    def slope(time: float, flat: Any) -> Any:
        state = torch.from_numpy(flat).reshape(SHAPE).to(x.dtype)
        t = torch.ones(len(state)) * time
        beta = wide(beta_at(t))
        return (-0.5 * beta * state - 0.5 * beta * score(state, t)).reshape(-1).numpy()

    solution = solve_ivp(slope, (1.0, EPSILON), x.reshape(-1).numpy(), rtol=1e-3, atol=1e-3, method="RK45")
    return torch.as_tensor(solution.y[:, -1]).reshape(SHAPE)


def cases() -> list[Case]:
    return [
        case("euler", sampler(euler)),
        case("reverse_diffusion", sampler(reverse_diffusion)),
        case("ancestral", sampler(ancestral)),
        case("euler + annealed Langevin", sampler(euler, annealed_langevin)),
        case("euler + Langevin by norms", sampler(euler, langevin_by_norms)),
        case("probability flow, euler", flow_by_euler),
        *([case("probability flow, scipy's RK45", flow_by_scipy)] if find_spec("scipy") else []),
    ]
