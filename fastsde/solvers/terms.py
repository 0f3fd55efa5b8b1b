"""Which coefficients of a table matter: zero terms cost nothing, and a slot that only moves on is renamed.

Kernels and engines specialize on the `Terms` of a table, not on its values.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

__all__ = [
    "ABSENT",
    "ANY",
    "ONE",
    "Terms",
    "kinds_of",
    "live_terms",
    "named_terms",
    "terms_of",
    "trajectory_terms_of",
]

ABSENT = 0
"""A coefficient that is known to be 0."""
ONE = 1
"""A coefficient that is known to be 1."""
ANY = 2
"""A coefficient of which nothing is known."""
Kinds = tuple[int, ...]


@dataclass(frozen=True)
class Terms:
    """What is known about the coefficients of a row, or of all rows, without their values.

    Args:
        q: ABSENT, ONE or ANY.
        n: the same, one per slot; of the next row, whose network input the step computes.
        p: the same, one per slot.
        b: the same, one per slot.
        e: the same, one per slot.
        d: the same, one per slot.
        A: one tuple per new slot, with one entry per old slot.
        live: whether each new slot is needed.
    """

    q: int
    n: Kinds
    p: Kinds
    b: Kinds
    e: Kinds
    d: Kinds
    A: tuple[Kinds, ...]
    live: tuple[bool, ...]

    @property
    def slots(self) -> int:
        """The number of slots."""
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
        """Whether the network is called next with something other than slot 0 itself."""
        return any(self.n) and self.n != (ONE, *(ABSENT,) * (self.slots - 1))

    @cached_property
    def sources(self) -> tuple[int | None, ...]:
        """For each new slot, the old slot that it takes over unchanged; None if it is computed, or not needed.

        If several slots would take over the same one, only the first does.
        """
        found: list[int | None] = []
        for slot, taken in enumerate(self.A):
            is_move = sum(taken) == ONE and not (self.b[slot] or self.e[slot] or self.d[slot])
            source = taken.index(ONE) if is_move else None
            found.append(None if source in found else source)
        return tuple(found)

    @cached_property
    def moved(self) -> tuple[tuple[int, int], ...]:
        """Pairs of a new slot and the other old slot that it takes over."""
        return tuple((slot, source) for slot, source in enumerate(self.sources) if source not in (None, slot))

    @cached_property
    def computed(self) -> tuple[int, ...]:
        """The new slots that are computed, including those that become zero."""
        given = enumerate(zip(self.sources, self.live, strict=True))
        return tuple(slot for slot, (source, is_live) in given if source is None and is_live)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """The old slot whose memory each new slot uses: the slot that it takes over, else a free one."""
        free = [slot for slot in range(self.slots) if slot not in self.sources]
        found = list(self.sources)
        for own_first in (True, False):
            for slot, place in enumerate(found):
                if place is None and (slot in free if own_first else free):
                    found[slot] = free.pop(free.index(slot) if own_first else 0)
        return tuple(place for place in found if place is not None)

    @cached_property
    def read(self) -> tuple[bool, ...]:
        """Whether each old slot is read: for D, for slot 0, for another computed slot, or for the next input."""
        formed = {0, *self.computed, *(slot for slot, kind in enumerate(self.n) if kind and self.has_input)}
        rows = [self.A[slot] for slot in formed]
        if self.has_data:
            rows.append(self.p)
        return tuple(any(row[slot] for row in rows) for slot in range(self.slots))

    def without(self, dead: Sequence[bool]) -> Terms:
        """Returns the same terms without the new slots that are dead, and without D if no other slot uses it."""
        b, e, d = (
            tuple(ABSENT if gone else kind for gone, kind in zip(dead, kinds, strict=True))
            for kinds in (self.b, self.e, self.d)
        )
        nothing = (ABSENT,) * self.slots
        A = tuple(nothing if gone else row for gone, row in zip(dead, self.A, strict=True))
        q, p = (self.q, self.p) if any(e) else (ABSENT, nothing)
        return replace(self, q=q, p=p, b=b, e=e, d=d, A=A, live=tuple(not gone for gone in dead))


def _kinds(packed: Tensor) -> Tensor:
    """Returns ABSENT, ONE or ANY for each column, over all rows."""
    is_any, is_one = (packed != 0).any(dim=0), (packed == 1).all(dim=0)
    return torch.where(is_any, torch.where(is_one, ONE, ANY), ABSENT)


@functools.cache
def named_terms(kinds: tuple[int, ...], slots: int) -> Terms:
    """Returns the kinds of the columns of `StepTable.packed` as `Terms`, by name."""
    n, p, b, e, d, *A = (kinds[2 + i * slots : 2 + (i + 1) * slots] for i in range(5 + slots))
    return Terms(kinds[1], n, p, b, e, d, tuple(A), (True,) * slots)


def kinds_of(row: Sequence[float]) -> tuple[int, ...]:
    """Returns the kinds of one row of `StepTable.packed`."""
    return tuple(ABSENT if value == 0 else ONE if value == 1 else ANY for value in row)


def _inputs(packed: Tensor, slots: int) -> Tensor:
    """Returns the rows with the n of the next row each, as computed by the step of a row; zero in the last row."""
    shifted = packed.clone()
    shifted[:-1, 2 : 2 + slots] = packed[1:, 2 : 2 + slots]
    shifted[-1, 2 : 2 + slots] = 0
    return shifted


def terms_of(packed: Tensor, slots: int) -> Terms:
    """Returns what any row of a table computes."""
    kinds = _kinds(packed)
    kinds[2 : 2 + slots] = _kinds(packed[1:, 2 : 2 + slots])  # no step computes the first input
    terms = named_terms(tuple(kinds.tolist()), slots)
    needed = zip(_read_by(terms), terms.n, strict=True)
    return terms.without([slot > 0 and not (is_read or kind) for slot, (is_read, kind) in enumerate(needed)])


def trajectory_terms_of(packed: Tensor, slots: int) -> Terms:
    """Returns `terms_of` without the new slots that no row reads, and with an n that includes the first row's.

    In the first row all slots except slot 0 are zero.
    """
    terms = terms_of(packed, slots)
    terms = replace(terms, n=(int(_kinds(packed[:, 2])), *terms.n[1:]))
    live = [True, *map(bool, terms.n[1:])]
    for _ in range(slots - 1):  # each pass adds the slots that live ones are made of
        read = _read_by(terms.without([not each for each in live]))
        live = [is_live or is_read for is_live, is_read in zip(live, read, strict=True)]
    return terms.without([not each for each in live])


def live_terms(packed: Tensor, slots: int) -> list[Terms]:
    """Returns what each row of a table computes, without what no later row reads."""
    rows = _inputs(packed, slots)
    kinds = torch.where(rows == 0, ABSENT, torch.where(rows == 1, ONE, ANY))
    kinds[:, 0] = ANY  # the time: rows must not differ by it
    patterns, which = torch.unique(kinds, dim=0, return_inverse=True)
    known = [named_terms(tuple(pattern), slots) for pattern in patterns.tolist()]
    made: dict[tuple[int, tuple[bool, ...]], Terms] = {}
    found: list[Terms] = []
    live = [False] * slots  # after the last row
    for index in reversed(which.tolist()):
        needed = [is_live or bool(kind) for is_live, kind in zip(live, known[index].n, strict=True)]
        key = (index, (False, *(not each for each in needed[1:])))  # callbacks see slot 0 after each row
        if key not in made:
            made[key] = known[index].without(key[1])
        found.append(made[key])
        live = _read_by(made[key])
    return found[::-1]


def _read_by(terms: Terms) -> list[bool]:
    """Returns which old slots a row reads or takes over."""
    rows = [*terms.A, *((terms.p,) if terms.has_data else ())]
    return [any(row[slot] for row in rows) for slot in range(terms.slots)]
