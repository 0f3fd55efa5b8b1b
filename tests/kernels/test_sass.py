"""What the compiler makes of the kernels, on any machine: nothing spills, and accesses are as wide as they can be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastsde.benchmarks.sass import UNET_LAYERS

# Per variant of fp32 tensors whose rows start on 16 bytes: how many [B, *shape] tensors it reads and writes.
pytestmark = pytest.mark.slow  # everything is compiled for three generations of GPUs

TENSORS = {
    "solver_step": (2, 1),
    "solver_step, counter, time and status": (2, 1),
    "solver_step, no noise": (2, 1),
    "solver_step, bf16 network": (1, 1),  # the network's output is 64 bits wide
    "solver_step, history, clip, guidance": (4, 2),
    "normal": (0, 1),
    "perturb": (1, 1),
    "dsm_loss": (1, 0),
    "dsm_loss, backward": (1, 1),
}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ACCESSES = 4  # of 128 bits, for the 16 elements of a thread


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, compiler_environment: dict[str, str]) -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("sass") / "sass.json"
    command = [sys.executable, "-m", "fastsde.benchmarks.sass", "--out", str(out)]
    run = subprocess.run(command, env=compiler_environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels: list[dict[str, Any]] = json.loads(out.read_text())["kernels"]
    return kernels


def _names(reports: list[dict[str, Any]], bad: Any) -> list[tuple[str, int]]:
    return [(report["name"], report["capability"]) for report in reports if bad(report)]


def test_every_variant_is_compiled_for_every_generation(reports: list[dict[str, Any]]) -> None:
    found = {(report["name"], report["capability"]) for report in reports}
    assert found >= {(name, capability) for name in TENSORS for capability in (80, 90, 100)}


def test_nothing_spills(reports: list[dict[str, Any]]) -> None:
    def spills(report: dict[str, Any]) -> bool:
        known = report["name"].endswith("width 256") and report["capability"] == 80
        return not known and bool(report["stack_bytes"] or report["local_accesses"])

    assert not _names(reports, spills)


def test_large_tiles_multiply_on_the_tensor_cores_of_their_generation(reports: list[dict[str, Any]]) -> None:
    instruction = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
    tiles = [report for report in reports if report["name"].endswith(("32 samples, width 64", "64 samples, width 64"))]
    assert len(tiles) == 9
    for report in tiles:
        kind = "BF16" if "bf16" in report["name"] else "TF32"
        used = [op for op in report["matrix"] if op.startswith(instruction[report["capability"]])]
        assert used, report
        assert report["capability"] == 100 or all(kind in op for op in used), report


def test_the_counts_kept_for_this_triton_are_those_it_gives(reports: list[dict[str, Any]]) -> None:
    import triton

    kept = {
        result["triton"]: result["kernels"]
        for result in (json.loads(path.read_text()) for path in RESULTS.glob("sass-triton-*.json"))
    }
    assert kept
    if triton.__version__ not in kept:
        pytest.skip(f"no counts are kept for Triton {triton.__version__}, only for {', '.join(kept)}")
    assert kept[triton.__version__] == reports  # python -m fastsde.benchmarks.sass --out FILE makes them anew


def test_tensors_are_accessed_by_128_bits(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        if report["name"] not in TENSORS:
            continue
        wide = [
            sum(n for op, n in report["global_accesses"].items() if op.startswith(kind) and ".128" in op)
            for kind in ("LDG", "STG")
        ]
        expected = [ACCESSES * tensors for tensors in TENSORS[report["name"]]]
        assert wide == expected, (report["name"], report["capability"], report["global_accesses"])


def test_the_noisy_step_is_bound_by_memory(reports: list[dict[str, Any]]) -> None:
    (step,) = (report for report in reports if report["name"] == "solver_step" and report["capability"] == 90)
    assert step["instructions_per_element"] < 36  # 40 would still hide behind 12 bytes an element; 31 today


def test_the_step_exchanges_nothing_but_its_status(reports: list[dict[str, Any]]) -> None:
    def exchanges(report: dict[str, Any]) -> bool:
        status = 4 * 4 if "status" in report["name"] else 0  # a word of each warp: the first that is not finite
        return report["name"].startswith("solver_step") and report["shared_bytes"] > status

    assert not _names(reports, exchanges)


@pytest.mark.parametrize("name", UNET_LAYERS)
def test_a_layer_of_the_unet_accesses_128_bits_and_is_bound_by_memory(reports: list[dict[str, Any]], name: str) -> None:
    images, _, _, pools, timed = UNET_LAYERS[name]
    (report,) = (each for each in reports if each["name"] == name and each["capability"] == 90)
    # 8 elements of a thread at each of the 4 pixels of a window or at its only one: 16 bytes of bf16, 32 of fp32.
    pixels, accesses = 4 if pools else 1, 1 if images == "*bf16" else 2
    wide = [
        sum(n for op, n in report["global_accesses"].items() if op.startswith(kind) and ".128" in op)
        for kind in ("LDG", "STG")
    ]
    # Biases take up to two more, and the time plane, fp32, two a pixel.
    assert 0 <= wide[0] - pixels * (accesses + 2 * timed) <= 2, report["global_accesses"]
    assert wide[1] == pixels * accesses + pools * accesses, report["global_accesses"]
    # An H200 issues 31 thread-instructions in the time that it reads and writes a bf16 element, at 4.3 TB/s.
    assert report["instructions_per_element"] < 26
