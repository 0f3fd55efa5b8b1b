"""`fastsde verify`: correct backends pass, wrong ones are found, and those that cannot run are listed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsde import (
    ClassifierGuidance,
    Guidance,
    NonFiniteError,
    Sampler,
    checkpoints,
    cli,
    engines,
    noise,
    vocabulary,
)
from fastsde.checkpoints import Checkpoint
from fastsde.engines import CaptureError
from fastsde.models import MLP, UNet
from fastsde.request import Request
from fastsde.solvers import AdaptiveODE
from fastsde.training import Trainer, default_config
from fastsde.verify import Result, table, verify

FEW = {"n": 16, "steps": 12}
FP32 = [torch.float32]


def _replace_eager(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Tensor]) -> None:
    """Replaces the eager backend by ``change(x, model, table)`` of the reference's samples."""

    def engine(network: Any, request: Request) -> Tensor:
        return change(engines.get("reference")(network, request), network, request.table)

    monkeypatch.setitem(engines._ENGINES, "eager", engine)


def _of(results: list[Result], backend: str, dtype: str = "float32") -> Result:
    (result,) = [r for r in results if (r.backend, r.dtype) == (backend, dtype)]
    return result


@pytest.mark.parametrize("solver", ["euler_maruyama", "dpm_solver_pp_2m", "heun"])
def test_the_shipped_roll_passes(solver: str) -> None:
    results = verify("swiss-roll", solver=solver, steps=25, device="cpu")
    truth, *others = results
    assert (truth.backend, truth.dtype, truth.verdict) == ("reference", "float64", "truth")
    assert {r.dtype for r in others} == {"float32", "bfloat16"}
    assert [r.backend for r in others] == [*vocabulary.BACKENDS[1:]] * 2
    for dtype in ("float32", "bfloat16"):
        yardstick, eager = _of(results, "reference", dtype), _of(results, "eager", dtype)
        assert (yardstick.verdict, eager.verdict) == ("yardstick", "pass")
        for ours, theirs in ((eager.first_step, yardstick.first_step), (eager.whole, yardstick.whole)):
            assert 0 < ours.rms <= ours.largest
            # The rule: twice plain PyTorch, and at most the constant's two terms after 25 rows.
            assert 0 < ours.allowed - 2 * theirs.rms < 2e-5
    assert all(r.verdict in ("pass", "unavailable") for r in others if r.backend != "reference")


def test_digits_pass_in_the_networks_inference_form() -> None:
    small = Checkpoint(UNet(1, 8, (4, 8)), prediction="v")
    assert _of(verify(small, steps=12), "eager").verdict == "pass"


def test_a_backend_that_cannot_run_is_listed_with_its_reason() -> None:
    results = verify("swiss-roll", device="cpu", dtypes=FP32, **FEW)
    graph = _of(results, "graph")  # there are no CUDA graphs on a CPU
    assert (graph.verdict, graph.first_step, graph.whole) == ("unavailable", None, None)
    with pytest.raises(ValueError, match="graph") as error:
        Sampler(MLP(), (2,), backend="graph")
    assert graph.reason == str(error.value)
    assert f"graph cannot run here: {graph.reason}" in table(results)


@pytest.mark.slow
@pytest.mark.parametrize(("error", "verdict"), [(1.0, "pass"), (30.0, "fail")])
def test_normals_within_the_noise_contract_pass(monkeypatch: pytest.MonkeyPatch, error: float, verdict: str) -> None:
    def engine(network: Any, request: Request) -> Tensor:
        def normal(step: int) -> Tensor:
            size = 4e-6 * error * noise.normal(request.keys, step, request.shape[1:], stream=9).sign()
            return noise.normal(request.keys, step, request.shape[1:]) + size

        other = replace(request, x_init=normal(0), noise=lambda row, x: normal(row + 1))
        return engines.get("reference")(network, other)

    monkeypatch.setitem(engines._ENGINES, "eager", engine)
    result = _of(verify("swiss-roll", device="cpu", dtypes=FP32, steps=200), "eager")
    assert result.verdict == verdict
    # The margin is not wide: the constant is that of the contract.
    assert error > 1 or result.whole.rms > result.whole.allowed / 10


def test_a_wrong_constant_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_eager(monkeypatch, lambda x, model, table: x + 1e-3)
    result = _of(verify("swiss-roll", device="cpu", **FEW), "eager")
    assert result.verdict == "fail"
    assert result.first_step.rms == pytest.approx(1e-3, rel=1e-2)
    assert result.reason.startswith("RMS 1.0e-03 after 1 step, ")


def test_what_goes_wrong_after_the_first_row_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_eager(monkeypatch, lambda x, model, table: x + 1e-3 * (len(table) > 1))
    result = _of(verify("swiss-roll", device="cpu", **FEW), "eager")
    assert result.verdict == "fail"
    assert result.reason.startswith("RMS 1.0e-03 after all steps, ")


def test_what_is_wrong_in_bf16_alone_fails_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_eager(monkeypatch, lambda x, model, table: x * (1.03 if model.dtype == torch.bfloat16 else 1))
    results = verify("swiss-roll", device="cpu", **FEW)
    assert _of(results, "eager").verdict == "pass"
    assert _of(results, "eager", "bfloat16").verdict == "fail"


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_one_value_that_is_not_finite_fails(monkeypatch: pytest.MonkeyPatch, broken: float) -> None:
    def change(x: Tensor, model: Any, table: Any) -> Tensor:
        x[-1, -1] = broken
        return x

    _replace_eager(monkeypatch, change)
    result = _of(verify("swiss-roll", device="cpu", **FEW), "eager")
    assert (result.verdict, result.whole, result.reason) == ("fail", None, "NaN or infinity after 1 step")


def test_an_engines_own_error_fails_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(x: Tensor, model: Any, table: Any) -> Tensor:
        if model.dtype == torch.float32:
            raise KeyError("lost\nand more")
        return x

    _replace_eager(monkeypatch, change)
    results = verify("swiss-roll", device="cpu", **FEW)
    assert (_of(results, "eager").verdict, _of(results, "eager").whole) == ("fail", None)
    assert "lost" in _of(results, "eager").reason
    assert _of(results, "eager", "bfloat16").verdict == "pass"


def test_a_network_that_cannot_be_captured_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(x: Tensor, model: Any, table: Any) -> Tensor:
        raise CaptureError("it waits for the device")

    _replace_eager(monkeypatch, change)
    result = _of(verify("swiss-roll", device="cpu", dtypes=FP32, **FEW), "eager")
    assert result.verdict == "unavailable"
    assert "it waits for the device" in result.reason


def test_compile_is_a_row_of_its_own_and_no_pass_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda run, **options: no_compiler)
    results = verify("swiss-roll", device="cpu", dtypes=FP32, compile=True, **FEW)
    plain, compiled = [r for r in results if r.backend == "eager"]
    assert (plain.compile, plain.verdict, compiled.compile, compiled.verdict) == (False, "pass", True, "unavailable")
    assert compiled.reason.endswith("no C++ compiler")
    assert [r.compile for r in results if r.backend == "reference"] == [False, False]  # the truth and the yardstick
    assert f"eager cannot run here in float32, compiled: {compiled.reason}" in table(results)
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)
    results = verify("swiss-roll", device="cpu", dtypes=FP32, compile=True, **FEW)
    assert [r.verdict for r in results if r.backend == "eager"] == ["pass", "pass"]
    assert "compile" in table(results)[1].split()


def test_a_dtype_that_the_network_overflows_in_fails_and_has_no_yardstick() -> None:
    results = verify(lambda x, t: -(x * 1e5) / 1e5, (3,), dtypes=[torch.float16, torch.float32], **FEW)
    assert _of(results, "reference", "float16").verdict == "fail"
    assert "NaN or infinity in row 0" in _of(results, "reference", "float16").reason
    assert _of(results, "eager", "float16").verdict == "unavailable"
    assert _of(results, "eager").verdict == "pass"


def test_a_dtype_that_the_network_does_not_know_is_no_failure() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16:
            raise TypeError("no bf16 here")
        return -x

    results = verify(network, (2,), **FEW)
    assert _of(results, "reference", "bfloat16").verdict == "unavailable"
    assert _of(results, "reference", "bfloat16").reason == "no bf16 here"
    assert _of(results, "eager").verdict == "pass"


def test_a_network_that_is_broken_in_float64_has_no_truth() -> None:
    with pytest.raises(NonFiniteError, match="row 0"):
        verify(lambda x, t: x * torch.nan, (2,), **FEW)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("swiss-roll",), {"n": 0}, "n must be at least 1, got 0"),
        (("swiss-roll",), {"dtypes": [torch.float64]}, r"dtypes\[0\] must be one of torch.float32"),
        (("swiss-roll",), {"dtypes": []}, "dtypes must be a sequence of one dtype or more"),
        (("swiss-roll",), {"dtypes": torch.float32}, "dtypes must be a sequence of one dtype or more"),
        (("swiss-roll",), {"prediction": "v"}, "prediction of the checkpoint is eps, got v"),
        (("swiss-roll",), {"solver": "rk45"}, "solver must be one of"),
        (("swiss-roll",), {"steps": 0}, "steps must be at least 1"),
        (("swiss-roll",), {"seed": -1}, "seed must be in"),
        (("swiss-roll",), {"compile": 1}, "compile must be True or False"),
        (("swiss-roll",), {"device": "gpu"}, "device 'gpu' cannot be used"),
        (("nothing",), {}, "there is no checkpoint nothing"),
        ((MLP(),), {}, "sample_shape must be given"),
        ((MLP(), (0,)), {}, "sample_shape must have elements"),
        ((MLP(), (3,)), {}, "shapes cannot be multiplied"),
        ((3, (2,)), {}, "model must be callable"),
    ],
)
def test_mistakes_are_named(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, OSError, RuntimeError), match=message):
        verify(*arguments, **(FEW | options))


# The command --------------------------------------------------------------------------------------------------------


def _command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", *map(str, arguments)])
    out, err = capsys.readouterr()
    return end.value.code, out, err


@pytest.mark.slow
def test_the_command_as_a_user_calls_it(tmp_path: Path) -> None:
    options = ["--steps", "20", "--dtype", "float32", "--device", "cpu", "--json", "report.json"]
    command = [sys.executable, "-m", "fastsde", "verify", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("swiss-roll: 256 samples, euler_maruyama, 20 steps, seed 0\ncpu")
    assert "fp32 products: ieee" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    shown = [(row[0], row[-1]) for row in rows if row[1:2] in (["float64"], ["float32"])]
    assert shown[:3] == [("reference", "truth"), ("reference", "yardstick"), ("eager", "pass")]
    assert "eager in float32" in result.stderr
    assert "20/20" in result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["torch"] == torch.__version__
    assert report["n"] == 256
    assert [row["verdict"] for row in report["results"]][:3] == ["truth", "yardstick", "pass"]
    assert report["results"][2]["whole"]["rms"] <= report["results"][2]["whole"]["allowed"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_run_and_a_file_are_checked_and_quietly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(default_config("swiss-roll"), steps=2, batch_size=8)
    Trainer(config, tmp_path / "run").train(progress=False)
    checkpoints.save(tmp_path / "five.safetensors", Checkpoint(MLP(5, (4,)), prediction="eps"))
    for model in ("run", "five.safetensors"):
        code, out, err = _command(capsys, tmp_path / model, "-n", 7, "--steps", 9, "--quiet", "--device", "cpu")
        assert (code, err) == (0, ""), err
        assert ": 7 samples, euler_maruyama, 9 steps, seed 0" in out


def test_an_untrained_network_is_checked_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _command(capsys, "film", "-n", 5, "--steps", 4, "--quiet", "--device", "cpu")
    assert (code, err) == (0, ""), err
    assert out.startswith("film: 5 samples, euler_maruyama, 4 steps, seed 0")


def test_a_failure_ends_with_exit_code_1_and_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _replace_eager(monkeypatch, lambda x, model, table: x * torch.nan)
    monkeypatch.chdir(tmp_path)
    options = ["-n", 8, "--steps", 5, "--quiet", "--device", "cpu", "--dtype", "bfloat16", "--json", "a.json"]
    code, out, err = _command(capsys, "swiss-roll", *options)
    assert code == 1
    assert err == "Error: failed the check: eager in bfloat16\n"
    assert "eager fails: NaN or infinity after 1 step" in out
    failed = json.loads(Path("a.json").read_text())["results"][2]
    assert (failed["verdict"], failed["whole"]) == ("fail", None)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing"], 1, "there is no checkpoint nothing"),
        (["-n", "0"], 2, "0 is not in the range x>=1"),
        (["--dtype", "float64"], 2, "'float64' is not one of"),
        (["--solver", "rk45"], 2, "'rk45' is not one of"),
        (["--device", "gpu"], 1, "device 'gpu' cannot be used"),
        (["--json", "/proc/nowhere/a.json"], 1, "/proc/nowhere/a.json cannot be written"),
    ],
)
def test_mistakes_of_the_command(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, out, err = _command(capsys, *arguments)
    assert (ended, out) == (code, "")
    assert message in err


def test_guidance_by_the_numbers_of_rows() -> None:
    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return y[:, None] - x

    y = torch.ones(3)
    given = {"model_kwargs": {"y": y}, "uncond_kwargs": {"y": 0 * y}, "steps": 4, "dtypes": FP32}
    results = verify(network, (2,), guidance=Guidance(2.0, schedule=[1.0, 2.0, 0.0, 3.0]), **given)
    assert _of(results, "eager").verdict == "pass"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": AdaptiveODE()}, "solver must be a name or a StepTable, whose rows are compared, got AdaptiveODE"),
        ({"guidance": ClassifierGuidance(lambda x, t: x.sum(1))}, "guidance must be a weight or a Guidance"),
    ],
)
def test_what_has_no_rows_to_compare_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        verify(lambda x, t: -x, (2,), **options)
