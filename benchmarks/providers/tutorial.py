"""The tutorial's loops as they stand: the baseline. Its formulas, operation for operation, in words of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fastsde.compat.tutorial import calc_loss

from ..suite.case import check
from ..suite.measure import Run
from ..tasks.recipe import Recipe
from ..tasks.trajectory import SEED, Score, Trajectory

BETA_MIN, BETA_MAX, T_MIN = 0.1, 20, 1e-4


def beta_at(t: Tensor) -> Tensor:
    return BETA_MIN + (BETA_MAX - BETA_MIN) * t


def integral(t: Tensor) -> Tensor:
    """Of beta, from 0 to t."""
    return (BETA_MIN + 0.5 * (BETA_MAX - BETA_MIN) * t) * t


def step(x: Tensor, score: Tensor, beta: Tensor, size: Tensor) -> Tensor:
    """One Euler-Maruyama step of the reverse SDE."""
    return x - (-0.5 * beta * x - beta * score) * size + (beta * size).sqrt() * torch.randn_like(x)


def sample(network: Callable[..., Tensor], shape: tuple[int, ...], rows: int, device: torch.device) -> Tensor:
    """The sampling loop, for a network that predicts the score of x and t."""
    with torch.no_grad():
        times = torch.linspace(1, 0, rows + 1, device=device)
        x = torch.randn(*shape, device=device)
        for here, there in pairwise(times):
            x = step(x, network(x, here.expand(len(x))), beta_at(here), here - there)
    return x


def sampling(task: Trajectory, precision: str) -> Run:
    times = torch.linspace(1, 0, task.rows + 1, dtype=torch.float64)[:-1]
    score = Score(task.network(precision), task.checkpoint, times)

    def run() -> Tensor:
        with task.precision_of_products(precision):
            return sample(score, task.shape, task.rows, task.device)

    return run


def perturb(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, t, its mean and its variance for data ``[B, d]``."""
    t = torch.rand((len(x), 1), dtype=x.dtype, device=x.device) * (1 - T_MIN) + T_MIN
    mean, variance = x * torch.exp(-0.5 * integral(t)), -torch.expm1(-integral(t))
    return torch.randn_like(x) * variance**0.5 + mean, t, mean, variance


def loss(network: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The denoising loss of data ``[B, d]``; the network takes x and t ``[B, 1]``."""
    x_t, t, mean, variance = perturb(x)
    target = -(x_t - mean) / variance
    return (variance * (network(x_t, t) - target) ** 2).mean()


def training(recipe: Recipe) -> Run:
    """With the data loader, and the loss read after each step."""
    model = recipe.work().model
    network, optimizer = recipe.network(model), torch.optim.Adam(model.parameters(), lr=recipe.config.lr)
    prove_loss(network, recipe.x_0[: recipe.config.batch_size])
    loader = DataLoader(
        TensorDataset(recipe.x_0.cpu()), batch_size=recipe.config.batch_size, shuffle=True, drop_last=True
    )

    def batches() -> Iterator[Tensor]:
        while True:
            for (x,) in loader:
                yield x.to(recipe.device)

    drawn = iter(batches())

    def run() -> Tensor:
        total = 0.0
        for _ in range(recipe.steps):
            value = loss(network, next(drawn))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total += value.item()
        return torch.tensor(total / recipe.steps)

    return run


def prove_loss(network: Callable[..., Tensor], x: Tensor) -> None:
    """The loss is number for number that of `fastsde.compat.tutorial`, which is the reference's."""
    losses = []
    for function in (loss, calc_loss):
        torch.manual_seed(SEED)
        losses.append(float(function(network, x).detach()))
    check("the tutorial's loss", abs(losses[0] / losses[1] - 1), 1e-3)
