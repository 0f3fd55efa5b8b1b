"""Batches of streamed data: those in memory, for any number of workers, from any step on, and again."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsde import checkpoints, noise
from fastsde.conditions import Condition
from fastsde.data import Dataset, StreamedDataset
from fastsde.models import MLP
from fastsde.reference import MOST_ROWS, data_order
from fastsde.training import TrainConfig, Trainer
from fastsde.training.batches import Batch, batches_of

pytestmark = pytest.mark.usefixtures("every_checkpoint")

CPU = torch.device("cpu")
LABELS = torch.arange(11) % 3
DATA = Dataset("own", torch.arange(22.0).reshape(11, 2), conditions={"label": LABELS})
CONFIG = TrainConfig("own", MLP(2, (4,), classes=3).config, steps=70, batch_size=5, condition_dropout=0.2, seed=3)


class Items(torch.utils.data.Dataset[Any]):
    """The data item by item; it cannot be pickled, which workers do not need."""

    classes = ("a", "b", "c")

    def __init__(self, change: Callable[[Tensor], Any] = lambda x: x, wrong: int = -1) -> None:
        self.change, self.wrong = change, wrong

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        if i == self.wrong:
            raise ZeroDivisionError(f"item {i} is broken")
        return self.change(DATA.x[i]), int(LABELS[i])


def stream(config: TrainConfig, items: Any, part: slice = slice(5)) -> Any:
    return batches_of(StreamedDataset("own", items), ["label"], config, CPU, part)


def order(config: TrainConfig, step: int, n: int = len(DATA)) -> Tensor:
    return data_order(noise.sample_keys(config.seed, config.batch_size), step, n)


def assert_same(ours: Batch, theirs: Batch) -> None:
    assert torch.equal(ours.x_0, theirs.x_0)
    assert ours.conditions.keys() == theirs.conditions.keys()
    assert all(torch.equal(ours.conditions[name], value) for name, value in theirs.conditions.items())


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_streamed_batches_are_those_in_memory_from_any_step_on(workers: int) -> None:
    config = replace(CONFIG, workers=workers)
    memory = batches_of(DATA, ["label"], config, CPU, slice(5))
    before = torch.get_rng_state()
    whole, part = stream(config, Items()), stream(config, Items(), slice(3, 5))
    for step in (*range(4), 63, 64, 65, 69, 2, 3):  # positions are drawn for 64 steps at once
        expected = memory.take(step, order(config, step))
        found = whole.take(step, order(config, step))
        assert_same(found, expected)
        assert found.conditions["label"].dtype == torch.int64
        rows = part.take(step, order(config, step)[3:])  # as on another rank
        assert_same(rows, Batch(expected.x_0[3:], {"label": expected.conditions["label"][3:]}))
    assert torch.equal(before, torch.get_rng_state())


def crop(x: Tensor) -> Tensor:
    """A random transform of each kind."""
    return x + random.random() + float(np.random.rand()) + torch.rand(2)  # noqa: NPY002


def test_random_transforms_repeat() -> None:
    found = []
    for seed, workers, first in ((0, 0, 0), (1, 2, 0), (2, 0, 2)):  # however many processes load, and from where
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)  # noqa: NPY002
        states = random.getstate(), np.random.get_state()[1], torch.get_rng_state()  # noqa: NPY002
        batches = stream(replace(CONFIG, workers=workers), Items(crop))
        found.append([batches.take(step, order(CONFIG, step)).x_0 for step in range(first, 4)])
        now = random.getstate(), np.random.get_state()[1], torch.get_rng_state()  # noqa: NPY002
        assert states[0] == now[0]
        assert (states[1] == now[1]).all()
        assert torch.equal(states[2], now[2])
    for step in range(4):
        assert torch.equal(found[0][step], found[1][step])
        assert step < 2 or torch.equal(found[0][step], found[2][step - 2])
    shifts = torch.cat([x - DATA.x[order(CONFIG, step)] for step, x in enumerate(found[0])])
    assert len(shifts.unique()) == shifts.numel()  # each place of each step has its own
    other = stream(replace(CONFIG, seed=4), Items(crop)).take(0, order(CONFIG, 0))
    assert not torch.equal(other.x_0, found[0][0])


def tensors(folder: Path) -> dict[str, Tensor]:
    return checkpoints.read(folder / "checkpoint.safetensors")[0]


@pytest.mark.slow
def test_a_streamed_run_is_that_in_memory_and_resumes_to_the_bit(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=12, checkpoint_every=5, log_every=4)
    Trainer(config, tmp_path / "memory", dataset=DATA).train(progress=False)
    cut = Trainer(replace(config, workers=1), tmp_path / "stream", dataset=Items())
    save = cut._save

    def save_then_die() -> None:
        save()
        if cut.step == 5:
            raise RuntimeError("killed")

    cut._save = save_then_die  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="killed"):
        cut.train(progress=False)
    # With another number of workers; the one of the first trainer is still there, and does not keep its lock.
    resumed = Trainer(config, tmp_path / "stream", dataset=Items(), resume=True)
    assert resumed.step == 5
    resumed.train(progress=False)
    ours, theirs = tensors(tmp_path / "stream"), tensors(tmp_path / "memory")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_item_that_fails_ends_the_run_with_its_error(workers: int, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=30, workers=workers)
    with pytest.raises(ZeroDivisionError, match="item 7 is broken"):
        Trainer(config, tmp_path / "a", dataset=Items(wrong=7)).train(progress=False)
    grows = Items(lambda x: x if x[0] < 14 else torch.ones(3))
    with pytest.raises(
        ValueError, match=r"item \d+ of own: the model takes samples of shape \(2,\), the data have \(3"
    ):
        Trainer(config, tmp_path / "b", dataset=grows).train(progress=False)


def test_a_batch_may_be_larger_than_the_data(tmp_path: Path) -> None:
    one = StreamedDataset("own", [(torch.ones(2), 2)], described={"label": Condition(classes=3)})
    trainer = Trainer(replace(CONFIG, steps=2), tmp_path, dataset=one)
    trainer.train(progress=False)
    batch = batches_of(one, ["label"], CONFIG, CPU, slice(5)).take(0, order(CONFIG, 0, 1))
    assert_same(batch, Batch(torch.ones(5, 2), {"label": torch.full((5,), 2)}))


class Billion:
    """More rows than a uniform of 24 bits can tell apart, or than memory could hold positions of."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, i: int) -> Tensor:
        self.seen.append(i)
        return torch.tensor([float(i)])


def test_all_rows_of_a_very_large_data_set_can_be_drawn() -> None:
    source = Billion()
    config = replace(CONFIG, batch_size=256)
    batches = batches_of(StreamedDataset("own", source), [], config, CPU, slice(256))
    source.seen.clear()
    for step in range(3):
        batches.take(step, order(config, step, 10**9))
    seen = torch.tensor(source.seen[:768])
    assert torch.equal(seen, torch.cat([order(config, step, 10**9) for step in range(3)]))
    assert int(seen.min()) < 10**7
    assert 99 * 10**7 < int(seen.max()) < 10**9
    # With 24 bits, the positions would be those of a grid of 59.6 rows.
    keys = noise.sample_keys(3, 256)
    assert len((seen % 60).unique()) == 60
    u = noise.uniform(keys, 0, (2,), noise.STREAM_DATA_ORDER).double()
    assert torch.equal(seen[:256], ((u[:, 0] + u[:, 1] / 2**24) * 10**9).long())
    # Nothing changes for the data that 24 bits are enough for; and steps may be drawn at once.
    assert torch.equal(data_order(keys, 5, MOST_ROWS), (noise.uniform(keys, 5, (), 3).double() * MOST_ROWS).long())
    steps = torch.arange(2)
    assert torch.equal(data_order(keys, steps, 10**9)[1], data_order(keys, 1, 10**9))


SCRIPT = """
import sys, torch
from fastsde.training import TrainConfig, Trainer, run_folder
from fastsde.models import MLP
run_folder.CHECKPOINT_SECONDS = 0.0

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 50
    def __getitem__(self, i):
        return torch.rand(2) + i

config = TrainConfig("items", MLP(2, (4,)).config, steps=int(sys.argv[2]), batch_size=4, workers=2, checkpoint_every=5,
                     lr_schedule="constant", log_every=5)
Trainer(config, sys.argv[1], dataset=Items(), resume=True).train(progress=False)
"""


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_run_leaves_no_workers_and_resumes_to_the_bit(tmp_path: Path) -> None:
    def command(folder: str, steps: int) -> list[str]:
        return [sys.executable, "-c", SCRIPT, str(tmp_path / folder), str(steps)]

    def saved() -> int:
        path = tmp_path / "cut" / "checkpoint.safetensors"
        return checkpoints.read(path)[1]["record"]["step"] if path.exists() else 0

    deadline, workers = time.monotonic() + 200, list[int]()
    for sent in (signal.SIGKILL, signal.SIGINT):  # the second run starts while the workers of the first are there
        process = subprocess.Popen(command("cut", 10**6), stderr=subprocess.PIPE)
        try:
            before = saved()
            while saved() < before + 10:
                assert process.poll() is None
                assert time.monotonic() < deadline
            found = children(process.pid)
            assert len(found) >= 2
            workers += found
            process.send_signal(sent)
            error = process.communicate(timeout=60)[1].decode()
        finally:
            process.kill()  # or a run that goes on would slow all other tests
        assert process.returncode == -sent if sent == signal.SIGKILL else "KeyboardInterrupt" in error
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # they look for their parent every 5 s
        assert time.monotonic() < deadline, f"a worker goes on: {workers}"
    steps = saved() + 5
    for folder in ("cut", "whole"):
        subprocess.run(command(folder, steps), check=True, capture_output=True, timeout=120)
    ours, theirs = tensors(tmp_path / "cut"), tensors(tmp_path / "whole")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
