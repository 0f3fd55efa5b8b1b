"""Eager PyTorch without waste: constants in Python, operations in place, data on the device, fused Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..suite.measure import Run
from ..tasks.recipe import Recipe
from ..tasks.trajectory import Trajectory
from .tutorial import T_MIN, Loss, Steps, integral


def step(x: Tensor, f: Tensor, a: float, b: float, d: float) -> Tensor:
    """x' = a x + b f + d z, in four operations and out of place."""
    return torch.randn_like(x).mul_(d).add_(x, alpha=a).add_(f, alpha=b)


def sampling(task: Trajectory, precision: str) -> Run:
    """Any table of `fastsde.solvers`, row by row, its coefficients as numbers."""
    network, table = task.network(precision, channels_last=task.device.type == "cuda"), task.table
    rows = [table.row(row) for row in range(len(table))]
    has_data = any(k["c"] or k["e"] for k in rows)
    times = table.time.to(task.device, torch.float32)

    def run() -> Tensor:
        with torch.inference_mode(), task.precision_of_products(precision):
            x, data = torch.randn(task.shape, device=task.device), None
            for k, t in zip(rows, times, strict=True):
                f, last = network(x, t.expand(task.n)), data
                if has_data:
                    data = torch.add(k["p"] * x, f, alpha=k["q"])
                x = x * k["a"] if k["d"] == 0 else torch.randn_like(x).mul_(k["d"]).add_(x, alpha=k["a"])
                x.add_(f, alpha=k["b"])
                for factor, term in ((k["e"], data), (k["c"], last)):
                    if factor:
                        x.add_(term, alpha=factor)
        return x

    return run


def perturb(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, t, the noise and sigma for data ``[B, d]``."""
    t = torch.empty((len(x), 1), dtype=x.dtype, device=x.device).uniform_(T_MIN, 1)
    area = integral(t)
    z, sigma = torch.randn_like(x), area.neg().expm1_().neg_().sqrt_()
    return torch.addcmul(x * area.mul_(-0.5).exp_(), z, sigma), t, z, sigma


def loss(network: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The tutorial's loss, with the noise where the tutorial finds it again: the mean of (sigma score + z)^2."""
    x_t, t, z, sigma = perturb(x)
    return torch.addcmul(z, network(x_t, t), sigma).square().mean()


def batches(recipe: Recipe) -> Iterator[Tensor]:
    """Without a loader."""
    size, x_0 = recipe.config.batch_size, recipe.x_0
    while True:
        for index in torch.randperm(len(x_0), device=recipe.device)[: len(x_0) // size * size].split(size):
            yield x_0[index]


def training(recipe: Recipe, of: Loss = loss) -> Steps:
    """Steps by a loss ``of(network, x)``; nothing is read before the end."""
    return Steps(recipe, of, batches(recipe), recipe.work().model, fused=True)
