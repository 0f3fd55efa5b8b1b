"""RePaint's table: its rows against the paper's schedule, and its law against algorithm 1 written plainly."""

from __future__ import annotations

import itertools

import pytest
import torch
from gaussian_laws import Law, prior, row_of, with_known
from torch import Tensor

from fastsde import EDM, VPSDE, Sampler, StepTable, solvers
from fastsde.sde import PROCESSES, Process

SDE = VPSDE()
ONE_SLOT = ("euler_maruyama", "exponential_euler_maruyama", "ddpm", "ddim", "euler_ancestral")


def paper_times(rows: int, jump: int, resamples: int) -> list[int]:
    """The times of the paper's schedule of jumps, which count the rows that are left, less one.

    Each is one less than the one before, a denoising, or one more, a noising.
    """
    jumps = dict.fromkeys(range(0, rows - jump, jump), resamples - 1)
    times, t = [], rows
    while t >= 1:
        t -= 1
        times.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            times += range(t + 1, t + jump + 1)
            t += jump
    return [*times, -1]


def rows_of(table: StepTable, base: StepTable) -> list[int]:
    return [int((base.time == t).nonzero()) for t in table.time]


@pytest.mark.parametrize(("rows", "jump", "resamples"), [(250, 10, 10), (7, 1, 3), (11, 4, 2), (5, 4, 2), (8, 2, 1)])
def test_rows_run_in_the_order_of_the_paper(rows: int, jump: int, resamples: int) -> None:
    base = solvers.build("ddpm", SDE, rows, prediction="eps")
    table = solvers.build("ddpm", SDE, rows, prediction="eps", resamples=resamples, jump=jump)
    times = paper_times(rows, jump, resamples)
    assert rows_of(table, base) == [rows - 1 - t for t, after in itertools.pairwise(times) if after < t]
    assert len(table) == rows + (resamples - 1) * jump * (-(-rows // jump) - 1)
    if (rows, jump, resamples) == (250, 10, 10):
        assert len(times) - 1 == 4570  # the moves that the paper counts


def algorithm_1(base: StepTable, sde: Process, law: Law, mask: Tensor, known: Tensor, jump: int, r: int) -> Law:
    """The law of algorithm 1: denoise, put the known values in, and noise one step at a time on the way up."""
    rows, state = len(base), prior(len(known))
    levels = [(float(sde.alpha(t)), float(sde.sigma(t))) for t in base.time] + [(1.0, 0.0)]
    times = paper_times(rows, jump, r)
    for t, after in itertools.pairwise(times):
        here, there = rows - 1 - t, rows - 1 - after
        if after < t:
            state = with_known(row_of(base, here, law, state, sde), mask, known, *levels[there])
        else:
            a = levels[there][0] / levels[here][0]
            added = levels[there][1] ** 2 - a**2 * levels[here][1] ** 2
            state = Law(a * state.mean, a**2 * state.cov + added * torch.eye(len(known)).double())
    return state


def table_law(table: StepTable, sde: Process, law: Law, mask: Tensor, known: Tensor) -> Law:
    state = prior(len(known))
    for row in range(len(table)):
        t = float(table.time[row + 1]) if row + 1 < len(table) else 0.0
        level = (float(sde.alpha(t)), float(sde.sigma(t))) if t else (1.0, 0.0)
        state = with_known(row_of(table, row, law, state, sde), mask, known, *level)
    return state


CORRELATED = Law(
    torch.tensor([0.5, -1.0, 0.25]).double(),
    torch.tensor([[1.0, 0.8, 0.3], [0.8, 1.0, 0.5], [0.3, 0.5, 0.6]]).double(),
)
MASK, KNOWN = torch.tensor([True, False, False]), torch.tensor([1.5, 0.0, 0.0]).double()


@pytest.mark.parametrize("solver", ONE_SLOT)
def test_the_law_is_that_of_algorithm_1(solver: str) -> None:
    base = solvers.build(solver, SDE, 24)
    table = solvers.build(solver, SDE, 24, resamples=3, jump=5)
    expected = algorithm_1(base, SDE, CORRELATED, MASK, KNOWN, 5, 3)
    state = table_law(table, SDE, CORRELATED, MASK, KNOWN)
    torch.testing.assert_close(state.mean, expected.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(state.cov, expected.cov, rtol=0, atol=1e-10)


def test_resampling_comes_closer_to_the_conditional_law() -> None:
    exact = CORRELATED.given(torch.eye(3).double()[:1], KNOWN[:1], 0.0)
    errors = []
    for resamples in (1, 3, 10):
        table = solvers.build("euler_maruyama", SDE, 40, resamples=resamples, jump=4)
        state = table_law(table, SDE, CORRELATED, MASK, KNOWN)
        errors.append((float((state.mean - exact.mean).norm()), float((state.cov - exact.cov).norm())))
    for fewer, more in itertools.pairwise(errors):
        assert more[0] < 0.6 * fewer[0], errors
        assert more[1] < 0.75 * fewer[1], errors


@pytest.mark.parametrize("sde", [each() for each in PROCESSES.values()], ids=lambda sde: sde.name)
def test_every_process_goes_up_by_its_own_forward_process(sde: Process) -> None:
    prediction = "v"
    base = solvers.build("ddim", sde, 12, prediction=prediction)
    table = solvers.build("ddim", sde, 12, prediction=prediction, resamples=2, jump=3)
    rows = rows_of(table, base)
    for i, row in enumerate(rows[:-1]):
        scale, added = 1.0, 0.0
        if rows[i + 1] <= row:
            low, high = base.time[row + 1], base.time[rows[i + 1]]
            scale = float(sde.alpha(high) / sde.alpha(low))
            added = float(sde.sigma(high) ** 2 - scale**2 * sde.sigma(low) ** 2)
        assert table.row(i).A[0][0] == pytest.approx(scale * base.row(row).A[0][0], rel=1e-12)
        assert table.row(i).b[0] == pytest.approx(scale * base.row(row).b[0], rel=1e-12)
        assert table.row(i).d[0] ** 2 == pytest.approx(added, rel=1e-9, abs=1e-15)


def test_clipped_rows_and_a_final_denoising_stay() -> None:
    options = {"prediction": "eps", "clip": 1.0, "denoise": True}
    base = solvers.build("ddpm", SDE, 9, **options)
    table = solvers.build("ddpm", SDE, 9, **options, resamples=2, jump=2)
    assert table.clip == 1.0
    assert table.row(len(table) - 1) == base.row(8)
    up = table.row(1)  # row 1, and back to before row 0
    a = float(SDE.alpha(base.time[0]) / SDE.alpha(base.time[2]))
    assert up.e[0] == pytest.approx(a * base.row(1).e[0])
    assert (up.p, up.q) == (base.row(1).p, base.row(1).q)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"solver": "heun", "steps": 5, "resamples": 2, "jump": 2},
            r"rows without history and Langevin steps, not heun: .*ddpm",
        ),
        ({"resamples": 2, "steps": 10}, "jump must be less than the number of rows, 10, got 10"),
        ({"resamples": 0}, "resamples must be at least 1, got 0"),
        ({"resamples": 2, "jump": 0}, "jump must be at least 1, got 0"),
        ({"resamples": 2, "solver": solvers.build("ddim", SDE, 30)}, "resamples is part of the StepTable"),
    ],
)
def test_bad_resampling_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(lambda x, t: -x, (2,), **arguments)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_solvers_named_for_resampling_are_those_that_work() -> None:
    for solver in solvers.SOLVERS:
        if solver in ONE_SLOT:
            assert len(solvers.build(solver, SDE, 11, prediction="eps", resamples=2, jump=5)) == 21
        else:
            with pytest.raises(ValueError, match=", ".join(sorted(ONE_SLOT, key=list(solvers.SOLVERS).index)[:1])):
                solvers.build(solver, EDM(), 11, prediction="x0", resamples=2, jump=5)
