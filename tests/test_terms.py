"""Which terms of a table are computed, which slots are renamed, and that leaving out the rest changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import random_table
from torch import Tensor

from fastsde import StepTable, reference
from fastsde.solvers import ABSENT, ANY, ONE, Terms

UNREAD = torch.full((4,), torch.nan, dtype=torch.float64)


def table_of(rows: int = 3, **columns: object) -> StepTable:
    """Returns a table whose rows are all the same, except for columns with a value per row."""
    shapes = {"A": 3, "n": 2, "p": 2, "b": 2, "e": 2, "d": 2, "q": 1}
    made = {}
    for name, value in columns.items():
        tensor = torch.tensor(value, dtype=torch.float64)
        made[name] = tensor if tensor.ndim == shapes[name] else tensor.expand(rows, *tensor.shape).clone()
    return StepTable(time=1 - torch.arange(rows, dtype=torch.float64) / 4, **made)


# s0' = s0 + f, s1' = s0, s2' = s1: a history of three.
HISTORY = table_of(A=[[0.5, 0.25, 1.0], [1, 0, 0], [0, 1, 0]], b=[1.0, 0, 0], n=[1.0, 0, 0])


def test_a_history_moves_on_and_slot_0_goes_where_nobody_is_left() -> None:
    terms = HISTORY.terms()
    assert terms.A == ((ANY, ANY, ONE), (ONE, ABSENT, ABSENT), (ABSENT, ONE, ABSENT))
    assert terms.b == (ONE, ABSENT, ABSENT)
    assert (terms.sources, terms.computed, terms.places) == ((None, 0, 1), (0,), (2, 0, 1))
    assert terms.read == (True, True, True)
    assert (terms.has_noise, terms.has_data, terms.has_input) == (False, False, False)


def test_what_no_later_row_reads_is_dead() -> None:
    live = [HISTORY.terms(row) for row in range(3)]
    assert [terms.computed for terms in live] == [(0,)] * 3
    # The last row needs no history, and the one before it only what the last row reads.
    assert [terms.sources for terms in live] == [(None, 0, 1), (None, 0, 1), (None, None, None)]
    data = table_of(A=[[1.0, 0], [0, 0]], e=[[0.5, 1.0], [0, 1.0], [0.0, 1.0]], p=[1.0, 0], q=[2.0] * 3)
    assert [terms.has_data for terms in map(data.terms, range(3))] == [True, False, False]  # slot 1 is never read
    assert data.terms(1).p == (ABSENT, ABSENT)
    assert data.terms(1).q == ABSENT
    assert data.terms(0).computed == (0,)


def test_a_slot_that_becomes_zero_is_written_where_it_is_read() -> None:
    # Slot 1 is f in row 0, zero in row 1, and read in row 2.
    table = table_of(A=[[1.0, 1.0], [0, 0]], b=[[0.0, 1.0], [0, 0], [0, 0]])
    assert [terms.computed for terms in map(table.terms, range(3))] == [(0, 1), (0, 1), (0,)]
    unread = table_of(A=[[1.0, 0.0], [0, 0]], b=[1.0, 0])
    assert [terms.computed for terms in (unread.terms(), unread.terms(1))] == [(0,), (0,)]


def test_slot_0_is_always_made_since_callbacks_see_it() -> None:
    table = table_of(A=[[[0.0, 0.0], [0, 1]]] * 2 + [[[0, 1.0], [0, 1.0]]], b=[[1.0, 1.0]] * 2 + [[0, 0]], n=[0, 1.0])
    assert [0 in terms.computed for terms in map(table.terms, range(3))] == [True, True, False]
    assert table.terms(2).sources == (1, None)


def test_only_the_first_of_two_takes_a_slot_over() -> None:
    terms = table_of(A=[[1.0, 0, 0], [1, 0, 0], [0, 1, 0]], n=[1.0, 0, 1]).terms()
    assert (terms.sources, terms.computed, terms.places) == ((0, None, 1), (1,), (0, 2, 1))
    swap = table_of(A=[[0.0, 1], [1, 0]]).terms()
    assert (swap.sources, swap.computed, swap.places) == ((1, 0), (), (1, 0))


def test_inputs_are_those_of_the_next_row() -> None:
    table = table_of(A=[[1.0, 0], [0, 1]], b=[0.0, 1], n=[[0.0, 1], [1, 0.5], [1, 0]])
    assert [terms.n for terms in map(table.terms, range(3))] == [(ONE, ANY), (ONE, ABSENT), (ABSENT, ABSENT)]
    assert [terms.has_input for terms in map(table.terms, range(3))] == [True, False, False]
    assert table.terms().n == (ONE, ANY)  # of all rows but the first
    assert table.terms().has_input
    with pytest.raises(ValueError, match=r"StepTable.n must not be zero in all slots, got zeros in row 1"):
        table_of(A=[[1.0, 0], [0, 1]], n=[[0.0, 1], [0, 0], [1, 0]])


def test_random_tables_have_every_kind_of_term() -> None:
    for slots in (1, 2, 3, 5, 8):
        tables = [random_table(slots, seed=seed) for seed in range(20)]
        whole, rows = [table.terms() for table in tables], [t.terms(k) for t in tables for k in range(len(t))]
        assert {kind for terms in whole for taken in terms.A for kind in taken} == {ABSENT, ONE, ANY}
        assert {terms.has_noise for terms in rows} == {terms.has_data for terms in rows} == {False, True}
        if slots > 1:
            assert {terms.has_input for terms in whole} == {False, True}
            assert any(terms.d[0] == ABSENT and terms.has_noise for terms in rows)
            assert any(sum(source is not None for source in terms.sources) >= min(2, slots - 1) for terms in whole)


# Execution ----------------------------------------------------------------------------------------------------------


def run(table: StepTable, f: Callable[[Tensor, int], Tensor], terms_of: Callable[[int], Terms]) -> list[Tensor]:
    """Returns slot 0 after each row, computed like an engine in m places and one for the input; the rest is NaN."""
    places = [torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))]
    places += [torch.zeros_like(places[0]) for _ in range(1, table.slots)]
    states, network_input = [], reference.network_input(places, table, 0)
    slots = list(range(table.slots))  # the place of each slot
    for row in range(len(table)):
        k, terms = table.row(row), terms_of(row)
        output = f(network_input, row)
        old = [places[p] if read else UNREAD for p, read in zip(slots, terms.read, strict=True)]
        data = weighted((*k.p, k.q), (*old, output), (*terms.p, terms.q)) if terms.has_data else UNREAD
        z = torch.full_like(UNREAD, row + 1.0) if terms.has_noise else UNREAD
        new = [slots[place] for place in terms.places]
        for slot, taken in enumerate(terms.sources):
            assert taken is None or new[slot] == slots[taken]
        made = {
            slot: weighted(
                (*k.A[slot], k.b[slot], k.e[slot], k.d[slot]),
                (*old, output, data, z),
                (*terms.A[slot], terms.b[slot], terms.e[slot], terms.d[slot]),
            )
            for slot in terms.computed
        }
        for slot in range(table.slots):
            if terms.sources[slot] is None:
                places[new[slot]] = made.get(slot, UNREAD)
        slots = new
        if row + 1 < len(table):
            now = [places[place] for place in slots]
            network_input = reference.network_input(now, table, row + 1) if terms.has_input else now[0]
        states.append(places[slots[0]])
    return states


def weighted(coefficients: tuple[float, ...], values: tuple[Tensor, ...], kinds: tuple[int, ...]) -> Tensor:
    """Returns the sum of the terms that are not absent; the kind of each must match its coefficient."""
    total = torch.zeros_like(UNREAD)
    for coefficient, value, kind in zip(coefficients, values, kinds, strict=True):
        if kind != ABSENT:
            assert kind == ANY or coefficient == 1
            total = total + coefficient * value
    return total


def plain(table: StepTable, f: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
    """Returns the same computed with matrices, with nothing left out."""
    s = torch.zeros(table.slots, 4, dtype=torch.float64)
    s[0] = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states = []
    for row in range(len(table)):
        output = f(table.n[row] @ s, row)
        data = table.p[row] @ s + table.q[row] * output
        given = (table.b, output), (table.e, data), (table.d, torch.full_like(UNREAD, row + 1.0))
        s = table.A[row] @ s + sum(torch.outer(column[row], value) for column, value in given)
        states.append(s[0])
    return states


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 8), st.integers(1, 7), st.integers(0, 10**6))
def test_renaming_and_leaving_out_what_is_dead_changes_nothing(slots: int, rows: int, seed: int) -> None:
    table = random_table(slots, rows, seed=seed)

    def f(x: Tensor, row: int) -> Tensor:
        return torch.sin(x + row)

    expected = plain(table, f)
    for terms_of in (table.terms, lambda row: table.terms()):  # as in an eager engine, and as in a graph
        for ours, theirs in zip(run(table, f, terms_of), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
