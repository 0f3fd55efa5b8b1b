"""The command line as a user calls it: successful calls run in a new process, mistakes in this one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

import fastsde
from fastsde import EDM, VPSDE, RectifiedFlow, Sampler, checkpoints, cli, ops, training
from fastsde.checkpoints import Checkpoint
from fastsde.cli.sample import default_picture
from fastsde.models import MLP, Preconditioned, UNet
from fastsde.training import TrainConfig, saved_config


def run(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastsde", *map(str, arguments)]
    given = os.environ | environment
    return subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def small_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    checkpoints.save(path, Checkpoint(UNet(1, 8, (4, 8)), prediction="v", value_range=(-1.0, 1.0)))
    return path


@pytest.mark.slow
def test_sample_draws_the_shipped_swiss_roll(tmp_path: Path) -> None:
    names = ("roll.png", "roll.npz", "roll.gif")
    result = run(
        "sample", "swiss-roll", "-n", 50, "--steps", 30, "--seed", 3, "--quiet",
        "--out", names[0], "--save", names[1], "--animate", names[2], cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert sorted(result.stdout.split()) == sorted(names)
    model = checkpoints.load("swiss-roll")
    expected = fastsde.sample(model.model, (50, 2), prediction=model.prediction, steps=30, seed=3)
    np.testing.assert_allclose(np.load(tmp_path / "roll.npz")["samples"], expected.numpy(), atol=1e-5)
    with Image.open(tmp_path / "roll.png") as picture, Image.open(tmp_path / "roll.gif") as gif:
        assert picture.width > picture.height  # data and samples side by side
        assert gif.n_frames == 31  # the initial state and each row


@pytest.mark.slow
def test_sample_writes_a_picture_by_default_and_its_progress_to_stderr(tmp_path: Path, small_unet: Path) -> None:
    result = run("sample", small_unet, "-n", 3, "--steps", 5, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "small.png\n"
    assert "5/5" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["small.png"]


@pytest.mark.slow
def test_sample_options_reach_the_sampler(tmp_path: Path, small_unet: Path) -> None:
    options = ["--solver", "dpm_solver_pp_2m", "--steps", 4, "--clip", 1.0, "--backend", "reference", "--quiet"]
    for name, extra in (("all", ["-n", 5]), ("last", ["-n", 2, "--first-sample", 3, "--max-batch", 1])):
        result = run("sample", small_unet, *options, *extra, "--save", f"{name}.safetensors", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    whole, last = (load_file(tmp_path / f"{name}.safetensors")["samples"] for name in ("all", "last"))
    torch.testing.assert_close(whole[3:], last, rtol=0, atol=1e-5)  # convolutions round differently by batch size
    assert whole.abs().max() <= 1  # the clip
    options = ["--solver", "unipc", "--solver-option", "order=1", "--solver-option", "variant=bh1", "--steps", 4]
    result = run("sample", "swiss-roll", *options, "--rho", 3, "--spacing", "karras", "--save", "s.npz", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    checkpoint = checkpoints.load("swiss-roll")
    chosen = {"solver_options": {"order": 1, "variant": "bh1"}, "spacing": "karras", "rho": 3.0}
    expected = fastsde.sample(checkpoint, (1000, 2), solver="unipc", steps=4, **chosen)
    assert np.array_equal(np.load(tmp_path / "s.npz")["samples"], expected.numpy())


@pytest.mark.slow
def test_train_export_and_sample_a_run(tmp_path: Path) -> None:
    options = ["--steps", 20, "--batch-size", 8, "--log-every", 5, "--checkpoint-every", 10]
    result = run("train", "swiss-roll", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "runs/swiss-roll/checkpoint.safetensors\n"
    assert "loss=" in result.stderr
    assert "step/s" in result.stderr
    assert len((tmp_path / "runs/swiss-roll/log.jsonl").read_text().splitlines()) == 4
    again = run("train", "swiss-roll", *options, cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr == (
        "Error: runs/swiss-roll already holds a run: go on with it (resume=True, or --resume), delete it, or choose "
        "another folder\n"
    )
    resumed = run("train", "swiss-roll", "--resume", "--quiet", cwd=tmp_path)  # the run's own options
    assert (resumed.returncode, resumed.stderr) == (0, "")
    exported = run("export", "runs/swiss-roll", "net.safetensors", "--dtype", "float16", cwd=tmp_path)
    assert exported.stdout == "net.safetensors\n"
    sampled = run("sample", "net.safetensors", "-n", 4, "--steps", 3, "--quiet", "--save", "x.npz", cwd=tmp_path)
    assert sampled.stdout == "x.npz\n"
    assert np.isfinite(np.load(tmp_path / "x.npz")["samples"]).all()


@pytest.mark.slow
def test_the_tutorial_recipe_trains_its_objective(tmp_path: Path) -> None:
    options = ["--recipe", "tutorial", "--dtype", "bfloat16", "--steps", 1, "--batch-size", 2]
    result = run("train", "digits", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith(
        "runs/digits: 1 steps of batch 2, lr 0.0003 constant, vp, score, bfloat16, seed 0\n"
    )
    assert saved_config(tmp_path / "runs" / "digits" / "checkpoint.safetensors").precision == "bf16"
    loaded = checkpoints.load(tmp_path / "runs" / "digits")
    assert (loaded.prediction, loaded.value_range) == ("score", (0.0, 1.0))


def test_info_tells_what_a_checkpoint_is(tmp_path: Path) -> None:
    sde = EDM(0.01, 30.0)
    checkpoints.save(tmp_path / "a.safetensors", Checkpoint(Preconditioned(MLP(2, (4,)), sde, 0.6), sde, "x0", "roll"))
    result = CliRunner().invoke(cli.main, ["info", str(tmp_path / "a.safetensors")])
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in result.stdout.splitlines())
    assert lines["sde"] == "EDM(sigma_min=0.01, sigma_max=30.0)"
    assert lines["preconditioning"] == "edm, sigma_data 0.6"
    assert (lines["prediction"], lines["sample shape"], lines["parameters"]) == ("x0", "[2]", "26")
    assert "trained" not in lines
    assert re.search(r"sde +VPSDE\(.*\)\n.*\ntrained +[\d,]+ steps", _info("swiss-roll"), re.S)
    if ops.has_native(torch.device("cpu")):
        assert re.search(r"one launch on cpu +yes\n", _info("swiss-roll"))
        assert re.search(r"one launch on cpu +no: Conv2d \(encoder.0\): a program has no such layer\n", _info("mnist"))


def _info(model: str) -> str:
    return CliRunner().invoke(cli.main, ["info", model]).stdout


def test_train_takes_a_process_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = []

    def trainer(config: TrainConfig, *args: object, **kwargs: object) -> SimpleNamespace:
        configs.append(config)
        return SimpleNamespace(train=lambda progress: None)

    monkeypatch.setattr(training, "Trainer", trainer)
    for name in ("rectified_flow", "vp"):
        command = ["train", "swiss-roll", "--dir", str(tmp_path), "--sde", name, "--prediction", "flow", "--quiet"]
        result = CliRunner().invoke(cli.main, command)
        assert result.exit_code == 0, result.output
    assert [config.sde for config in configs] == [RectifiedFlow(), VPSDE()]
    assert configs[0].prediction == "flow"


def test_info_shows_versions_devices_and_backends(tmp_path: Path) -> None:
    result = run("info", cwd=tmp_path, OMP_WAIT_POLICY="active")
    assert result.returncode == 0, result.stderr
    lines = dict(
        line.split(maxsplit=1) for line in result.stdout.splitlines() if " on " not in line and "model" not in line
    )
    assert lines["torch"] == torch.__version__
    assert lines["fastsde"] == fastsde.__version__
    assert "threads wait       active (OMP_WAIT_POLICY)" in result.stdout
    assert "eager on cpu       yes" in result.stdout
    assert "graph on cpu       no: " in result.stdout
    assert "model mnist" in result.stdout
    assert ("native kernels     yes, " in result.stdout) == ops.has_native(torch.device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["sample", "nothing"], 1, "there is no checkpoint nothing"),
        (["sample", "swiss-roll", "--out", "a.xyz"], 2, "a.xyz must end in .png"),
        (["sample", "swiss-roll", "--save", "a.csv"], 2, "a.csv must end in .safetensors or .npz"),
        (["sample", "swiss-roll", "--animate", "a.mp4"], 2, "a.mp4 must end in .gif"),
        (["sample", "swiss-roll", "--solver", "rk45"], 2, "'rk45' is not one of"),
        (["sample", "swiss-roll", "-n", "-1"], 2, "-1 is not in the range x>=0"),
        (["sample", "swiss-roll", "-n", "0"], 2, "there is no picture of 0 samples"),
        (["sample", "swiss-roll", "-n", "0", "--save", "a.npz", "--animate", "a.gif"], 2, "no picture of 0 samples"),
        (["sample", "swiss-roll", "--max-batch", "half"], 2, "half is neither a count of at least 1 nor auto"),
        (["sample", "swiss-roll", "--max-batch", "0"], 2, "0 is neither a count of at least 1 nor auto"),
        (["sample", "swiss-roll", "--clip", "1"], 1, "clip bounds a predicted x_0"),
        (["sample", "swiss-roll", "--device", "gpu"], 1, "device 'gpu' cannot be used"),
        (["sample", "swiss-roll", "--backend", "graph"], 1, "backend 'graph' needs Triton and a CUDA GPU"),
        (["sample", "swiss-roll", "--t-end", "2"], 1, "t_end must be in [0, 1), got 2.0"),
        (["sample", "swiss-roll", "--solver-option", "order"], 2, "'order' must be NAME=VALUE, such as order=3"),
        (["sample", "swiss-roll", "--solver-option", "order=3"], 1, "options['order'] is not an option of euler"),
        (["verify", "--solver", "unipc", "--solver-option", "order=4"], 1, "order must be 1, 2 or 3, got 4"),
        (["verify", "--solver", "unipc", "--solver-option", "order=x"], 1, "order must be an int, got str"),
        (["train", "cifar"], 2, "'cifar' is not one of"),
        (
            ["train", "swiss-roll", "--data", "x"],
            2,
            "for your own data or the folder of MNIST, and swiss-roll",
        ),
        (["train", "digits", "--data", "x"], 2, "--data is for your own data or the folder of MNIST, and digits"),
        (["train", "swiss-roll", "--sigma-data", "1"], 2, "--sigma-data is what --preconditioning edm scales by"),
        (["train", "mnist", "--dtype", "float16"], 2, "'float16' is not one of"),
        (["train", "digits", "--init", "."], 1, "holds no training run: expected checkpoint.safetensors in it"),
        (["train", "swiss-roll", "--sde", "ou"], 2, "'ou' is not one of 'vp', "),
        (["info", "nothing"], 1, "there is no checkpoint nothing (shipped models: swiss-roll, mnist)"),
        (["train", "swiss-roll", "--lr", "-1"], 1, "lr must be positive and finite, got -1.0"),
        (["train", "digits", "--data-size", "2000"], 1, "size must be at most 1797 for digits, got 2000"),
        (["export", "swiss-roll", "a.pt"], 2, "a.pt must end in .safetensors"),
    ],
)
def test_mistakes_end_with_a_message_and_an_exit_code(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (code, "")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_run_is_named_in_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["sample", "."], ["export", ".", "a.safetensors"], ["verify", "."]):
        with pytest.raises(SystemExit, match="1"):
            cli.main(arguments)
        message = f"Error: the folder {tmp_path} holds no training run: expected checkpoint.safetensors in it"
        assert capsys.readouterr().err.startswith(message)


def test_no_samples_make_an_empty_file(tmp_path: Path) -> None:
    cli.main(["sample", "swiss-roll", "-n", "0", "--quiet", "--save", f"{tmp_path}/x.npz"], standalone_mode=False)
    assert np.load(tmp_path / "x.npz")["samples"].shape == (0, 2)


@pytest.mark.parametrize("also", [[], ["--animate", "x.gif", "--save", "x.npz"]])
def test_an_interrupt_ends_with_130_and_says_what_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, also: list[str]
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.chdir(tmp_path)
    where = (fastsde.plotting, "animate_points") if also else (Sampler, "__call__")
    monkeypatch.setattr(*where, interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with pytest.raises(SystemExit, match="130"):
            cli.main(["sample", "swiss-roll", "-n", "2", "--steps", "2", "--quiet", *also])
    finally:
        signal.signal(signal.SIGINT, before)
    written = "only x.npz" if also else "nothing"
    assert capsys.readouterr().err == f"\ninterrupted: {written} was written\n"
    assert [path.name for path in tmp_path.iterdir()] == (["x.npz"] if also else [])


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["sample", "--help"], ["train", "--help"], ["nope"]])
def test_help_and_wrong_usage_need_no_torch(arguments: list[str]) -> None:
    code = f"import sys; sys.modules['torch'] = None; from fastsde.cli import main; main({arguments})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == (2 if arguments == ["nope"] else 0), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_samples_without_a_picture_can_still_be_saved(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "five.safetensors", Checkpoint(MLP(5, (4,))))
    refused = run("sample", "five.safetensors", "-n", 2, "--steps", 2, cwd=tmp_path)
    assert refused.returncode == 1
    assert "shape [5] have no picture: write them with --save" in refused.stderr
    saved = run("sample", "five.safetensors", "-n", 2, "--steps", 2, "--save", "x.npz", "--quiet", cwd=tmp_path)
    assert (saved.returncode, saved.stdout) == (0, "x.npz\n")


@pytest.mark.parametrize(
    ("model", "picture"),
    [
        ("mnist", "mnist.png"),
        ("runs/mnist", "runs-mnist.png"),
        ("runs/mnist/mine.safetensors", "mine.png"),
        ("../runs", "runs.png"),
        (".", "here.png"),
    ],
)
def test_a_picture_is_named_after_its_model(
    model: str, picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert default_picture(model) == Path(picture)
