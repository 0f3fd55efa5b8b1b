"""Random tables of slots, and float64 results of their rows and trajectories with error bounds for fp32."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from tolerances import NORMAL_ERROR
from torch import Tensor

from fastsde import StepTable, noise
from fastsde.solvers import ABSENT, ANY, ONE

__all__ = [
    "EPS",
    "Near",
    "exact",
    "guided",
    "history_table",
    "input_near",
    "network",
    "random_table",
    "states_near",
    "step_near",
]

EPS = 2.0**-24


def random_table(slots: int, rows: int = 6, *, seed: int = 0, clip: float | None = None) -> StepTable:
    """Returns a table with all kinds of terms, some in the whole table and some in single rows.

    Coefficients are absent, one, or anything; slots may only move on; the network may be called with something other
    than slot 0, and noise may enter any slot. Times are exact in fp32.
    """
    chance = random.Random(100 * seed + slots)

    def kinds(count: int, *weights: int) -> list[int]:
        return chance.choices((ABSENT, ONE, ANY), weights or (3, 1, 5), k=count)

    def values(given: Sequence[int], size: float = 1.0) -> list[float]:
        """Returns values for a row; a coefficient that may be anything may also be absent or one."""
        known = [kinds(1, 2, 1, 5)[0] if kind == ANY else kind for kind in given]
        return [(0.0, 1.0, size * chance.uniform(-1, 1))[kind] for kind in known]

    def moved(slot: int) -> list[int]:
        source = chance.randrange(slots)
        return [ONE if other == source else ABSENT for other in range(slots)]

    # For the whole table: the kind of each column, which slots always move on, and whether slot 0 is always the input.
    A, (b, e, p, n) = [kinds(slots, 4, 1, 5) for _ in range(slots)], (kinds(slots) for _ in range(4))
    d, q, always_moved = kinds(slots, 5, 1, 3), kinds(1), [slot and chance.random() < 0.4 for slot in range(slots)]
    sources, reads_slot_0 = [moved(slot) for slot in range(slots)], chance.random() < 0.5
    columns: dict[str, list[object]] = {name: [] for name in ("n", "p", "q", "A", "b", "e", "d")}
    first = [1.0] + [0.0] * (slots - 1)
    for _ in range(rows):
        row = {"b": values(b), "e": values(e), "d": values(d)}
        matrix = [values(each, slots**-0.5) for each in A]
        for slot in range(slots):
            if always_moved[slot] or chance.random() < 0.15:
                matrix[slot] = [float(kind) for kind in (sources[slot] if always_moved[slot] else moved(slot))]
                for column in row.values():
                    column[slot] = 0.0
        given = values(n)
        row |= {"A": matrix, "p": values(p), "q": values(q)[0]}
        row["n"] = first if reads_slot_0 or chance.random() < 0.2 or not any(given) else given
        for name, column in columns.items():
            column.append(row[name])
    tensors = {name: torch.tensor(column, dtype=torch.float64, device="cpu") for name, column in columns.items()}
    time = 1 - torch.arange(rows, dtype=torch.float64, device="cpu") / 64
    return StepTable(time=time, clip=clip, **tensors)


def history_table(slots: int, rows: int) -> StepTable:
    """Returns a multistep method: slot 0 combines all slots, every other slot takes over the one before it."""
    chance, float64 = random.Random(slots), {"dtype": torch.float64, "device": "cpu"}
    A = torch.zeros(rows, slots, slots, **float64)
    A[:, 0] = torch.tensor([[chance.uniform(-1, 1) for _ in range(slots)] for _ in range(rows)], **float64)
    A[:, range(1, slots), range(slots - 1)] = 1
    b = torch.eye(1, slots, **float64).expand(rows, slots) / 2
    return StepTable(time=1 - torch.arange(rows, **float64) / 64, A=A, b=b, d=b)


class Near(NamedTuple):
    """A value in float64, and how much an fp32 evaluation may differ from it."""

    value: Tensor
    error: Tensor

    def check(self, ours: Tensor | None) -> None:
        assert ours is not None
        assert ours.dtype == torch.float32
        assert ours.shape == self.value.shape
        excess = (ours.double() - self.value).abs() - self.error
        assert (excess <= 0).all(), f"{excess.nan_to_num(nan=torch.inf).max():.3g} beyond {self.error.max():.3g}"


def exact(value: Tensor, error: float = 0.0) -> Near:
    return Near(value.double(), torch.full_like(value, error, dtype=torch.float64))


def guided(f: Near, f_uncond: Near, guidance: float) -> Near:
    """Returns f_uncond + guidance (f - f_uncond), with roundings of the weight, difference, product and sum."""
    value = f_uncond.value + guidance * (f.value - f_uncond.value)
    size = f_uncond.value.abs() + abs(guidance) * (f.value.abs() + f_uncond.value.abs())
    return Near(value, 5 * EPS * size + abs(guidance) * f.error + abs(1 - guidance) * f_uncond.error)


def _sum(coefficients: Sequence[float], terms: Sequence[Near]) -> Near:
    """Returns the weighted sum; terms with a coefficient of zero do not matter, even if they are not finite."""
    used = [(c, *term) for c, term in zip(coefficients, terms, strict=True) if c != 0]
    value, size, error = (torch.zeros_like(terms[0].value) for _ in range(3))
    for c, term, off in used:
        value, size, error = value + c * term, size + abs(c) * term.abs(), error + abs(c) * off
    # Roundings of the coefficient, of the product and of each sum; one more for products of these roundings.
    return Near(value, error + (len(used) + 2) * EPS * size)


def step_near(slots: Sequence[Near], f: Near, table: StepTable, row: int, z: Near | None) -> list[Near]:
    """Returns the new slots s' = A s + b f + e D + d z with D = clamp(p.s + q f)."""
    k = table.row(row)
    data = _sum((*k.p, k.q), (*slots, f))
    if table.clip is not None:
        data = Near(data.value.clamp(-table.clip, table.clip), data.error)
    terms = (*slots, f, data, f if z is None else z)
    return [_sum((*k.A[slot], k.b[slot], k.e[slot], k.d[slot]), terms) for slot in range(table.slots)]


def input_near(slots: Sequence[Near], table: StepTable, row: int) -> Near:
    """Returns n.s, the network's input in a row."""
    return _sum(table.row(row).n, slots)


def network(x: Tensor, t: Tensor) -> Tensor:
    """A network whose output changes by at most half of the change in x."""
    return 0.5 * torch.sin(x) + t.reshape(-1, *[1] * (x.ndim - 1))


def states_near(
    table: StepTable,
    keys: Tensor,
    shape: Sequence[int],
    edit: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[Near]:
    """Returns slot 0 at the start and after each row of a trajectory of `network`.

    Args:
        edit: what a callback does to the state after each row; it must not increase the distance of any two values.
    """
    slots = [exact(noise.normal(keys, 0, shape), NORMAL_ERROR)]
    slots += [exact(torch.zeros_like(slots[0].value)) for _ in range(1, table.slots)]
    states = [slots[0]]
    for row in range(len(table)):
        x, error = input_near(slots, table, row)
        # The error of a sine to 2 ulp, the time and their sum.
        f = Near(network(x, torch.full((len(x),), table.row(row).time).to(x)), error / 2 + 8 * EPS)
        z = exact(noise.normal(keys, row + 1, shape), NORMAL_ERROR)
        slots = step_near(slots, f, table, row, z)
        slots[0] = Near(edit(slots[0].value), slots[0].error)
        states.append(slots[0])
    return states
