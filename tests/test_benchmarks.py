"""The suite: wrong providers get no time, slow ones are shown as slow, and every provider passes its check."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from fastsde import VPSDE, checkpoints, data, ops
from fastsde import noise as contract
from fastsde.benchmarks import architectures, dsm_loss, loops, noise, perturb, solver_step
from fastsde.benchmarks.providers import compiled, lean, ours, sampling, tutorial
from fastsde.benchmarks.suite import budget, measure, progress, run, runner, table
from fastsde.benchmarks.suite import case as cases
from fastsde.benchmarks.suite.case import Case, Provider, Target
from fastsde.benchmarks.suite.machine import Ceilings, Work
from fastsde.benchmarks.suite.plan import Plan
from fastsde.benchmarks.suite.replay import Replay
from fastsde.benchmarks.tasks import elements, loop, trajectory
from fastsde.benchmarks.tasks.loop import tensor_of
from fastsde.benchmarks.tasks.networks import mlp_work, unet_work
from fastsde.benchmarks.tasks.recipe import Recipe
from fastsde.benchmarks.tasks.trajectory import Score, Trajectory, proof
from fastsde.checkpoints import Checkpoint
from fastsde.cli import main
from fastsde.networks import NETWORKS
from fastsde.training import tutorial_config

CPU = torch.device("cpu")
QUICK, TINY = Plan(CPU, quick=True), Plan(CPU, quick=True, tiny=True)
CASES = run.cases(TINY)
MOST = Ceilings("cpu", bytes=1e10, flop={"fp32": 1e11, "bf16": 2e11}, specials=1e10)


def provider(name: str, call: Callable[[], object] = lambda: 1.0, error: float = 0.0, **options: object) -> Provider:
    return Provider(name, lambda: call, lambda run, result: cases.check("it", error, 1.0), **options)  # type: ignore[arg-type]


def run_case(*providers: Provider, **options: object) -> table.Figures:
    about = {"n": 4, "rows": 2}
    case = Case("subject", "case", "a task", about, providers, **{"rounds": 5, **options})  # type: ignore[arg-type]
    return runner.run_case(case, CPU, MOST).record


# What is shown ------------------------------------------------------------------------------------------------------


def test_a_slowed_provider_is_shown_as_slower_and_a_faster_one_as_faster() -> None:
    record = run_case(
        provider(cases.LOOP, lambda: time.sleep(0.004)),
        provider("slowed", lambda: time.sleep(0.012)),
        provider("fastsde", lambda: time.sleep(0.001)),
    )
    lines = {line.split("   ")[0].strip(): line for line in table.show(record)}
    assert "slower, 0.3" in lines["slowed"]
    assert "slower" not in lines["fastsde"]
    assert record["providers"]["slowed"]["median_s"] >= 0.012
    assert f"{cases.LOOP}, again" in lines
    (row,) = table.headlines(record)
    assert (row.ours, row.other) == ("fastsde", "slowed")
    titles, cells = table.overview([record])
    assert titles.startswith("task")
    assert 2 < float(cells.split("x  ")[0].split()[-1]) < 5  # relative to the loop's speed


def test_a_wrong_provider_has_no_time_and_is_shown_as_wrong() -> None:
    calls = itertools.count()
    record = run_case(
        provider(cases.LOOP),
        provider("fastsde wrong", lambda: next(calls), error=2.0),
        provider("nan", error=torch.nan),
    )
    for name in ("fastsde wrong", "nan"):
        assert set(record["providers"][name]) == {"wrong"}
        (line,) = (line for line in table.show(record) if name in line)
        assert "WRONG: it is off by" in line
    assert next(calls) == 3  # to warm up and be checked, but not timed
    assert not table.headlines(record)


def test_a_wrong_kernel_is_caught_by_the_proof_of_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that leaves its output unwritten, and wrong noise."""
    if not ops.has_native(CPU):
        pytest.skip("no C++ compiler")
    (case,) = run.cases(QUICK, ["solver_step"])
    module = ops.dispatch.kernel("solver_step", CPU)
    right = module.solver_step
    for wrong in (
        lambda slots, f, table, row, **options: right(slots, f, table, row - 1, **options),
        lambda slots, f, table, row, **options: None,
        lambda slots, f, table, row, **options: right(slots, f, table, row, **options | {"keys": options["keys"] + 1}),
    ):
        monkeypatch.setattr(module, "solver_step", wrong)
        (own,) = (each for each in case.providers if each.name == "fastsde native")
        record = runner.run_case(replace(case, providers=[own], rounds=1), CPU, MOST).record
        assert "wrong" in record["providers"]["fastsde native"], wrong


def test_one_provider_that_fails_leaves_the_others_their_times() -> None:
    def cannot() -> measure.Run:
        raise cases.UnavailableError("there is no such thing here")

    record = run_case(
        provider(cases.LOOP),
        provider("failed", lambda: 1 // 0),
        Provider("cannot", cannot, lambda run, result: {}),
        provider("for a long run", compiles=True),
    )
    timed = {name for name, each in record["providers"].items() if "median_s" in each}
    assert timed == {cases.LOOP, f"{cases.LOOP}, again", "for a long run"}
    lines = "\n".join(table.show(record))
    assert "FAILED: ZeroDivisionError" in lines
    assert "unavailable: there is no such thing here" in lines


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still until a test advances it."""
    now = [0.0]
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: now[0])
    return now


def test_where_the_time_is_short_providers_rounds_and_whole_cases_are_left_out(clock: list[float]) -> None:
    def call() -> None:
        clock[0] += 0.1

    names = (cases.LOOP, "compiled", "another", "fastsde")
    case = Case("subject", "case", "a task", {}, [provider(name, call, compiles=name == "compiled") for name in names])
    # Three calls each to warm up, then rounds of 0.4 s; there is no time for the fourth provider and three rounds.
    said: list[str] = []
    record = runner.run_case(case, CPU, MOST, budget.Ends(2.15, 2.15), said.append).record
    order = [f"{cases.LOOP}, 1 of 4", "fastsde, 2 of 4", "another, 3 of 4", "compiled, 4 of 4"]
    assert said == [*order, *(f"round {number} of 10" for number in (1, 2, 3))]
    assert clock[0] == pytest.approx(2.1)
    figures = record["providers"]
    assert tuple(figures) == (*names, cases.LOOP + cases.AGAIN)  # still in the order of the table
    assert figures["compiled"] == {"unavailable": cases.SPENT}
    assert {figures[name]["rounds"] for name in (cases.LOOP, "another", "fastsde")} == {3}
    assert record["cut"]
    assert any("cut by the time limit: at most 3 rounds" in line and "--minutes" in line for line in table.show(record))
    # If not even one round of the baseline fits, the case is reported; if nothing fits, it is not started.
    soon = clock[0] + 0.3
    late = runner.run_case(case, CPU, MOST, budget.Ends(soon, soon)).record
    assert late["failed"].startswith(f"{cases.LEFT_OUT}the providers that it needs take at least")
    (unbegun,) = run.outcomes([case], QUICK, MOST, ends=clock[0] - 1)
    assert unbegun.record["failed"].startswith(f"{cases.LEFT_OUT}it takes")
    assert f"  {unbegun.record['failed']}" in table.show(unbegun.record)
    assert not table.headlines(unbegun.record)
    assert not list(run._wrong(unbegun.record))


def test_a_first_call_that_compiled_kernels_is_not_taken_for_a_run(clock: list[float]) -> None:
    calls = itertools.count()

    def compiles_once() -> None:
        clock[0] += 5.0 if next(calls) == 0 else 0.1

    providers = [provider(cases.LOOP, lambda: clock.__setitem__(0, clock[0] + 0.1)), provider("fastsde", compiles_once)]
    case = Case("subject", "case", "a task", {}, providers)
    record = runner.run_case(case, CPU, MOST, budget.Ends(6.4, 6.4)).record  # after 5.4 s, three rounds fit
    assert {each["rounds"] for each in record["providers"].values()} == {3}


def test_a_case_gets_what_it_needs_even_late_or_is_left_out_as_a_whole(clock: list[float]) -> None:
    def call() -> None:
        clock[0] += 0.1

    needed = cases.Rank.NEEDED
    providers = [
        provider(cases.LOOP, call),
        provider(cases.LEAN, call, rank=needed),
        provider("fastsde reference", call, rank=cases.Rank.LAST),
        provider("fastsde eager", call),
        provider("fastsde", call, rank=needed),
        provider("diffusers", call),
        provider("fastsde compiled", call, rank=needed, compiles=True),
    ]
    case = Case("subject", "case", "a task", {}, providers)
    names = [cases.LOOP, "fastsde", cases.LEAN, "fastsde eager", "diffusers", "fastsde reference", "fastsde compiled"]
    assert [each.name for each in case.in_order] == names
    record = runner.run_case(case, CPU, MOST, budget.Ends(due=0.3, latest=5.0)).record
    rounds = {name: each.get("rounds") for name, each in record["providers"].items()}
    assert rounds == {**dict.fromkeys([*names[:3], f"{cases.LOOP}, again"], 3), **dict.fromkeys(names[3:])}
    # After the baseline it is known that the others cannot be finished.
    clock[0] = 0.0
    record = runner.run_case(case, CPU, MOST, budget.Ends(due=0.8, latest=0.8)).record
    assert clock[0] < 0.5
    assert record["failed"].startswith(f"{cases.LEFT_OUT}the providers that it needs take at least another 0.6 s")
    # One of them turns out to be slower, so that not even a round fits.
    clock[0] = 0.0
    slow = provider("fastsde", lambda: clock.__setitem__(0, clock[0] + 1.0), rank=needed)
    record = runner.run_case(replace(case, providers=[providers[0], slow]), CPU, MOST, budget.Ends(3.0, 3.0)).record
    assert record["failed"].startswith(f"{cases.LEFT_OUT}a round takes 1.2 s")


def test_every_case_gets_its_first_stage_before_any_gets_its_second() -> None:
    stages = [(10.0, 30.0, 90.0), (5.0, 10.0, 20.0), (50.0, 60.0, 70.0), (0.0, 4.0, 8.0), (1.0, 2.0, 3.0)]
    assert budget.shares(stages, 16.0, 40.0) == [10.0, 5.0, 0.0, 0.0, 1.0]
    assert budget.shares(stages, 30.0, 40.0) == [24.0, 5.0, 0.0, 0.0, 1.0]
    assert budget.shares(stages, 48.0, 40.0) == [32.0, 10.0, 0.0, 4.0, 2.0]
    assert budget.shares(stages, 1000.0, 40.0) == [40.0, 20.0, 0.0, 8.0, 3.0]  # no more than 40 s each
    assert budget.shares(stages, torch.inf, torch.inf) == [90.0, 20.0, 70.0, 8.0, 3.0]


def test_a_case_that_does_not_fit_waits_and_follows_if_time_remains(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    expected = {
        "a": (10.0, 20.0, 40.0),
        "b": (60.0, 70.0, 80.0),
        "c": (10.0, 30.0, 30.0),
        "d": (99.0,) * 3,
        "e": (1.0,) * 3,
    }
    monkeypatch.setattr(budget, "_stages", lambda case, ceilings: expected[case.name])
    chosen = [Case("subject", name, "a task", {}, []) for name in "abcde"]
    found = {}
    for case, ends in budget.schedule(chosen, MOST, 100.0):
        found[case.name] = ends and (round(ends.due - clock[0]), round(ends.latest - clock[0]))
        clock[0] += 5.0
    # At most a quarter each, until only cases are left that need more; b gets half of the time that it does not need.
    assert found == {"a": (25, 25), "c": (25, 25), "e": (25, 25), "b": (72, 85), "d": None}
    assert list(found) == ["a", "c", "e", "b", "d"]
    assert list(budget.schedule(chosen[:1], MOST, clock[0] + 12.0)) == [(chosen[0], (clock[0] + 12.0,) * 2)]
    assert [ends for _, ends in budget.schedule(chosen, MOST, torch.inf)] == [budget.UNLIMITED] * 5


def test_what_a_case_is_expected_to_take_grows_with_its_work_its_rounds_and_what_compiles() -> None:
    case = Case("subject", "case", "a task", {}, [provider(cases.LOOP)], work=Work(flop=1e11), rounds=5)
    plain, fewer, nothing = (
        budget.expected_s(each, MOST) for each in (case, replace(case, rounds=2), replace(case, work=Work()))
    )
    assert plain > fewer > nothing
    assert budget.needed_s(case, MOST) == pytest.approx(0.5 + 10 * 3.0)  # four calls, and two in each of three rounds
    more = replace(case, providers=[provider(cases.LOOP), provider("diffusers"), provider("fastsde", compiles=True)])
    assert budget.needed_s(more, MOST) == budget.needed_s(case, MOST)
    assert budget.expected_s(more, MOST) > budget.expected_s(replace(more, providers=more.providers[:2]), MOST) > plain
    processes = replace(case, work=Work(), run_s=4.0)
    assert budget.expected_s(processes, MOST) > 6 * 4.0
    assert budget._stages(processes, MOST)[0] == 0.0  # they wait for the second stage of the others
    gpu, rows = replace(MOST, kind="cuda"), replace(case, work=Work(), network_calls=1000)
    assert budget.expected_s(rows, gpu) > budget.expected_s(rows, MOST) + 5.0  # its host launches every operation


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_line_that_is_rewritten_or_one_a_case(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    shown = progress.Progress(2, 100.0)
    for name in ("first", "second"):
        shown.begin(name)
        shown.say("torch.compile, 3 of 4")
        shown.say("round 1 of 5")
        shown.end()
    err = capsys.readouterr().err
    assert ("\r" in err) == terminal
    assert "[2/2, 0:00 of about 1:40] second" in err
    assert err.count("\n") == (0 if terminal else 2)
    assert ("[1/2, 0:00 of about 1:40] first: torch.compile, 3 of 4" in err) == terminal


def test_only_what_is_wrong_or_of_fastsde_makes_a_run_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(*providers: Provider) -> int:
        case = Case("subject", "case", "a task", {}, providers, rounds=1)
        monkeypatch.setattr(run, "ceilings", lambda device: MOST)
        monkeypatch.setattr(run, "cases", lambda plan, subjects: [case])
        return CliRunner().invoke(main, ["bench", "--quick"]).exit_code

    def fails() -> None:
        raise RuntimeError

    assert shown(provider(cases.LOOP), provider("fastsde")) == 0
    assert shown(provider(cases.LOOP), provider("diffusers", fails)) == 0
    assert shown(provider(cases.LOOP), provider("fastsde", fails)) == 1
    assert shown(provider(cases.LOOP), provider("diffusers", error=2.0)) == 1


def test_targets_are_met_not_met_or_not_measured() -> None:
    times = {"loop": 2.0, "loop 2": 1.9, "ours": 0.3}
    figures = {name: {"median_s": median} for name, median in times.items()}
    faster = Target("it", ("ours", "missing"), beside=("loop", "loop 2"), at_least=6.0)
    judged = faster.judge(figures)
    assert judged["met"]
    assert judged["value"] == pytest.approx(1.9 / 0.3)  # of the fastest of each
    assert not replace(faster, at_least=7.0).judge(figures)["met"]
    assert Target("it", ("ours",), at_most_s=0.2).judge(figures)["met"] is False
    assert Target("it", ("missing",), at_most_s=0.2).judge(figures)["met"] is None
    lines = table.show({**run_case(provider(cases.LOOP)), "targets": [Target("it", ("ours",), 0.2).judge(figures)]})
    assert "  target NOT met: it: 0.3" in lines


@pytest.mark.parametrize(
    ("value", "text"), [(0.0034, "0.0034x"), (0.38, "0.38x"), (2.0, "2.00x"), (12.4, "12x"), (1234.0, "1,234x")]
)
def test_ratios_have_two_or_three_digits(value: float, text: str) -> None:
    assert table.ratio(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(3.4e-6, "3.4 us"), (0.0123, "12.3 ms"), (12.61, "12.6 s"), (1234, "1,234 s")]
)
def test_durations_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert table.duration(value) == text


# Method -------------------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_what_is_slow_takes_part_in_three() -> None:
    calls: list[str] = []

    def call(name: str) -> None:
        calls.append(name)
        time.sleep(0.01 * (name == "slow"))

    providers = {name: lambda name=name: call(name) for name in ("slow", "fast")}
    times, failures = measure.measure(providers, lambda run: measure.seconds(run, CPU), rounds=8, enough=0.02)
    assert calls == ["slow", "fast", "fast", "slow", "slow", "fast"] + ["fast"] * 5  # the first one alternates
    assert not failures
    assert {name: len(each) for name, each in times.items()} == {"slow": 3, "fast": 8}


def test_the_summary_is_of_the_rounds() -> None:
    summary = measure.summary([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0])
    assert summary == {"median_s": 6.0, "p20_s": 3.0, "p80_s": 9.0, "rounds": 11}
    assert measure.summary([2.0])["p20_s"] == 2.0


def test_inputs_are_rotated() -> None:
    seen: list[int] = []
    turn = measure.Rotated(seen.append, [1, 2, 3])
    for _ in range(4):
        turn()
        assert turn.last == seen[-1]
    assert seen == [1, 2, 3, 1]


def test_a_limit_is_set_by_the_slowest_unit() -> None:
    work = Work(bytes=1e9, flop=1e9, specials=1e8)
    assert MOST.limit(work, "fp32") == {"limit_s": 0.1, "limited_by": "memory"}
    arithmetic = replace(work, flop=1e11)
    assert MOST.limit(arithmetic, "fp32")["limit_s"] == pytest.approx(1.01)  # a CPU's special functions are arithmetic
    assert MOST.limit(arithmetic, "bf16")["limit_s"] == pytest.approx(0.51)
    gpu = replace(MOST, kind="cuda", launch=1e-6, clock=1e9)
    assert gpu.limit(arithmetic, "fp32")["limit_s"] == pytest.approx(1.0)  # and a GPU has a separate unit for them
    assert gpu.limit(replace(work, specials=1e10), "fp32")["limited_by"] == "special functions"
    assert gpu.limit(replace(work, launches=1e6), "TF32") == {"limit_s": 1.0, "limited_by": "launches"}
    assert gpu.limit(replace(work, clocks=5e9), "TF32") == {"limit_s": 5.0, "limited_by": "latency"}


def test_the_least_arithmetic_of_the_tutorials_networks() -> None:
    """Compares with figures calculated by hand, without padding (design, facts)."""
    assert unet_work() == (93_213_440, 2 * 122_112)
    assert mlp_work() == (2 * (3 * 64 + 2 * 64 * 64 + 64 * 2), 2 * 192)


@pytest.mark.parametrize("of", ["score", "eps"])
@pytest.mark.parametrize("prediction", ["score", "eps", "v"])
def test_a_network_of_any_kind_becomes_one_that_predicts_what_a_loop_wants(prediction: str, of: str) -> None:
    sde, rows = VPSDE(), 5
    x_0, z = torch.randn(2, 3, 4).unbind()
    times = torch.linspace(1, 0, rows + 1, dtype=torch.float64)[:-1]

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        return {"score": -z / sigma, "eps": z, "v": alpha * z - sigma * x_0}[prediction]

    made = Score(network, Checkpoint(torch.nn.Identity(), sde, prediction), times, of)
    for now in times.float().repeat(2):  # a second trajectory follows the first
        x = sde.alpha(now) * x_0 + sde.sigma(now) * z
        expected = z if of == "eps" else -z / sde.sigma(now)
        torch.testing.assert_close(made(x, now.expand(3)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["noise", "drift", "times", "shape", "nan"])
@pytest.mark.parametrize("model", ["swiss-roll", "mnist"])
def test_a_wrong_loop_is_found_out(monkeypatch: pytest.MonkeyPatch, model: str, wrong: str) -> None:
    """A percent of its noise or its drift is enough, or times that are off by one row."""
    shape, n = ((2,), 30) if model == "swiss-roll" else ((1, 28, 28), 2)
    task = Trajectory(partial(checkpoints.load, model), shape, n, 20, CPU, 0, 0)
    shows, right = proof(task), tutorial.step
    own = tutorial.sampling(task, "fp32")
    assert shows.given_noise("fp32", own, own())["error"] > 0

    def step(x: torch.Tensor, score: torch.Tensor, beta: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        if wrong == "noise":
            return right(x, score, beta, size) + 0.01 * (beta * size).sqrt() * torch.randn(x.shape)
        changed = {"drift": (x, 1.01 * score), "shape": (x[:-1], score[:-1]), "nan": (x, score * torch.nan)}
        return right(*changed.get(wrong, (x, score)), beta + 0.1 * (wrong == "times"), size)

    monkeypatch.setattr(tutorial, "step", step)
    with pytest.raises((cases.WrongError, RuntimeError)):  # a smaller batch may fail by itself
        shows.given_noise("fp32", own, own())


def test_a_loop_is_given_the_noise_of_the_contract_several_draws_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory, "_DRAWN", 2 * 3 * 4)
    keys = contract.sample_keys(1, 3)
    with trajectory.ContractNoise(keys, 5):
        draws = [torch.randn(3, 4), *(torch.randn_like(torch.empty(3, 2, 2)) for _ in range(4))]
        with pytest.raises(cases.WrongError, match="more often than once per row"):
            torch.randn(3, 4)
    for row, z in enumerate(draws):
        assert torch.equal(z.flatten(1), contract.normal(keys, row, (4,)))


def test_convolutions_are_those_of_aten_while_a_step_for_a_gpu_compiles_and_only_then() -> None:
    config, seen = torch._inductor.config, []

    def backends() -> dict[str, str]:
        found = config.get_config_copy().items()
        return {name: value for name, value in found if re.fullmatch("max_autotune_conv.*backends", name)}

    def look(graph: object) -> None:
        seen.append(backends())
        raise InterruptedError("seen enough")

    fast = compiled.compiled(torch.nn.Conv2d(1, 1, 3), torch.device("cuda"), graph=True)
    with config.patch(max_autotune_conv_backends="ATEN,TRITON", post_grad_custom_pre_pass=look):
        before = backends()
        with pytest.raises(Exception, match="seen enough"):
            fast(torch.zeros(1, 1, 5, 5))
        assert seen == [dict.fromkeys(before, "ATEN")]
        assert backends() == before


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["a", "b", "c", "d"])
def test_a_wrong_compiled_step_is_found_out(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """One wrong coefficient is enough."""
    monkeypatch.setattr(compiled, "compiled", lambda function, device, graph: function)
    solver = "dpm_solver_pp_2m" if wrong == "c" else "euler_maruyama"
    task = Trajectory(partial(checkpoints.load, "mnist"), (1, 28, 28), 10, 20, CPU, 0, 0, solver=solver)
    step = compiled.Step(task, "fp32")
    step.prove()
    m = task.table.slots  # a row is time, q, then n, p, b, e and d of m numbers, then A
    column = {"a": 2 + 5 * m, "b": 2 + 2 * m, "c": 2 + 5 * m + 1, "d": 2 + 4 * m}[wrong]
    right = step._step

    def changed(slots: list[torch.Tensor], row: torch.Tensor) -> list[torch.Tensor]:
        row = row.clone()
        row[column] *= 1.1
        return right(slots, row)

    step._fast = changed
    with pytest.raises(cases.WrongError):
        step.prove()


@pytest.mark.parametrize("name", ["diffusers DDPM", "torchsde sdeint"])
def test_loops_with_steps_of_their_own_are_proved_number_for_number(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    package = pytest.importorskip(name.split()[0])
    task = Trajectory(partial(checkpoints.load, "swiss-roll"), (2,), 30, 50, CPU, 0, 0)
    (own,) = (each for each in sampling.others(task, proof(task)) if each.name.startswith(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = own.make()
        assert own.prove(run, run())["error"] < 1e-3
        if name == "diffusers DDPM":
            right = package.DDPMScheduler.step
            monkeypatch.setattr(package.DDPMScheduler, "step", lambda self, eps, i, x: right(self, 1.01 * eps, i, x))
        else:
            run._sde.g = lambda s, y, right=run._sde.g: 1.01 * right(s, y)
        with pytest.raises(cases.WrongError):
            own.prove(run, run())


PACKAGES = {  # that each loop needs
    "loop-tutorial": "torch",
    "loop-diffusers": "diffusers",
    "loop-k-diffusion": "k_diffusion",
    "loop-sbi": "sbi",
    "loop-azula-5": "azula",
    "loop-policy-3": "diffusers",
}


@pytest.fixture
def few_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures the share of a loop's network three times, however short it is."""
    monkeypatch.setattr(loop, "_SHARE_S", 0.0)


def imported(package: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(package, exc_type=ImportError)


@pytest.mark.filterwarnings("ignore")  # from the packages
@pytest.mark.usefixtures("few_measurements")
@pytest.mark.parametrize("name", PACKAGES)
def test_an_accelerated_loop_is_proved_against_the_loop_itself_and_a_wrong_one_is_found_out(name: str) -> None:
    imported(PACKAGES[name])
    (case,) = (each for each in CASES if each.name == name)
    base, *own = [each for each in case.providers if not each.compiles]
    assert case.baseline == base.name
    assert case.prepare is not None
    case.prepare()
    figures = base.prove(base.make(), None)
    assert figures["error"] <= figures["allowed"] < 1e-3
    assert 0 < figures["network_share"] <= 1
    for each in own:
        run = each.make()
        assert each.prove(run, run())["error"] < 1e-5
        with pytest.raises(cases.WrongError, match="is off by"):
            each.prove(lambda run=run: 1.01 * tensor_of(run()), None)
    torch_noise = [each.prove for each in own if "torch's noise" in each.name]
    assert torch_noise or name == "loop-k-diffusion"  # which draws nothing
    for prove in torch_noise:  # the contract's noise is another
        with pytest.raises(cases.WrongError, match="is off by"):
            prove(own[0].make(), None)


def test_a_loop_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("diffusers", "k_diffusion.sampling", "sbi.neural_nets", "azula.denoise"):
        monkeypatch.setitem(sys.modules, module, None)
    for case in run.cases(TINY, ["loops"]):
        package = PACKAGES[case.name]
        if package == "torch":
            continue
        record = runner.run_case(case, CPU, MOST).record
        for figures in record["providers"].values():
            assert f"pip install 'fastsde[{package.replace('_', '-')}]'" in figures["unavailable"]
        assert not table.headlines(record)


def test_a_trajectory_with_conditions_is_proved_with_them_by_every_provider_of_pytorch() -> None:
    """A chosen sample is compared under its own condition, which differs from that of any other."""
    named = NETWORKS["film"]
    task = Trajectory(named.load, named.shape, 1200, 3, CPU, 0, 0, conditions=named.conditions)
    shows = proof(task)
    shown = [sampling.loop(cases.LEAN, lean.sampling, task, shows, "fp32"), ours.sampler(task, shows, "eager", "fp32")]
    for each in shown:
        run = each.make()
        assert each.prove(run, run())["error"] < 1e-4
    other = replace(task, conditions=lambda n: {"c": named.conditions(n)["c"].flip(0)})
    run = lean.sampling(other, "fp32")
    with pytest.raises(cases.WrongError, match="a trajectory is off"):
        shows.given_noise("fp32", run, run())


def test_a_u_net_without_its_library_is_unavailable_and_fails_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    (case,) = (each for each in architectures.cases(QUICK) if each.name.startswith("ddpm-unet"))
    record = runner.run_case(case, CPU, MOST).record
    assert all("pip install 'fastsde[diffusers]'" in figures["unavailable"] for figures in record["providers"].values())
    assert not list(run._wrong(record))


def test_the_least_arithmetic_of_the_networks_of_other_peoples_loops() -> None:
    """PyTorch's count includes products with padding, and what is the same for all samples."""
    diffusers, _ = imported("diffusers"), imported("sbi")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet, posterior = loops.small_unet(diffusers), loops.untrained_posterior(CPU)
    estimator, n = posterior.vector_field_estimator, 4
    side = loops.UNET_SIDE
    with torch.no_grad(), FlopCounterMode(display=False) as images:
        unet(torch.randn(n, 3, side, side), torch.tensor(1))
    with torch.no_grad(), FlopCounterMode(display=False) as points:
        estimator(torch.randn(n, 3), torch.randn(n, 2), torch.rand(n))
    assert 0.9 < n * loops.UNET_FLOP / images.get_total_flops() < 1
    assert 0.8 < n * loops.POSTERIOR_FLOP / points.get_total_flops() < 1


@pytest.mark.parametrize("wrong", [None, "loss", "stuck"])
def test_training_is_proved_by_its_loss_its_gradient_and_that_weights_move(wrong: str | None) -> None:
    recipe = Recipe(tutorial_config("swiss-roll"), partial(data.swiss_roll, 5000), CPU, 3)
    for make in (tutorial.training, lean.training):
        steps = make(recipe)
        right = steps.loss
        if wrong == "loss":
            steps.loss = lambda network, x, right=right: 1.2 * right(network, x)
        if wrong == "stuck":
            steps._optimizer = torch.optim.Adam(steps.model.parameters(), lr=0.0)
        losses = steps()
        if wrong is None:
            assert tutorial.prove_training(steps, losses)["loss"] > 0
        else:
            with pytest.raises(cases.WrongError):
                tutorial.prove_training(steps, losses)


@pytest.mark.parametrize("kind", ["uniform", "signs", "repeated", "scaled", "correlated"])
def test_numbers_that_are_no_normals_are_found_out(kind: str) -> None:
    z = torch.randn(20_000)
    assert elements.check_normals("it", z)["error"] < 6
    wrong = {
        "uniform": (torch.rand(20_000) - 0.5) * 12**0.5,
        "signs": z.sign(),
        "repeated": z[:10_000].repeat(2),
        "scaled": 1.1 * z,
        "correlated": torch.cat((z[:10_000], 0.3 * z[:10_000] + 0.91**0.5 * z[10_000:])),
    }[kind]
    with pytest.raises(cases.WrongError, match="the normal distribution of"):
        elements.check_normals("it", wrong)


def test_a_round_that_fails_costs_a_provider_its_time_alone() -> None:
    calls = itertools.count()

    def fails_later() -> None:
        if next(calls) == 3:
            raise MemoryError("no more")

    record = run_case(provider(cases.LOOP), provider("fastsde", fails_later))
    assert record["providers"]["fastsde"] == {"failed": "MemoryError: no more"}
    assert record["providers"][cases.LOOP]["rounds"] == 5


# Kernels on a GPU ---------------------------------------------------------------------------------------------------


def replayed(device: torch.device, *providers: Provider, **options: object) -> table.Figures:
    about: dict[str, object] = {"is_kernel": True, "rounds": 2, "calls": 5, **options}
    return runner.run_case(Case("subject", "case", "a task", {}, providers, **about), device, MOST).record  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.usefixtures("graphs")
def test_every_single_kernel_is_replayed_as_a_graph_and_proved_so() -> None:
    device = torch.get_default_device()
    plan = Plan(device, quick=True)
    found = [  # interpreted without a GPU
        noise._case(plan, "noise", (4, 400)),
        solver_step._case(solver_step.State((4, 400), plan), "step"),
        perturb._case(perturb.Batches((4, 400), True, plan), "perturb"),
        dsm_loss._case(dsm_loss.Batches((4, 400), plan), "loss"),
    ]
    for case in found:
        left_out = ("torch.compile", "diffusers", "reference", "bf16")
        chosen = [each for each in case.providers if not any(word in each.name for word in left_out)]
        record = runner.run_case(replace(case, providers=chosen, rounds=1, calls=2), device, MOST).record
        for name, each in record["providers"].items():
            assert each["median_s"] > 0, name
            if not name.endswith(cases.AGAIN):
                assert each["timed_by"] == cases.REPLAYED, each
                assert each["host_s"] > 0
        lines = table.show(record)
        assert lines[1].endswith("host")
        assert any("replayed CUDA graph" in line for line in lines)
        assert not any("by calls" in line for line in lines)


def test_a_graph_holds_each_input_as_often_and_what_none_can_hold_is_timed_by_calls(graphs: Any) -> None:
    device = torch.get_default_device()
    inputs = [torch.full((2,), float(i), device=device) for i in range(3)]
    turn = measure.Rotated(lambda x: x * 2, inputs)
    replay = Replay(turn, device, 5)
    assert replay.calls == 6
    assert torch.equal(replay(), 2 * turn.last)
    assert replay.seconds() > 0
    alive = weakref.ref(turn)
    del turn
    assert alive() is not None, "the graph reads its inputs in every replay"

    # One reads the device, and one is wrong from its thirtieth call on, the first one in the graph.
    ones, numbers = torch.ones(2, device=device), itertools.count(1)
    record = replayed(
        device,
        provider(cases.LOOP, lambda: ones + 1),
        provider("fastsde", lambda: float(ones[0])),
        Provider(
            "wrong in a graph",
            lambda: lambda: ones * (1 if next(numbers) < 30 else 4),
            lambda run, result: cases.check("it", float(result.max()) - 1, 0.0),
        ),
    )
    figures = record["providers"]
    assert figures[cases.LOOP]["timed_by"] == cases.REPLAYED
    assert figures["fastsde"]["timed_by"] == cases.CALLED
    assert figures["fastsde"]["not_captured"].startswith("CaptureError: it cannot be captured as a CUDA graph")
    assert figures["wrong in a graph"] == {"wrong": "replayed, it is off by 3, at most 0 is allowed"}
    lines = table.show(record)
    assert any(line.startswith("  fastsde is timed by calls, including the host: CaptureError") for line in lines)
    (row,) = table.headlines(record)
    assert row.cells[3].endswith("(by calls)")
    assert "by calls" not in row.cells[1]


# The cases ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("few_measurements")
@pytest.mark.parametrize("case", [each for each in CASES if each.subject != "startup"], ids=lambda case: case.name)
def test_every_provider_of_every_case_proves_itself(case: Case) -> None:
    """Except for those that take long to compile; diffusers and torchsde only if they are installed."""
    chosen = [each for each in case.providers if not each.compiles]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the libraries that fastsde is compared with
        record = runner.run_case(replace(case, providers=chosen, rounds=1, calls=1), CPU, MOST).record
    for name, figures in record["providers"].items():
        reasons = ("not installed", "at least 40 rows", "GPU", "no kernels", "compiler")
        unavailable = figures.get("unavailable")
        assert any(reason in unavailable for reason in reasons) if unavailable else figures["median_s"] > 0, name
        assert unavailable or name.endswith("again") or figures["parity"]
    assert record["baseline"] in record["providers"]
    assert json.loads(json.dumps(record)) == record


@pytest.mark.slow
@pytest.mark.parametrize("case", [each for each in CASES if each.subject == "startup"], ids=lambda case: case.name)
def test_first_calls_prove_themselves(case: Case) -> None:
    """Each call is a new process, and so there is one of fastsde alone, and no other to time it."""
    (own,) = (each for each in case.providers if each.is_ours)
    result = own.make()()
    assert case.timer is not None
    assert case.timer(lambda: result) > 0
    figures = own.prove(lambda: result, result)
    assert figures["error"] <= figures["allowed"]


def test_a_case_with_a_timer_of_its_own_has_those_times() -> None:
    record = run_case(provider(cases.LOOP, lambda: 3.0), provider("fastsde"), timer=lambda run: run())
    assert [each["median_s"] for each in record["providers"].values()] == [3.0, 1.0, 3.0]
    assert not any("first_call_s" in each for each in record["providers"].values())


def test_the_whole_suite_has_the_sizes_that_are_promised() -> None:
    for plan in (Plan(CPU), Plan(torch.device("cuda"))):
        found = run.cases(plan)
        assert {case.subject for case in found} == set(run.SUBJECTS)
        assert len({case.name for case in found}) == len(found)
        assert {case.about["n"] for case in found if case.subject == "swiss_roll"} == {1000, 20_000, 1_000_000}
        assert {case.about["n"] for case in found if case.subject == "mnist"} == {1, 20, 256, 1000}
        assert [case.name for case in run.by_priority(found)[: len(run.HEADLINES)]] == list(run.HEADLINES)
        for case in found:
            names = [each.name for each in case.providers]
            assert case.baseline in names
            assert len(set(names)) == len(names)
            needed = [each.name for each in case.providers if case.needs(each)]
            assert any(map(table.is_ours, needed))
            without = ("noise", "startup", "loops", "adaptive")
            assert case.subject in without or any(name.startswith(cases.LEAN) for name in needed)
            assert not any("reference" in name for name in needed)


@pytest.mark.slow
def test_the_command_runs_a_subject_shows_it_and_keeps_it(tmp_path: Path) -> None:
    out = tmp_path / "noise.json"
    command = [sys.executable, "-m", "fastsde", "bench", "--quick", "--suite", "noise", "--out", str(out)]
    given = ("TRITON_INTERPRET", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
    environment = {name: value for name, value in os.environ.items() if name not in given}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*command, "--device", "cpu"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert {"device", "torch", "triton", "commit", "fp32_products", "ceilings", "quick", "threads"} <= set(result)
    assert result["threads_wait"] == "passive after 1000 spins (set by fastsde)"
    (record,) = result["cases"]
    assert all(rate > 0 for rate in result["ceilings"]["flop"].values())
    for name, each in record["providers"].items():
        if "median_s" in each:
            assert 0 < each["p20_s"] <= each["median_s"] <= each["p80_s"]
            assert f"  {name} " in done.stdout
            assert name.endswith("again") or 0 < each["of_limit"] < 1
    assert done.stdout.splitlines()[-1].startswith("normals")
    assert done.stderr.startswith("1 cases, about 0:")
    assert "[1/1, 0:0" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "nothing"], "nothing is not one of noise, solver_step"),
        (["--out", "figures.txt"], "must end in .json"),
        (["--device", "tpu"], "device"),
        (["--minutes", "0"], "--minutes"),
        (["--list", "--minutes", "3"], "--list runs nothing: leave --minutes out"),
        (["--list", "--out", "a.json"], "--list runs nothing: leave --out out"),
    ],
)
def test_bad_options_say_what_is_wrong(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["bench", *arguments])
    assert done.exit_code in (1, 2)
    assert message in done.output


def test_the_list_of_cases_runs_nothing() -> None:
    done = CliRunner().invoke(main, ["bench", "--list", "--quick"])
    assert done.exit_code == 0
    assert len(done.output.splitlines()) == len(run.cases(QUICK))


@pytest.mark.slow
def test_pytest_runs_the_suite(tmp_path: Path) -> None:
    """Its figures come from the interleaved rounds, with one test for each provider."""
    root, out = Path(__file__).parents[1], tmp_path / "figures.json"
    chosen = ["-k", "perturb and not compile", f"--benchmark-json={out}", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "benchmarks", "--quick", "--device", "cpu", *chosen]
    left_out = ("TRITON_INTERPRET", "PYTEST_")  # and also what tells pytest-benchmark that this test runs in parallel
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())["benchmarks"]
    assert len(figures) >= 4
    for each in figures:
        assert each["stats"]["median"] == pytest.approx(each["extra_info"]["median_s"])
        assert each["stats"]["rounds"] == each["extra_info"]["rounds"]
        assert each["group"].startswith("noising")
