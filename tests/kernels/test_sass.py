"""The compiled kernels, on any machine: nothing spills, and memory accesses are as wide as possible."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastsde.benchmarks.sass import SMALL, UNET_BATCHES, UNET_HEADS, UNET_LAYERS, UNET_STEMS

# How many [B, *shape] tensors each variant reads and writes; they are fp32, with rows aligned to 16 bytes.
pytestmark = pytest.mark.slow  # what has changed since counts were kept is compiled for three generations of GPUs

TENSORS = {
    "solver_step": (2, 1),
    "solver_step, counter, time and status": (2, 1),
    "solver_step, no noise": (2, 1),
    "solver_step, bf16 network": (1, 1),  # the network's output is 64 bits wide
    "solver_step, history, clip, guidance": (4, 2),
    "solver_step, no history yet, clip": (2, 2),  # the slot of the history is not read
    "normal": (0, 1),
    "perturb": (1, 1),
    "dsm_loss": (2, 0),  # the data are read only if their coefficient is not zero
    "dsm_loss, backward": (2, 1),
}
KNOWN_SPILLS = {  # of a few registers, all but the first
    ("mlp_sampler, bf16, many samples of 2, width 256", 80),
    ("mlp_sampler, fp32, few samples of 2, FiLM", 100),  # twice the samples would spill none, and take longer
    # With Triton 3.6.
    ("mlp_sampler, fp32, few samples of 64, width 64", 90),
    ("mlp_sampler, bf16, few samples of 2, FiLM of a condition", 90),
    ("mlp_sampler, bf16, few samples of 2, FiLM of a condition", 100),
    ("convolution, bf16, head, film, many pixels", 80),
}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ACCESSES = 4  # of 128 bits, for the 16 elements of a thread
TILES = {name: (ACCESSES, *TENSORS[name]) for name in TENSORS}
TILES |= {f"{name}, few elements": (1, *TENSORS[name]) for name in SMALL}  # 4 elements per thread


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, compiler_environment: dict[str, str]) -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("sass") / "sass.json"
    command = [sys.executable, "-m", "fastsde.benchmarks.sass", "--out", str(out), "--kept", str(RESULTS)]
    run = subprocess.run(command, env=compiler_environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels: list[dict[str, Any]] = json.loads(out.read_text())["kernels"]
    return kernels


def _names(reports: list[dict[str, Any]], bad: Any) -> list[tuple[str, int]]:
    return [(report["name"], report["capability"]) for report in reports if bad(report)]


def test_every_variant_is_compiled_for_every_generation(reports: list[dict[str, Any]]) -> None:
    found = {(report["name"], report["capability"]) for report in reports}
    assert found >= {(name, capability) for name in TILES for capability in (80, 90, 100)}


def test_nothing_spills(reports: list[dict[str, Any]]) -> None:
    found = _names(reports, lambda report: report["stack_bytes"] or report["local_accesses"])
    assert set(found) <= KNOWN_SPILLS


def test_large_tiles_multiply_on_the_tensor_cores_of_their_generation(reports: list[dict[str, Any]]) -> None:
    tiles = [report for report in reports if report["name"].endswith("many samples of 2, width 64")]
    assert len(tiles) == 9
    for report in tiles:
        kind = "BF16" if "bf16" in report["name"] else "TF32"
        used = [op for op in report["matrix"] if op.startswith(TENSOR_CORES[report["capability"]])]
        assert used, report
        assert report["capability"] == 100 or all(kind in op for op in used), report


def _of(reports: list[dict[str, Any]], name: str, capability: int = 90) -> dict[str, Any]:
    (report,) = (each for each in reports if each["name"] == name and each["capability"] == capability)
    return report


def test_every_program_stores_its_result(reports: list[dict[str, Any]]) -> None:
    assert not _names(reports, lambda report: not any(op.startswith("STG") for op in report["global_accesses"]))


# Instructions per warp and row, rounded up from those of Triton 3.6 and 3.8.
@pytest.mark.parametrize(("precision", "instructions"), [("bf16", 300), ("tf32", 380), ("fp32", 610)])
def test_a_row_of_few_samples_is_short(reports: list[dict[str, Any]], precision: str, instructions: int) -> None:
    report = _of(reports, f"mlp_sampler, {precision}, few samples of 2, width 64")
    assert 200 < report["loop_instructions"] <= instructions


@pytest.mark.parametrize(
    ("precision", "instructions", "special"), [("bf16", 900, 128), ("tf32", 970, 128), ("fp32", 1330, 200)]
)
def test_a_row_of_many_samples_balances_its_units(
    reports: list[dict[str, Any]], precision: str, instructions: int, special: int
) -> None:
    report = _of(reports, f"mlp_sampler, {precision}, many samples of 2, width 64")
    assert 500 < report["loop_instructions"] <= instructions
    # 96 LogSigmoids per thread take an exponential each, and a logarithm each in fp32, otherwise one in four; 8 are
    # the normals'.
    assert report["loop_special"] == special
    if precision != "fp32":  # a quarter of a multiprocessor issues 1 instruction per clock, or 1/8 special function
        assert 0.8 < 8 * report["loop_special"] / report["loop_instructions"] < 1.25


def test_the_counts_kept_for_this_triton_are_those_it_gives(reports: list[dict[str, Any]]) -> None:
    import triton

    kept = {
        result["triton"]: result["kernels"]
        for result in (json.loads(path.read_text()) for path in RESULTS.glob("sass-triton-*.json"))
    }
    assert kept
    if triton.__version__ not in kept:
        pytest.skip(f"no counts are kept for Triton {triton.__version__}, only for {', '.join(kept)}")
    mine = kept[triton.__version__]
    for report in (*mine, *reports):  # keys change with comments, too
        del report["key"]
    assert mine == reports  # python -m fastsde.benchmarks.sass --out FILE regenerates them


def test_tensors_are_accessed_by_128_bits(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        if report["name"] not in TILES:
            continue
        accesses, *tensors = TILES[report["name"]]
        wide = [
            sum(n for op, n in report["global_accesses"].items() if op.startswith(kind) and ".128" in op)
            for kind in ("LDG", "STG")
        ]
        expected = [accesses * each for each in tensors]
        assert wide == expected, (report["name"], report["capability"], report["global_accesses"])


def test_the_noisy_step_is_bound_by_memory(reports: list[dict[str, Any]]) -> None:
    step = _of(reports, "solver_step")
    assert step["instructions_per_element"] < 36  # 40 would still be hidden by 12 bytes per element; it is 31 now


def test_a_key_is_one_store_and_a_position_one_philox_call(reports: list[dict[str, Any]]) -> None:
    for report in (each for each in reports if each["name"] in ("sample_keys", "data_order")):
        assert report["shared_bytes"] == 0, report
        assert report["instructions_per_element"] < 120, report  # 40 of them are the products of the ten rounds
    keys = [each["global_accesses"] for each in reports if each["name"] == "sample_keys"]
    assert keys == [{"STG.E.128": 1}] * 3


def test_the_step_exchanges_nothing_but_its_status(reports: list[dict[str, Any]]) -> None:
    def exchanges(report: dict[str, Any]) -> bool:
        status = 4 * 4 if "status" in report["name"] else 0  # a word per warp: the first value that is not finite
        return report["name"].startswith("solver_step") and report["shared_bytes"] > status

    assert not _names(reports, exchanges)


@pytest.mark.parametrize("name", UNET_LAYERS)
@pytest.mark.parametrize("pixels", UNET_BATCHES)
def test_a_convolution_moves_128_bits(reports: list[dict[str, Any]], name: str, pixels: str) -> None:
    kind = UNET_LAYERS[name][4]
    for capability in TENSOR_CORES:
        accesses = _of(reports, f"{name}, {pixels}", capability)["global_accesses"]
        assert any(op.startswith("LDGSTS") for op in accesses), accesses  # from memory to shared memory directly
        assert all(".128" in op for op in accesses if op.startswith("LDGSTS")), accesses
        narrow = sum(n for op, n in accesses.items() if op.startswith("STG") and ".128" not in op)
        # Nine products for each pixel are stored one by one; a pool of few pixels may be stored by 64 bits.
        assert kind == "head" or narrow <= (kind == "pooled" and "few" in pixels), accesses
        assert "film" not in name or accesses["LDG.E.128"] >= 2, accesses  # a scale and a shift


@pytest.mark.parametrize("name", UNET_LAYERS)
@pytest.mark.parametrize("pixels", UNET_BATCHES)
def test_a_convolution_multiplies_on_the_tensor_cores_of_its_generation(
    reports: list[dict[str, Any]], name: str, pixels: str
) -> None:
    for capability, instruction in TENSOR_CORES.items():
        matrix = _of(reports, f"{name}, {pixels}", capability)["matrix"]
        assert matrix, (name, capability)
        assert all(op.startswith(instruction) for op in matrix), (capability, matrix)


@pytest.mark.parametrize("name", UNET_STEMS)
def test_the_first_convolution_writes_128_bits(reports: list[dict[str, Any]], name: str) -> None:
    for report in (each for each in reports if each["name"] == name):
        # A thread has 8 channels of the four pixels of a window, and of their pool: 16 bytes each in bf16, 32 in fp32.
        stores = {op: n for op, n in report["global_accesses"].items() if op.startswith("STG")}
        assert stores == {"STG.E.128": 5 * (1 if "bf16" in name else 2)}
        wide = sum(n for op, n in report["global_accesses"].items() if op.startswith("LDG") and ".128" in op)
        assert wide >= 4 * 2  # the time plane, which is fp32
        assert not report["shared_bytes"]
        assert report["instructions_per_element"] < 45


@pytest.mark.parametrize("name", UNET_HEADS)
def test_the_last_convolution_reads_nine_products_for_each_result(reports: list[dict[str, Any]], name: str) -> None:
    for report in (each for each in reports if each["name"] == name):
        loads = sum(n for op, n in report["global_accesses"].items() if op.startswith("LDG"))
        assert loads == 2 * 9 + 1  # of a thread's two results, and a bias
        assert not report["shared_bytes"]
        assert report["instructions_per_element"] < 110
