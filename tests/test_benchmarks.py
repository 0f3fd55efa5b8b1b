"""The benchmarks run, and refuse a time to what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fastsde import VPSDE, ops
from fastsde.benchmarks import engines, measure, run

CPU = torch.device("cpu")


def test_the_kernels_benchmark_measures_every_provider(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "fastsde.benchmarks.kernels", "--device", "cpu", "--quick", "--rounds", "1"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([*command, "--out", str(out)], check=True, env=environment, capture_output=True)
    result = json.loads(out.read_text())
    assert result["copy_bandwidth_bytes_per_s"] > 0
    (step,), (roll,) = result["solver_step"], result["swiss_roll"]
    assert {"eager PyTorch", "eager PyTorch again", "torch.compile", "fastsde"} == set(step["providers"])
    assert {f"fastsde persistent, {name}" for name in ("fp32", "tf32", "bf16")} == set(roll["providers"])
    for timed in (*step["providers"].values(), *roll["providers"].values()):
        assert 0 < timed["p20_s"] <= timed["median_s"] <= timed["p80_s"]


def test_what_is_wrong_has_no_time() -> None:
    from click import ClickException

    measure.check("right", 1e-6, 1e-5)
    for error in (1e-4, float("nan")):
        with pytest.raises(ClickException, match="wrong, so it has no time"):
            measure.check("wrong", error, 1e-5)


def test_without_kernels_there_is_nothing_to_time() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastsde.benchmarks.kernels", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the kernels do not run on cpu" in done.stderr


def test_the_engines_benchmark_measures_what_runs_and_says_why_the_rest_does_not(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "engines.json"
    command = [sys.executable, "-m", "fastsde.benchmarks.engines", "--device", "cpu", "--quick", "--rounds", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*command, "--out", str(out)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    names = ["mnist-1000", "mnist-20", "swiss-roll", "train-swiss-roll", "train-mnist"]
    assert [each["subject"] for each in result["subjects"]] == names
    for subject in result["subjects"]:
        timed = {name: each for name, each in subject["providers"].items() if "median_s" in each}
        expected = {"tutorial's loop", "fastsde eager"}
        if subject["subject"] == "swiss-roll" and ops.has_native(torch.device("cpu")):
            expected |= {"fastsde persistent", "fastsde.sample() anew"}
        assert {name.split(",")[0] for name in timed} == expected
        for name, each in timed.items():
            assert 0 < each["p20_s"] <= each["median_s"] <= each["p80_s"]
            assert each.get("parity") or name.endswith("again")
            assert f"  {name} " in done.stdout
        rest = [each for name, each in subject["providers"].items() if name not in timed]
        assert all("GPU" in each["unavailable"] or "on cpu" in each["unavailable"] for each in rest)
        assert not subject["targets"]  # of other sizes


def test_without_a_gpu_the_engines_benchmark_is_quick_or_nothing() -> None:
    done = CliRunner().invoke(engines.main, ["--device", "cpu"])
    assert done.exit_code == 1
    assert "give --quick" in done.output


def test_one_provider_that_fails_leaves_the_others_their_times() -> None:
    case = measure.Case(CPU, subject="a subject", rows=1)

    def cannot() -> measure.Run:
        raise measure.UnavailableError("there is no such thing here")

    def wrong(run: measure.Run, result: object) -> dict[str, float]:
        measure.check("it", 2.0, 1.0)
        return {}

    case.add("right", lambda: lambda: 1, lambda run, result: {"error": 0.0})
    case.add_again("right")
    case.add("wrong", lambda: lambda: 1, wrong)
    case.add("failed", lambda: lambda: 1 // 0, lambda run, result: {})
    case.add("cannot", cannot, lambda run, result: {})
    case.time(rounds=3, per=2)
    lines = "\n".join(run.show(case.record))
    for name, figures in case.record["providers"].items():
        assert ("median_s" in figures) == name.startswith("right")
    for line in ("wrong: it is wrong", "failed: ZeroDivisionError", "unavailable: there is no such thing here"):
        assert line in lines


def test_targets_are_met_not_met_or_not_measured() -> None:
    case = measure.Case(CPU, subject="mnist-1000", n=1000)
    times = {"tutorial's loop, TF32": 2.0, "tutorial's loop, TF32, again": 1.9, "fastsde graph, bf16": 0.3}
    case.record["providers"] = {
        name: {"median_s": median, "p20_s": median, "p80_s": median} for name, median in times.items()
    }
    engines._digits_targets(case, 1000)
    assert [target["met"] for target in case.record["targets"]] == [True, True, None]
    assert case.record["targets"][1]["value"] == pytest.approx(1.9 / 0.3)  # of the faster of the two
    case.record["targets"].clear()
    engines._digits_targets(case, 20)
    assert [target["met"] for target in case.record["targets"]] == [None, None, False, False]
    assert "target NOT met: graph in bf16: at most 0.045 s" in "\n".join(run.show(case.record))


def test_what_is_slow_takes_part_in_three_rounds() -> None:
    calls = {"slow": 0, "fast": 0}

    def run(name: str) -> None:
        calls[name] += 1
        time.sleep(0.01 * (name == "slow"))

    providers = {name: lambda name=name: run(name) for name in calls}
    timed = measure.measure(providers, CPU, rounds=8, warm_ups=1, enough=0.02)
    assert calls == {"slow": 4, "fast": 9}
    assert {name: each["rounds"] for name, each in timed.items()} == {"slow": 3, "fast": 8}


def test_moments_lie_apart_where_a_distribution_differs() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 50, generator=generator) for n in (300, 500))
    assert measure.moments_apart(a, b) == pytest.approx(1, abs=0.5)
    assert measure.moments_apart(a, b + 0.2) > 2
    assert measure.moments_apart(a, 1.3 * b) > 2
    assert not measure.moments_apart(a, b * torch.nan) <= 2


@pytest.mark.parametrize("prediction", ["score", "eps", "v"])
def test_a_network_of_any_kind_becomes_one_that_predicts_the_score(prediction: str) -> None:
    sde, rows = VPSDE(), 5
    x_0, z = torch.randn(2, 3, 4).unbind()
    times = torch.linspace(1, 0, rows + 1)[:-1]

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        return {"score": -z / sigma, "eps": z, "v": alpha * z - sigma * x_0}[prediction]

    score = measure.Score(network, sde, prediction, rows)
    for now in times.repeat(2):  # a second trajectory follows the first
        t = now.expand(3)
        x = sde.alpha(now) * x_0 + sde.sigma(now) * z
        torch.testing.assert_close(score(x, t), -z / sde.sigma(now), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not ops.has_native(torch.device("cpu")), reason="no C++ compiler")
def test_the_cpu_benchmark_measures_every_provider_of_a_subject(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    command = [
        sys.executable,
        "-m",
        "fastsde.benchmarks.cpu",
        "--subject",
        "normals",
        "--rounds",
        "1",
        "--out",
        str(out),
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (subject,) = json.loads(out.read_text())["subjects"]
    assert set(subject["providers"]) == {
        "fastsde, one sample",
        "fastsde, 1276 images",
        "torch.randn",
        "torch.randn, again",
    }
    assert all(each["median_s"] > 0 for each in subject["providers"].values())
    assert subject["providers"]["fastsde, one sample"]["parity"]["error"] <= 4e-6
    assert subject["targets"][0]["value"] > 0


def test_the_committed_figures_of_the_cpu_are_whole_and_meet_their_targets() -> None:
    result = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "cpu.json").read_text())
    assert {"cpu", "torch", "commit", "threads"} <= set(result)
    targets = [target for subject in result["subjects"] for target in subject["targets"]]
    assert len(targets) == 7
    assert all(target["met"] for target in targets)
