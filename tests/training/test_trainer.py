from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from fastsde import NonFiniteError, checkpoints, noise, reference
from fastsde.data import Dataset, swiss_roll
from fastsde.training import TrainConfig, Trainer, default_config, run_folder, saved_config, tutorial_config
from fastsde.training.steps import EagerSteps
from fastsde.training.trainer import _Line

pytestmark = pytest.mark.usefixtures("every_checkpoint")

TINY = replace(
    default_config("swiss-roll"),
    model={"architecture": "MLP", "shape": [2], "hidden": [8], "activation": "SiLU"},
    steps=60,
    batch_size=16,
    checkpoint_every=20,
    log_every=10,
)
IMAGES = replace(
    default_config("digits"),
    model={"architecture": "UNet", "image_channels": 1, "image_size": [28, 28], "channels": [4, 8]},
    data_size=50,
    steps=6,
    batch_size=4,
    checkpoint_every=3,
    log_every=2,
)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return checkpoints.read(directory / "checkpoint.safetensors")[0]


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def log_of(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("config", [TINY, IMAGES], ids=["mlp", "unet"])
def test_a_run_is_a_function_of_its_config(tmp_path: Path, config: TrainConfig) -> None:
    for name in ("a", "b"):
        torch.manual_seed(hash(name))  # torch's own state must not matter
        Trainer(config, tmp_path / name).train(progress=False)
    assert_same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    Trainer(replace(config, seed=1), tmp_path / "c").train(progress=False)
    assert not torch.equal(next(iter(tensors(tmp_path / "a").values())), next(iter(tensors(tmp_path / "c").values())))


def test_training_leaves_the_generator_of_torch_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Trainer(TINY, tmp_path).train(progress=False)
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture
def eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses eager steps also for MLPs; native steps are tested in tests/kernels/test_mlp_training.py."""
    monkeypatch.setattr("fastsde.training.trainer.can_run_natively", lambda *args: False)


@pytest.mark.usefixtures("eager_steps")
def test_the_trainer_takes_the_steps_of_the_reference(tmp_path: Path) -> None:
    # The trainer draws noise for many steps at once; the reference draws each step's own. The result is the same.
    config = replace(TINY, ema_decay=0.0, lr_schedule="constant")
    trainer = Trainer(config, tmp_path)
    trainer.train(progress=False)
    start = Trainer(config, tmp_path / "fresh")
    keys = noise.sample_keys(config.seed, config.batch_size)
    for step in range(config.steps):
        reference.train_step(start.model, start.optimizer, start.dataset.x, keys, step, config.objective)
    for ours, theirs in zip(trainer.model.parameters(), start.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("config", [TINY, IMAGES, replace(TINY, ema_decay=0.0)], ids=["mlp", "unet", "no-ema"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path: Path, config: TrainConfig, stop: int) -> None:
    Trainer(config, tmp_path / "whole").train(progress=False)
    # A killed run stops after some checkpoint, with more log lines than that checkpoint has steps. The first
    # checkpoint is that of step 0.
    trainer = Trainer(config, tmp_path / "cut")
    saves = 0

    def save_then_die(original=trainer._save) -> None:
        nonlocal saves
        if saves == stop:
            raise KeyboardInterrupt
        saves += 1
        original()

    trainer._save = save_then_die  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt):  # the run may end earlier
        trainer.train(progress=False)
    Trainer(config, tmp_path / "cut", resume=True).train(progress=False)
    assert_same(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))
    # In the log lines only the speed may differ.
    whole, cut = (
        [{k: v for k, v in x.items() if k not in ("steps_per_s", "left_s")} for x in log_of(tmp_path / n)]
        for n in ("whole", "cut")
    )
    assert [x["step"] for x in whole] == [x["step"] for x in cut]
    assert [x["lr"] for x in whole] == [x["lr"] for x in cut]


EVERY_CHECKPOINT = """
import runpy
from fastsde.training import run_folder
run_folder.CHECKPOINT_SECONDS = 0.0
runpy.run_module("fastsde", run_name="__main__")
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_resumes_to_the_same_bits(tmp_path: Path) -> None:
    options = ["--steps", "1200", "--checkpoint-every", "5", "--batch-size", "32", "--quiet"]

    def command(name: str) -> list[str]:
        return [
            sys.executable,
            "-c",
            EVERY_CHECKPOINT,
            "train",
            "swiss-roll",
            "--dir",
            str(tmp_path / name),
            "--resume",
            *options,
        ]

    subprocess.run(command("whole"), check=True, capture_output=True, timeout=300)
    # With a checkpoint every 5 steps the run spends much of its time on writing, so that a kill often hits a write.
    for delay in (0.05, 0.4):
        process = subprocess.Popen(command("cut"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        seen = saved_step(tmp_path / "cut")
        deadline = time.monotonic() + 120
        while process.poll() is None and saved_step(tmp_path / "cut") == seen and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 0 < saved_step(tmp_path / "cut") <= 1200
    finished = subprocess.run(command("cut"), check=True, capture_output=True, text=True, timeout=300)
    assert finished.stdout.strip() == str(tmp_path / "cut" / "checkpoint.safetensors")
    assert_same(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))
    assert [line["step"] for line in log_of(tmp_path / "cut")] == list(range(100, 1201, 100))
    assert not list((tmp_path / "cut").glob(".checkpoint-*"))


def saved_step(directory: Path) -> int:
    path = directory / "checkpoint.safetensors"
    return checkpoints.read(path)[1]["record"]["step"] if path.exists() else 0


def test_checkpoints_that_come_fast_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainer(TINY, tmp_path / "each").train(progress=False)
    monkeypatch.setattr(run_folder, "CHECKPOINT_SECONDS", math.inf)
    steps, write, lines = [], checkpoints.write, []

    def counted(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, object]) -> None:
        steps.append(metadata["record"]["step"])
        log = tmp_path / "few" / "log.jsonl"
        lines.append(len(log_of(tmp_path / "few")) if log.exists() else 0)
        write(path, tensors, metadata)

    monkeypatch.setattr(checkpoints, "write", counted)
    trainer = Trainer(TINY, tmp_path / "few")
    trainer.train(progress=False)
    assert steps == [0, 60]
    assert lines == [0, 6]  # log lines are written before the checkpoint of their steps
    assert_same(tensors(tmp_path / "each"), tensors(tmp_path / "few"))


def test_a_checkpoint_that_comes_too_soon_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, write, report = [], checkpoints.write, Trainer._report

    def counted(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, object]) -> None:
        steps.append(metadata["record"]["step"])
        write(path, tensors, metadata)

    def timed(self: Trainer, *args: Any, **kwargs: Any) -> None:
        report(self, *args, **kwargs)
        monkeypatch.setattr(run_folder, "CHECKPOINT_SECONDS", 0.0 if self.step in (10, 30) else math.inf)

    monkeypatch.setattr(checkpoints, "write", counted)
    monkeypatch.setattr(Trainer, "_report", timed)
    Trainer(TINY, tmp_path).train(progress=False)
    assert steps == [0, 30, 60]  # none is due at step 10; that of step 20 is written at step 30


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    Trainer(TINY, tmp_path).train(progress=False)
    before = tensors(tmp_path)
    Trainer(TINY, tmp_path, resume=True).train(progress=False)
    assert_same(before, tensors(tmp_path))


def test_a_constant_learning_rate_may_be_taken_further_but_a_cosine_not(tmp_path: Path) -> None:
    constant = replace(TINY, lr_schedule="constant")
    Trainer(constant, tmp_path / "a").train(progress=False)
    longer = replace(constant, steps=90)
    Trainer(longer, tmp_path / "a", resume=True).train(progress=False)
    Trainer(longer, tmp_path / "b").train(progress=False)
    assert_same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    Trainer(TINY, tmp_path / "c").train(progress=False)
    with pytest.raises(ValueError, match=r"steps=60, got 90"):
        Trainer(replace(TINY, steps=90), tmp_path / "c", resume=True)


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    Trainer(TINY, tmp_path).train(progress=False)
    with pytest.raises(FileExistsError, match="already holds a run"):
        Trainer(TINY, tmp_path)
    with pytest.raises(ValueError, match=r"seed=0, got 3"):
        Trainer(replace(TINY, seed=3), tmp_path, resume=True)


def test_a_run_that_failed_before_its_first_step_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Trainer(replace(TINY, seed=5), tmp_path / "a")
    monkeypatch.setattr(failing, "_steps", lambda work: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.train(progress=False)
    assert saved_config(tmp_path / "a" / "checkpoint.safetensors").seed == 5  # and it could be resumed
    other = Trainer(TINY, tmp_path / "a")
    other.train(progress=False)
    Trainer(TINY, tmp_path / "b").train(progress=False)
    assert_same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    # A folder that is not a run is not overwritten either.
    for name, write in (
        ("exported", lambda path: checkpoints.save(path, other.checkpoint())),
        ("text", lambda path: path.write_text("mine")),
    ):
        path = tmp_path / name / "checkpoint.safetensors"
        path.parent.mkdir()
        write(path)
        with pytest.raises(FileExistsError, match="already holds a run"):
            Trainer(TINY, path.parent)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    first = Trainer(replace(TINY, steps=40), tmp_path)
    second = Trainer(replace(TINY, steps=40), tmp_path)
    original = first._save

    def save_while_the_other_tries() -> None:
        with pytest.raises(RuntimeError, match="another process is training"):
            second.train(progress=False)
        original()

    first._save = save_while_the_other_tries  # type: ignore[method-assign]
    first.train(progress=False)
    assert saved_step(tmp_path) == 40


@pytest.mark.usefixtures("eager_steps")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, torch.OutOfMemoryError])
def test_a_run_that_an_error_ends_has_all_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    monkeypatch.setattr(run_folder, "LOG_SECONDS", math.inf)
    monkeypatch.setattr(run_folder, "CHECKPOINT_SECONDS", math.inf)
    trainer = Trainer(TINY, tmp_path)
    trainer._captures = True  # a line is then read when the next one has been begun
    trainer._steps = lambda work: EagerSteps(work, trainer._here)  # type: ignore[method-assign]
    take, on_disk = EagerSteps.take, []

    def cut(self: EagerSteps, first: int, count: int) -> torch.Tensor:
        if first == 45:
            on_disk.append(len(log_of(tmp_path)))
            raise error("here")
        return take(self, first, count)

    monkeypatch.setattr(EagerSteps, "take", cut)
    with pytest.raises(error, match="here"):
        trainer.train(progress=False)
    assert on_disk == [1]  # the first is written at once, and the others wait
    assert [line["step"] for line in log_of(tmp_path)] == [10, 20, 30, 40]
    assert saved_step(tmp_path) == 0


class _Reads(TorchDispatchMode):
    """Counts the numbers that Python reads from PyTorch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("eager_steps")
def test_losses_are_read_for_log_lines_alone(tmp_path: Path) -> None:
    reads = []
    for log_every in (10, 60):
        with _Reads() as mode:
            Trainer(replace(TINY, log_every=log_every, checkpoint_every=60), tmp_path / str(log_every)).train(False)
        reads.append(mode.count)
    assert reads[0] - reads[1] == 5  # lines
    assert reads[1] < 60 / 2


@pytest.mark.usefixtures("eager_steps")
@pytest.mark.parametrize("when", ["optimizer", "average", "log"])
def test_ctrl_c_ends_the_step_and_saves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    config = replace(TINY, checkpoint_every=1000, log_every=1)
    Trainer(config, tmp_path / "whole").train(progress=False)
    trainer = Trainer(config, tmp_path / "cut")
    calls = 0

    def interrupting(original):
        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 13:
                signal.raise_signal(signal.SIGINT)
            return original(*args, **kwargs)

        return wrapped

    target, name = {
        "optimizer": (trainer.optimizer, "step"),
        "average": (sys.modules["fastsde.training.steps"], "ema_update"),
        "log": (trainer, "_log"),
    }[when]
    monkeypatch.setattr(target, name, interrupting(getattr(target, name)))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(progress=False)
    assert saved_step(tmp_path / "cut") == 13
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    monkeypatch.setattr(target, name, getattr(target, name).__wrapped__)
    Trainer(config, tmp_path / "cut", resume=True).train(progress=False)
    assert_same(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))


def test_a_run_can_be_resumed_from_before_its_first_step(tmp_path: Path) -> None:
    Trainer(TINY, tmp_path / "whole").train(progress=False)
    trainer = Trainer(TINY, tmp_path / "cut")
    trainer._run = lambda *args: None  # type: ignore[method-assign]  # killed as it began
    trainer.train(progress=False)
    assert saved_config(tmp_path / "cut" / "checkpoint.safetensors") == TINY
    Trainer(TINY, tmp_path / "cut", resume=True).train(progress=False)
    assert_same(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))


def test_a_trainer_that_was_overtaken_does_no_harm(tmp_path: Path) -> None:
    late = Trainer(TINY, tmp_path)
    Trainer(TINY, tmp_path).train(progress=False)
    before, log = tensors(tmp_path), log_of(tmp_path)
    with pytest.raises(RuntimeError, match="come to step 60 since this trainer was made at step 0"):
        late.train(progress=False)
    assert_same(before, tensors(tmp_path))
    assert log == log_of(tmp_path)


def test_a_diverging_run_is_reported_and_keeps_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(TINY, tmp_path / "a")
    trainer.model.net[0].bias.register_hook(lambda grad: grad * float("nan"))
    with monkeypatch.context() as patch:
        patch.setattr("fastsde.training.trainer.can_run_natively", lambda *args: False)
        with pytest.raises(NonFiniteError, match="loss became nan before step 10"):
            trainer.train(progress=False)
    assert saved_step(tmp_path / "a") == 0
    Trainer(TINY, tmp_path / "a").train(progress=False)  # a run without a step starts again
    assert [line["step"] for line in log_of(tmp_path / "a")] == [10, 20, 30, 40, 50, 60]
    # Weights may become non-finite before the loss does.
    wild = replace(TINY, lr=1e38, checkpoint_every=3, log_every=1000)
    with pytest.raises(NonFiniteError, match="weights became NaN or infinity before step"):
        Trainer(wild, tmp_path / "b").train(progress=False)
    assert all(torch.isfinite(tensor).all() for tensor in tensors(tmp_path / "b").values())


def test_a_config_may_come_with_tuples_or_lists(tmp_path: Path) -> None:
    config = replace(TINY, model={**TINY.model, "hidden": (8,)}, pixel_range=[-1.0, 1.0])
    Trainer(config, tmp_path).train(progress=False)
    Trainer(TINY, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": None}, TypeError, "data must be a str, got NoneType"),
        ({"model": 3}, TypeError, r"model must be an architecture \(a dict\) or a name, got int"),
        ({"model": "MLP"}, ValueError, "or 'package.module:function', got 'MLP'"),
        ({"model": {}}, ValueError, "architecture must be one of MLP, UNet, got None"),
        ({"model": {"architecture": "MLP", "hidden": [8.0]}}, TypeError, r"hidden\[0\] must be an int, got float"),
        ({"data_size": 0}, ValueError, "data_size must be at least 1, got 0"),
        ({"data_size": 10.0}, TypeError, "data_size must be an int, got float"),
        ({"pixel_range": 1.0}, TypeError, r"pixel_range must be \(low, high\), got float"),
        ({"pixel_range": (0.0, "1")}, TypeError, r"pixel_range\[1\] must be a number, got str"),
        ({"pixel_range": (1.0, 0.0)}, ValueError, r"pixel_range must be \(low, high\).*got \(1.0, 0.0\)"),
        ({"steps": 2**28}, ValueError, r"steps must be in \[1, 2\^28\), got 268435456"),
        ({"compile": 1}, TypeError, "compile must be True or False, got 1"),
        ({"seed": True}, TypeError, "seed must be an int, got bool"),
        ({"init": Path("runs")}, TypeError, "init must be a str, got PosixPath"),
        ({"init": None}, TypeError, "init must be a str, got NoneType"),
        ({"sde": {"beta_min": 0.1}}, TypeError, r"sde must be a process such as fastsde.VPSDE\(\), got dict"),
    ],
    ids=repr,
)
def test_a_config_names_what_is_wrong(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({}, ValueError, r"missing \['data', 'model'\], unknown \[\]"),
        ({"data": "mnist", "width": 3}, ValueError, r"missing \['model'\], unknown \['width'\]"),
        ([], TypeError, "values must be a dict, got list"),
        (asdict(TINY) | {"sde": 3}, TypeError, "sde must be a dict, got int"),
        (asdict(TINY) | {"sde": {"beta": 3}}, TypeError, "beta"),
        (asdict(TINY) | {"pixel_range": None}, TypeError, "pixel_range must be .*got NoneType"),
        (asdict(TINY) | {"lr": "fast"}, TypeError, "lr must be a number, got str"),
    ],
    ids=["empty", "missing and unknown", "list", "sde", "sde fields", "pixel_range", "lr"],
)
def test_a_config_of_wrong_values_names_them(values: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainConfig.from_dict(values)


def test_fields_with_a_default_may_be_left_out() -> None:
    assert TrainConfig.from_dict({"data": "swiss-roll", "model": TINY.model}) == TrainConfig("swiss-roll", TINY.model)


def test_a_config_that_cannot_be_read_names_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    for record in ({}, {"config": {}}, {"config": asdict(TINY) | {"lr": -1}}):
        checkpoints.write(path, {}, {"resumable": True, "record": record})
        with pytest.raises(ValueError, match=r"odd\.safetensors was written by another version"):
            saved_config(path)


def test_a_device_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device 'gpu' cannot be used"):
        Trainer(TINY, tmp_path, device="gpu")


PIXELS = torch.arange(5 * 784).reshape(5, 1, 28, 28).to(torch.uint8)


@pytest.mark.parametrize(
    ("data", "seen", "value_range"),
    [
        (Dataset("own", PIXELS, scale=1 / 255, shift=0.0), PIXELS / 255, (0.0, 1.0)),
        (Dataset("own", PIXELS), PIXELS / 51 - 2, (-2.0, 3.0)),
        (Dataset("own", PIXELS.numpy()[:, 0]), PIXELS / 51 - 2, (-2.0, 3.0)),
        (Dataset("own", PIXELS.movedim(1, -1)), PIXELS / 51 - 2, (-2.0, 3.0)),
        (Dataset("own", PIXELS > 127), (PIXELS > 127) * 5.0 - 2, (-2.0, 3.0)),
        (Dataset("own", PIXELS.double().numpy() / 255), PIXELS / 255, (0.0, 1.0)),
        (Dataset("own", PIXELS[:, 0] / 255, scale=2, shift=-1), PIXELS / 255 * 2 - 1, (-1.0, 1.0)),
    ],
    ids=["own scale", "pixels", "no channel", "channels last", "bool", "floats", "scaled floats"],
)
def test_images_of_any_kind_are_seen_in_their_range(
    tmp_path: Path, data: Dataset, seen: torch.Tensor, value_range: tuple[float, float]
) -> None:
    config = replace(IMAGES, data="own", pixel_range=(-2.0, 3.0), steps=1)
    trainer = Trainer(config, tmp_path / "run", dataset=data)
    assert trainer.checkpoint().value_range == value_range
    x_0 = reference.load_batch(trainer.dataset.x, None, trainer.dataset.scale, trainer.dataset.shift)
    torch.testing.assert_close(x_0, seen, rtol=0, atol=1e-6)
    assert not (tmp_path / "run").exists()
    trainer.train(progress=False)
    assert checkpoints.load(tmp_path / "run").value_range == value_range


def test_data_of_another_dtype_resume_to_the_same_bits(tmp_path: Path) -> None:
    config, data = replace(TINY, data="own"), Dataset("own", swiss_roll(100).x)
    Trainer(config, tmp_path / "whole", dataset=data).train(progress=False)
    trainer = Trainer(config, tmp_path / "cut", dataset=data)
    trainer._run = lambda *args: None  # type: ignore[method-assign]
    trainer.train(progress=False)
    doubled = Dataset("own", data.x.double().numpy())
    Trainer(config, tmp_path / "cut", dataset=doubled, resume=True).train(progress=False)
    assert_same(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))


@pytest.mark.parametrize("natively", [True, False], ids=["native", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_default_dtype_does_not_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, natively: bool
) -> None:
    config = replace(TINY, steps=20, lr_warmup=5)
    if not natively:
        monkeypatch.setattr("fastsde.training.trainer.can_run_natively", lambda *args: False)
    Trainer(config, tmp_path / "plain").train(progress=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        Trainer(config, tmp_path / "other").train(progress=False)
        Trainer(config, tmp_path / "other", resume=True)
        loaded = checkpoints.load(tmp_path / "other").model
    finally:
        torch.set_default_dtype(before)
    assert_same(tensors(tmp_path / "plain"), tensors(tmp_path / "other"))
    assert log_of(tmp_path / "plain")[0]["loss"] == log_of(tmp_path / "other")[0]["loss"]
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())


def test_seeds_of_more_than_32_bits_work(tmp_path: Path) -> None:
    Trainer(replace(TINY, seed=2**40 + 1), tmp_path / "a")
    with pytest.raises(ValueError, match="seed must be in"):
        replace(TINY, seed=2**63)


def test_the_loss_falls_on_the_swiss_roll(tmp_path: Path) -> None:
    Trainer(replace(default_config("swiss-roll"), steps=400, log_every=100), tmp_path).train(progress=False)
    losses = [line["loss"] for line in log_of(tmp_path)]
    # Predicting nothing costs 1; a Gaussian of the right covariance costs 0.24.
    assert losses[-1] < 0.3 < losses[0]


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = replace(TINY, steps=1000, lr=1.0, lr_warmup=10)
    assert [config.learning_rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert config.learning_rate(10) == 1.0
    assert config.learning_rate(505) == pytest.approx(0.5)
    assert config.learning_rate(1000) == pytest.approx(0.0, abs=1e-12)
    assert replace(config, lr_schedule="constant").learning_rate(999) == 1.0


def test_the_moving_average_is_what_is_sampled_from(tmp_path: Path) -> None:
    config = replace(TINY, steps=3, ema_decay=0.5, checkpoint_every=1, lr=0.1)
    trainer = Trainer(config, tmp_path)
    average = [p.detach().clone() for p in trainer.model.parameters()]
    original = trainer._save

    def follow() -> None:
        decay = config.ema_decay_at(trainer.step - 1)
        for ours, weight in zip(average, trainer.model.parameters(), strict=True):
            ours.mul_(decay).add_(weight.detach(), alpha=1 - decay)
        original()

    trainer._save = follow  # type: ignore[method-assign]
    trainer.train(progress=False)
    loaded = checkpoints.load(tmp_path).model
    for ours, theirs in zip(average, loaded.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # a few roundings of weights of order 1
    assert not torch.equal(next(loaded.parameters()), next(trainer.model.parameters()))


def test_bf16_training_stays_close_to_fp32(tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        Trainer(replace(IMAGES, precision=precision), tmp_path / precision).train(progress=False)
        losses.append(log_of(tmp_path / precision)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=2**-8)  # the rounding of bf16
    assert losses[0] != losses[1]


def test_the_recipes() -> None:
    tutorial = tutorial_config("swiss-roll")
    assert (tutorial.prediction, tutorial.weighting, tutorial.ema_decay) == ("score", "sigma2", 0.0)
    assert (tutorial.steps, tutorial_config("mnist").steps) == (600_000, 375_000)
    assert tutorial_config("mnist").pixel_range == (0.0, 1.0)
    with pytest.raises(ValueError, match="swiss-roll, digits, mnist, got 'moons'"):
        default_config("moons")


def test_a_config_survives_the_way_through_a_checkpoint(tmp_path: Path) -> None:
    Trainer(TINY, tmp_path).train(progress=False)
    assert saved_config(tmp_path / "checkpoint.safetensors") == TINY


def test_a_network_alone_cannot_be_resumed(tmp_path: Path) -> None:
    Trainer(TINY, tmp_path / "run").train(progress=False)
    exported = tmp_path / "exported" / "checkpoint.safetensors"
    checkpoints.save(exported, checkpoints.load(tmp_path / "run"))
    with pytest.raises(ValueError, match="not what training needs"):
        Trainer(TINY, exported.parent, resume=True)


def test_model_and_data_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\), the data have \(1, 28, 28\)"):
        Trainer(replace(TINY, data="digits", data_size=None), tmp_path)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([1.0], TypeError, "item 0 must be a tensor or a NumPy array, got float"),
        ((), ValueError, "source must have at least one item, got none"),
        (3, TypeError, "dataset must be a .*, got int"),
        (iter([torch.zeros(2)]), TypeError, "dataset must be a .*, got list_iterator"),
    ],
    ids=["list", "empty", "number", "iterator"],
)
def test_data_must_be_a_dataset(tmp_path: Path, data: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Trainer(TINY, tmp_path / "run", dataset=data)
    with pytest.raises(TypeError, match="config must be a TrainConfig, got dict"):
        Trainer(asdict(TINY), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_data_set_may_be_the_users_own(tmp_path: Path) -> None:
    data = Dataset("moons", swiss_roll(100).x * 2)
    checkpoint = Trainer(replace(TINY, data="moons"), tmp_path, dataset=data).train(progress=False)
    assert checkpoint.data == "moons"
    assert checkpoint.value_range is None


def test_a_run_may_start_from_the_weights_of_another(tmp_path: Path) -> None:
    Trainer(TINY, tmp_path / "first").train(progress=False)
    config = replace(TINY, init=str(tmp_path / "first"), seed=1)
    start = Trainer(config, tmp_path / "second")
    first = checkpoints.load(tmp_path / "first").model
    for ours, theirs in zip(start.model.parameters(), first.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert start.train(progress=False).record["earlier_steps"] == TINY.steps
    (tmp_path / "first" / "checkpoint.safetensors").unlink()
    resumed = Trainer(config, tmp_path / "second", resume=True)  # a resumed run has its own weights
    assert resumed.earlier_steps == TINY.steps
    third = replace(TINY, init=str(tmp_path / "second"))
    assert Trainer(third, tmp_path / "third").earlier_steps == 2 * TINY.steps
    checkpoints.save(tmp_path / "own.safetensors", replace(checkpoints.load(tmp_path / "second"), record={}))
    assert Trainer(replace(TINY, init=str(tmp_path / "own.safetensors")), tmp_path / "fifth").earlier_steps == 0
    with pytest.raises(ValueError, match="init must have the model of the run"):
        Trainer(replace(TINY, init="swiss-roll"), tmp_path / "fourth")


class _Loss:
    """A loss that is available or must be waited for."""

    def __init__(self, is_there: bool) -> None:
        self.is_ready = lambda: is_there

    def wait(self) -> torch.Tensor:
        return torch.tensor(0.5)


def test_losses_are_logged_as_they_come_and_share_their_rate_where_they_come_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    trainer = Trainer(TINY, tmp_path / "run")
    trainer._reported = 0.0
    (tmp_path / "run").mkdir()
    lines = deque(_Line(10 * k, 10, _Loss(is_there=k < 3)) for k in range(1, 5))
    with tqdm(disable=True) as bar:
        clock[0] = 2.0
        trainer._report(bar, lines, leave=4)
        assert [line.step for line in lines] == [30, 40]
        clock[0] = 3.0
        trainer._report(bar, lines, leave=1)
        assert [line.step for line in lines] == [40]
        clock[0] = 5.0
        trainer._report(bar, lines)
    trainer._lines.flush()
    log = log_of(tmp_path / "run")
    assert [(line["step"], line["steps_per_s"]) for line in log] == [(10, 10.0), (20, 10.0), (30, 10.0), (40, 5.0)]
