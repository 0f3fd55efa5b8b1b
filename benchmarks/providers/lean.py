"""Eager PyTorch without overhead: constants in Python, in-place operations, data on the device, fused Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastsde.solvers import StepTable

from ..suite.measure import Run
from ..tasks.recipe import Recipe
from ..tasks.trajectory import Trajectory
from .tutorial import T_MIN, Loss, Steps, integral

Used = list[tuple[int, float]]  # the terms of a sum: the index of a value, and its coefficient


def step(x: Tensor, f: Tensor, a: float, b: float, d: float) -> Tensor:
    """Returns x' = a x + b f + d z in new memory, computed in four operations."""
    return torch.randn_like(x).mul_(d).add_(x, alpha=a).add_(f, alpha=b)


def sampling(task: Trajectory, precision: str) -> Run:
    """Returns a function that runs any table of `fastsde.solvers` row by row, with coefficients as Python numbers."""
    network, table = task.network(precision, channels_last=task.device.type == "cuda"), task.table
    rows = [_row(table, row) for row in range(len(table))]
    times = table.time.to(task.device, torch.float32)

    def run() -> Tensor:
        with torch.inference_mode(), task.precision_of_products(precision):
            slots = [torch.randn(task.shape, device=task.device)]
            slots += [torch.zeros_like(slots[0]) for _ in range(1, table.slots)]
            for (n, take), t in zip(rows, times, strict=True):
                x = slots[0] if n is None else _sum(None, n, slots)
                slots = take(slots, network(x, t.expand(task.n)))
        return slots[0]

    return run


def _row(table: StepTable, row: int) -> tuple[Used | None, Callable[[list[Tensor], Tensor], list[Tensor]]]:
    """Returns the terms of the network's input (None for slot 0), and the step without zero or unused terms."""
    k, terms = table.row(row), table.terms(row)
    n, data_of = None if k.reads_slot_0 else _used(k.n), _used((*k.p, k.q))
    if table.slots == 1 and terms.has_noise and not terms.has_data:
        factors = {"a": k.A[0][0], "b": k.b[0], "d": k.d[0]}
        return n, lambda slots, f: [step(slots[0], f, **factors)]
    new = [(j, k.d[j], _used((*k.A[j], k.b[j], k.e[j]))) for j in terms.computed]
    is_shared = sum(d != 0 for _, d, _ in new) > 1
    own_data = next((j for j, d, used in new if d == 0 and used == [(table.slots + 1, 1.0)]), None)

    def take(slots: list[Tensor], f: Tensor) -> list[Tensor]:
        data = f
        if terms.has_data:
            data = _sum(None, data_of, [*slots, f])
            data = data if table.clip is None else data.clamp_(-table.clip, table.clip)
        z = torch.randn_like(f) if terms.has_noise else None
        values = [*slots, f, data]
        made = [slots[j if source is None else source] for j, source in enumerate(terms.sources)]
        for j, d, used in new:
            start = None if z is None or d == 0 else z * d if is_shared else z.mul_(d)
            made[j] = data if j == own_data else _sum(start, used, values)
        return made

    return n, take


def _used(coefficients: Sequence[float]) -> Used:
    return [(i, coefficient) for i, coefficient in enumerate(coefficients) if coefficient != 0]


def _sum(total: Tensor | None, used: Used, values: list[Tensor]) -> Tensor:
    """Returns the sum of the terms, added to ``total`` in place, or in new memory without it."""
    if total is None:
        if not used:
            return torch.zeros_like(values[0])
        (i, coefficient), *used = used
        total = values[i] * coefficient
    for i, coefficient in used:
        total.add_(values[i], alpha=coefficient)
    return total


def perturb(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns x_t, t, the noise and sigma for data ``[B, d]``."""
    t = torch.empty((len(x), 1), dtype=x.dtype, device=x.device).uniform_(T_MIN, 1)
    area = integral(t)
    z, sigma = torch.randn_like(x), area.neg().expm1_().neg_().sqrt_()
    return torch.addcmul(x * area.mul_(-0.5).exp_(), z, sigma), t, z, sigma


def loss(network: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Returns the tutorial's loss as the mean of (sigma score + z)^2, with z kept instead of recomputed from x_t."""
    x_t, t, z, sigma = perturb(x)
    return torch.addcmul(z, network(x_t, t), sigma).square().mean()


def batches(recipe: Recipe) -> Iterator[Tensor]:
    """Yields batches of the data in random order, without a data loader."""
    size, x_0 = recipe.config.batch_size, recipe.x_0
    while True:
        for index in torch.randperm(len(x_0), device=recipe.device)[: len(x_0) // size * size].split(size):
            yield x_0[index]


def training(recipe: Recipe, of: Loss = loss) -> Steps:
    """Returns training steps with a loss ``of(network, x)``, which is read only after the last step."""
    return Steps(recipe, of, batches(recipe), recipe.work().model, fused=True)
