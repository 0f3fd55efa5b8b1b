"""The benchmarks run, and refuse a time to what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


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

    from fastsde.benchmarks import kernels

    kernels._check("right", 1e-6, 1e-5)
    for error in (1e-4, float("nan")):
        with pytest.raises(ClickException, match="wrong, so it has no time"):
            kernels._check("wrong", error, 1e-5)


def test_without_kernels_there_is_nothing_to_time() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastsde.benchmarks.kernels", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the kernels do not run on cpu" in done.stderr
