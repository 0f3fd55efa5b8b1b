"""Tables of any number of slots whose coefficients are of every kind."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsde import StepTable

__all__ = ["random_table"]


def random_table(slots: int, rows: int, generator: torch.Generator, *, clip: float | None = None) -> StepTable:
    """A table of m slots. A coefficient is zero in all rows, or one in all, or anything: also zero or one in some.

    States keep about their size. Slot 0 is always read and written, and each other slot at least once each: it may be
    one that moves on, in all rows or in some, from itself or from another. The network's input is slot 0 itself, a
    multiple of it, or of all slots; noise goes to any slots, or to none. The time falls from 1 to 1 / K.

    Args:
        clip: of the table; D is about as large as the state.
    """

    def chance(probability: float) -> bool:
        return float(torch.rand((), generator=generator)) < probability

    def uniform(*shape: int) -> Tensor:
        """Of magnitude 0.2 to 0.6, so that no term is lost in the rounding of others."""
        sign = torch.randint(0, 2, shape, generator=generator).double() * 2 - 1
        return sign * (0.2 + 0.4 * torch.rand(shape, generator=generator, dtype=torch.float64))

    def coefficient(absent: float, one: float) -> Tensor:
        """One of all rows ``[K]``: zero, or one, with these probabilities, else anything, row by row."""
        if chance(absent):
            return torch.zeros(rows, dtype=torch.float64)
        if chance(one):
            return torch.ones(rows, dtype=torch.float64)
        kind = torch.rand(rows, generator=generator)
        return torch.where(kind < 0.2, 0.0, torch.where(kind < 0.3, 1.0, uniform(rows)))

    def vector(absent: float, one: float) -> Tensor:
        return torch.stack([coefficient(absent, one) for _ in range(slots)], dim=1)

    keep = torch.stack([vector(0.4, 0.1) for _ in range(slots)], dim=1)
    keep[:, 0, 0] = uniform(rows)
    keep[:, 0, 1:] += uniform(rows, slots - 1) * (keep[:, 0, 1:] == 0)
    p, q, b, e, d = vector(0.3, 0.1), coefficient(0.1, 0.3), vector(0.3, 0.1), vector(0.4, 0.2), vector(0.5, 0.1)
    b[:, 0] = uniform(rows)
    for slot in range(1, slots):
        if chance(0.5):
            source = slot - 1 if chance(0.6) else int(torch.randint(0, slots, (), generator=generator))
            where = torch.ones(rows, dtype=torch.bool) if chance(0.6) else torch.rand(rows, generator=generator) < 0.5
            keep[where, slot] = torch.eye(slots, dtype=torch.float64)[source]
            if chance(0.7):  # else something is added to what it takes over
                b[where, slot] = e[where, slot] = d[where, slot] = 0.0
    keep /= keep.abs().sum(dim=2, keepdim=True).clamp(min=1.0)
    p /= p.abs().sum(dim=1, keepdim=True).clamp(min=1.0)
    n = torch.eye(1, slots, dtype=torch.float64).repeat(rows, 1)
    if chance(0.6):
        n = vector(0.3, 0.2)
        n[:, 0] = uniform(rows) if chance(0.7) else 1.0
    time = torch.linspace(1, 1 / rows, rows, dtype=torch.float64)
    return StepTable(time, A=keep, n=n, p=p, q=q, b=b, e=e, d=d, clip=clip)
