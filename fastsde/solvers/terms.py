"""Which coefficients of a table matter: what is zero costs nothing, and a slot that only moves on is renamed.

Kernels and engines make their code for the `Terms` of a table, not for its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["ABSENT", "ANY", "ONE", "Terms", "live_terms", "terms_of", "trajectory_terms_of"]

ABSENT, ONE, ANY = 0, 1, 2  # what a coefficient is known to be: 0, 1, or nothing in particular
Kinds = tuple[int, ...]


@dataclass(frozen=True)
class Terms:
    """What is known of a row's coefficients, or of those of all rows, before their values are.

    Args:
        q: ABSENT, ONE or ANY.
        n, p, b, e, d: the same, one a slot. ``n`` is that of the next row's network call, whose input the step computes.
        A: for each new slot a tuple, one an old slot.
    """

    q: int
    n: Kinds
    p: Kinds
    b: Kinds
    e: Kinds
    d: Kinds
    A: tuple[Kinds, ...]

    @property
    def slots(self) -> int:
        return len(self.n)

    @cached_property
    def columns(self) -> Kinds:
        """The kinds of all columns of `StepTable.packed`."""
        return (ANY, self.q, *self.n, *self.p, *self.b, *self.e, *self.d, *(kind for row in self.A for kind in row))

    @cached_property
    def has_noise(self) -> bool:
        """Whether a slot takes noise."""
        return any(self.d)

    @cached_property
    def has_data(self) -> bool:
        """Whether a slot takes D."""
        return any(self.e)

    @cached_property
    def has_input(self) -> bool:
        """Whether the network is called next with something else than slot 0 itself."""
        return any(self.n) and self.n != (ONE, *(ABSENT,) * (self.slots - 1))

    @cached_property
    def sources(self) -> tuple[int | None, ...]:
        """Of each new slot, the old one that it takes over as it is; None where it is computed, or not needed.

        Of several slots that would take over the same one, only the first does.
        """
        found: list[int | None] = []
        for slot, taken in enumerate(self.A):
            is_move = sum(taken) == ONE and not (self.b[slot] or self.e[slot] or self.d[slot])
            source = taken.index(ONE) if is_move else None
            found.append(None if source in found else source)
        return tuple(found)

    @cached_property
    def computed(self) -> tuple[int, ...]:
        """The new slots that are computed."""
        given = enumerate(zip(self.A, self.b, self.e, self.d, self.sources, strict=True))
        return tuple(slot for slot, (taken, *rest, source) in given if source is None and (any(taken) or any(rest)))

    @cached_property
    def read(self) -> tuple[bool, ...]:
        """Whether each old slot is read: for D, for slot 0, which is looked at, for another that is computed, or for the
        network's next input.
        """
        formed = {0, *self.computed, *(slot for slot, kind in enumerate(self.n) if kind and self.has_input)}
        rows = [self.A[slot] for slot in formed]
        if self.has_data:
            rows.append(self.p)
        return tuple(any(row[slot] for row in rows) for slot in range(self.slots))

    def without(self, dead: Sequence[bool]) -> Terms:
        """The same less the new slots that are dead, and D where no other has a use for it."""
        b, e, d = (
            tuple(ABSENT if gone else kind for gone, kind in zip(dead, kinds, strict=True))
            for kinds in (self.b, self.e, self.d)
        )
        nothing = (ABSENT,) * self.slots
        A = tuple(nothing if gone else row for gone, row in zip(dead, self.A, strict=True))
        q, p = (self.q, self.p) if any(e) else (ABSENT, nothing)
        return replace(self, q=q, p=p, b=b, e=e, d=d, A=A)


def _kinds(packed: Tensor) -> Tensor:
    """ABSENT, ONE or ANY of each column: of all rows together."""
    is_any, is_one = (packed != 0).any(dim=0), (packed == 1).all(dim=0)
    return torch.where(is_any, torch.where(is_one, ONE, ANY), ABSENT)


def _terms(kinds: list[int], slots: int) -> Terms:
    """The kinds of `StepTable.packed` by their names."""
    vectors = [tuple(kinds[2 + i * slots : 2 + (i + 1) * slots]) for i in range(5 + slots)]
    return Terms(kinds[1], *vectors[:5], tuple(vectors[5:]))


def _inputs(packed: Tensor, slots: int) -> Tensor:
    """The rows with the n of the next row each, which the step of a row computes; zero in the last."""
    shifted = packed.clone()
    shifted[:-1, 2 : 2 + slots] = packed[1:, 2 : 2 + slots]
    shifted[-1, 2 : 2 + slots] = 0
    return shifted


def terms_of(packed: Tensor, slots: int) -> Terms:
    """What any row of a table computes."""
    kinds = _kinds(packed)
    kinds[2 : 2 + slots] = _kinds(packed[1:, 2 : 2 + slots])  # no step computes the first input
    return _terms(kinds.tolist(), slots).without([False] * slots)


def trajectory_terms_of(packed: Tensor, slots: int) -> Terms:
    """`terms_of`, less the new slots that no row reads, where n is that of the first row, too.

    In that row all slots but slot 0 are zero.
    """
    terms = terms_of(packed, slots)
    terms = replace(terms, n=(int(_kinds(packed[:, 2])), *terms.n[1:]))
    live = [True, *map(bool, terms.n[1:])]
    for _ in range(slots - 1):  # each time those that the live ones are made of
        read = _read_by(terms.without([not each for each in live]))
        live = [is_live or is_read for is_live, is_read in zip(live, read, strict=True)]
    return terms.without([not each for each in live])


def live_terms(packed: Tensor, slots: int) -> list[Terms]:
    """What each row of a table computes, less what no later row reads."""
    rows = _inputs(packed, slots)
    kinds = torch.where(rows == 0, ABSENT, torch.where(rows == 1, ONE, ANY))
    kinds[:, 0] = ANY  # the time, by which no two rows are to differ
    patterns, which = torch.unique(kinds, dim=0, return_inverse=True)
    known = [_terms(pattern, slots) for pattern in patterns.tolist()]
    made: dict[tuple[int, tuple[bool, ...]], Terms] = {}
    found: list[Terms] = []
    live = [True] + [False] * (slots - 1)  # after the last row
    for index in reversed(which.tolist()):
        needed = [is_live or bool(kind) for is_live, kind in zip(live, known[index].n, strict=True)]
        key = (index, tuple(not each for each in needed))
        if key not in made:
            made[key] = known[index].without(key[1])
        found.append(made[key])
        live = _read_by(made[key])
    return found[::-1]


def _read_by(terms: Terms) -> list[bool]:
    """Which old slots a row reads or takes over."""
    rows = [*terms.A, *((terms.p,) if terms.has_data else ())]
    return [any(row[slot] for row in rows) for slot in range(terms.slots)]
