"""The tutorial's loops as they stand: the baseline. Same formulas, operation for operation, in code written anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsde.compat.tutorial import calc_loss

from ..suite.case import check
from ..suite.measure import Figures, Run
from ..tasks.recipe import Recipe
from ..tasks.trajectory import Score, Trajectory

BETA_MIN, BETA_MAX, T_MIN = 0.1, 20, 1e-4


def beta_at(t: Tensor) -> Tensor:
    return BETA_MIN + (BETA_MAX - BETA_MIN) * t


def integral(t: Tensor) -> Tensor:
    """Returns the integral of beta from 0 to t."""
    return (BETA_MIN + 0.5 * (BETA_MAX - BETA_MIN) * t) * t


def step(x: Tensor, score: Tensor, beta: Tensor, size: Tensor) -> Tensor:
    """Takes one Euler-Maruyama step of the reverse SDE."""
    return x - (-0.5 * beta * x - beta * score) * size + (beta * size).sqrt() * torch.randn_like(x)


def sample(network: Callable[..., Tensor], shape: tuple[int, ...], rows: int, device: torch.device) -> Tensor:
    """Runs the sampling loop, for a network that predicts the score from x and t."""
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
    """Returns x_t, t, and the mean and variance of x_t, for data ``[B, d]``."""
    t = torch.rand((len(x), 1), dtype=x.dtype, device=x.device) * (1 - T_MIN) + T_MIN
    mean, variance = x * torch.exp(-0.5 * integral(t)), -torch.expm1(-integral(t))
    return torch.randn_like(x) * variance**0.5 + mean, t, mean, variance


def loss(network: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Returns the denoising loss for data ``[B, d]``; the network takes x and t ``[B, 1]``."""
    x_t, t, mean, variance = perturb(x)
    target = -(x_t - mean) / variance
    return (variance * (network(x_t, t) - target) ** 2).mean()


Loss = Callable[[Callable[..., Tensor], Tensor], Tensor]


class Steps:
    """Training steps to be timed, with their network, loss, data and optimizer."""

    def __init__(self, recipe: Recipe, loss: Loss, batches: Iterator[Tensor], model: nn.Module, fused: bool) -> None:
        self.recipe, self.loss, self.model = recipe, loss, model
        self.network = recipe.network(model)
        self._reads = not fused  # whether the loss is read after each step, as in the tutorial
        self._batches = batches
        self._optimizer = torch.optim.Adam(model.parameters(), lr=recipe.config.lr, fused=fused or None)

    def __call__(self) -> Tensor:
        total = 0.0
        for _ in range(self.recipe.steps):
            value = self.loss(self.network, next(self._batches))
            self._optimizer.zero_grad()
            value.backward()
            self._optimizer.step()
            if self._reads:
                total += value.item()
        return torch.tensor(total / self.recipe.steps) if self._reads else value.detach()


def training(recipe: Recipe) -> Steps:
    """Returns training steps with a data loader, whose loss is read after each step."""
    loader = DataLoader(
        TensorDataset(recipe.x_0.cpu()), batch_size=recipe.config.batch_size, shuffle=True, drop_last=True
    )

    def batches() -> Iterator[Tensor]:
        while True:
            for (x,) in loader:
                yield x.to(recipe.device)

    return Steps(recipe, loss, batches(), recipe.work().model, fused=False)


def prove_training(run: Steps, losses: Tensor) -> Figures:
    """Checks that the weights moved, and that loss and gradient agree with `fastsde.compat.tutorial`.

    Both are means over many draws of time and noise, and their difference is measured in standard errors.
    """
    recipe = run.recipe
    started = recipe.work().model.parameters()
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(started, run.model.parameters(), strict=True))
    check("the step", 0.0 if moved > 0 else math.inf, 0.0)
    x = recipe.x_0[: recipe.config.batch_size]
    draws = 64 if len(recipe.dataset.shape) == 1 else 8
    found = []
    for function in (run.loss, calc_loss):
        values, gradients = zip(*(_loss_and_gradient(function, run, x) for _ in range(draws)), strict=True)
        found.append((torch.stack(values), torch.stack(gradients)))
    for name, (ours, theirs), bound in zip(("loss", "gradient"), zip(*found, strict=True), (5.0, 3.0), strict=True):
        chance = float(ours.var(0).sum() + theirs.var(0).sum()) / draws
        apart = math.sqrt(float((ours.mean(0) - theirs.mean(0)).square().sum()) / chance)
        figures = check(f"the {name}", apart, bound)
    return {"loss": float(found[0][0].mean()), **figures}


def _loss_and_gradient(function: Loss, run: Steps, x: Tensor) -> tuple[Tensor, Tensor]:
    value = function(run.network, x)
    found = torch.autograd.grad(value, list(run.model.parameters()))
    return value.detach().clone(), torch.cat([each.flatten() for each in found])
