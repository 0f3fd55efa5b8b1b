"""Labels, dropout, flips, clipping, accumulation and importance: the same steps by the reference and by every way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsde import noise, reference
from fastsde.conditions import Condition
from fastsde.data import Dataset, StreamedDataset
from fastsde.distributed import Ranks
from fastsde.models import MLP
from fastsde.training import TrainConfig, Trainer
from fastsde.training.captured import CapturedSteps
from fastsde.training.steps import EagerSteps

STEPS = 9
LABELS = torch.arange(40) % 3
VECTORS = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
POINTS = Dataset("points", VECTORS + LABELS[:, None], conditions={"label": LABELS, "condition": VECTORS})
IMAGES = Dataset(
    "images",
    torch.randint(0, 256, (40, 3, 4, 4), generator=torch.Generator().manual_seed(2), dtype=torch.uint8),
    conditions={"label": LABELS},
    described={"label": Condition(classes=5)},
)
CONFIG = TrainConfig(
    "points",
    MLP(2, (8,), "SiLU", 3, 2).config,
    condition_dropout=0.3,
    steps=STEPS,
    batch_size=12,
    lr_schedule="constant",
    ema_decay=0.0,
    seed=3,
)
PIXELS = replace(CONFIG, model=MLP((3, 4, 4), (8,), "SiLU", 5).config, flip=True, prediction="v")


class Stream(torch.utils.data.Dataset[Any]):
    """The items of a data set, one by one."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self._dataset.x[i], {name: value[i] for name, value in self._dataset.conditions.items()}


def streamed(dataset: Dataset) -> StreamedDataset:
    return StreamedDataset(dataset.name, Stream(dataset), described=dataset.described)


def taken(config: TrainConfig, dataset: Any, kind: Any, folder: Path) -> tuple[list[float], Trainer]:
    """Takes all steps in one way."""
    trainer = Trainer(config, folder, dataset=dataset, device=torch.get_default_device())
    steps, losses, first = kind(trainer.work()), [], 0
    for count in steps.chunks(config.steps):
        losses += steps.take(first, count).tolist()
        first += count
    assert first == config.steps
    return losses, trainer


def eager(work: Any) -> EagerSteps:
    return EagerSteps(work, Ranks())


def assert_close(ours: nn.Module, theirs: nn.Module, config: TrainConfig, share: float = 2e-3) -> None:
    """Compares weights: rounding changes a ``share`` of what Adam moves them by."""
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=config.steps * config.lr * share)


@pytest.mark.parametrize(
    ("config", "dataset"),
    [(replace(CONFIG, clip_norm=0.05), POINTS), (replace(PIXELS, weight_decay=0.1), IMAGES)],
    ids=["points", "images"],
)
def test_eager_steps_are_those_of_the_reference(config: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    losses, trainer = taken(config, dataset, eager, tmp_path / "a")
    fresh = Trainer(config, tmp_path / "b", dataset=dataset)
    assert isinstance(fresh.optimizer, torch.optim.AdamW) == (config.weight_decay > 0)
    keys, data = noise.sample_keys(config.seed, config.batch_size), fresh.dataset
    for step, loss in enumerate(losses):
        found = reference.train_step(
            fresh.model, fresh.optimizer, data.x, keys, step, config.objective, scale=data.scale, shift=data.shift,
            conditions=data.conditions, nulls=fresh.work().nulls, dropout=config.condition_dropout, flip=config.flip,
            clip_norm=config.clip_norm,
        )  # fmt: skip
        assert loss == float(found)
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), fresh.model.parameters(), strict=True))


FAST = (("clipped", False), ("importance", True))
VARIANTS = {
    "clipped": (replace(CONFIG, clip_norm=0.05, ema_decay=0.9), POINTS),
    "decayed, flipped": (replace(PIXELS, weight_decay=0.1, lr_schedule="inverse_sqrt", lr_warmup=3), IMAGES),
    "accumulated": (replace(CONFIG, accumulation=5, clip_norm=0.05, weight_decay=0.1), POINTS),
    "importance": (replace(CONFIG, times="importance", accumulation=2, prediction="v"), POINTS),
    "accumulated images": (replace(PIXELS, accumulation=3), IMAGES),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "streams"),
    [
        pytest.param(name, streams, marks=() if (name, streams) in FAST else pytest.mark.slow)
        for name in VARIANTS
        for streams in (False, True)
    ],
)
def test_captured_steps_are_the_eager_ones(graphs: Any, name: str, streams: bool, tmp_path: Path) -> None:
    config, dataset = VARIANTS[name]
    config = config if streams else replace(config, steps=6)  # with a stream, also a launch of five steps
    losses, expected = taken(config, dataset, eager, tmp_path / "eager")
    given = streamed(dataset) if streams else dataset
    found, trainer = taken(config, given, CapturedSteps, tmp_path / "captured")
    assert graphs.recorded
    assert found == pytest.approx(losses, rel=1e-4)
    assert_close(trainer.model, expected.model, config)
    if expected.ema is not None:
        assert_close(trainer.ema, expected.ema, config)
    if expected.importance is not None:
        torch.testing.assert_close(trainer.importance.moments, expected.importance.moments, rtol=1e-3, atol=1e-6)
        assert torch.equal(trainer.importance.visits, expected.importance.visits)


@pytest.mark.parametrize("pieces", [2, 5, 12])
def test_the_pieces_of_a_batch_make_the_step_of_the_whole(pieces: int, tmp_path: Path) -> None:
    config = replace(CONFIG, clip_norm=0.05)
    losses, whole = taken(config, POINTS, eager, tmp_path / "whole")
    found, trainer = taken(replace(config, accumulation=pieces), POINTS, eager, tmp_path / "pieces")
    assert found == pytest.approx(losses, rel=1e-5)
    assert_close(trainer.model, whole.model, config)


class Recording(nn.Module):
    """Keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.calls.append((x.clone(), label.clone()))
        return x * self.weight


@contextmanager
def without_noise() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "normal", lambda keys, step, shape, stream=0: torch.zeros(len(step), len(keys), *shape))
        yield


def test_dropout_and_flips_are_those_of_the_noise_contract(tmp_path: Path) -> None:
    config = replace(PIXELS, model="", condition_dropout=0.4, t_min=1e-6, t_max=1e-5)  # where x_t is x_0
    net = Recording()
    trainer = Trainer(config, tmp_path, model=net, dataset=IMAGES)
    with without_noise():
        eager(trainer.work()).take(0, STEPS)
    keys = noise.sample_keys(config.seed, config.batch_size)
    dropped = flipped = 0
    for step, (x, label) in enumerate(net.calls):
        u = noise.uniform(keys, step, (2,), 4)  # stream 4
        index = (noise.uniform(keys, step, (), 3).double() * len(IMAGES)).long()
        drops, flips = u[:, 0] < 0.4, u[:, 1] < 0.5
        assert torch.equal(label, torch.where(drops, 5, LABELS[index]))
        expected = IMAGES.x[index] / 127.5 - 1
        expected = torch.where(flips[:, None, None, None], expected.flip(-1), expected)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-3)
        dropped, flipped = dropped + int(drops.sum()), flipped + int(flips.sum())
    total = STEPS * config.batch_size
    assert 0.25 * total < dropped < 0.55 * total
    assert 0.35 * total < flipped < 0.65 * total


def test_conditions_are_dropped_together_and_by_their_own_nulls() -> None:
    conditions = {"label": torch.arange(4), "v": torch.ones(4, 2, 3)}
    u = torch.tensor([0.0, 0.3, 0.29, 0.9])
    found = reference.drop_conditions(conditions, {"label": 9, "v": -1.0}, u, 0.3)
    assert found["label"].tolist() == [9, 1, 9, 3]
    assert found["label"].dtype == torch.int64
    assert found["v"][:, 0, 0].tolist() == [-1, 1, -1, 1]
    assert reference.drop_conditions(conditions, {}, u, 0.0) == conditions


@pytest.mark.slow
def test_bf16_in_captured_steps_is_autocast(graphs: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, precision="bf16", steps=5)
    losses, expected = taken(config, POINTS, eager, tmp_path / "eager")
    found, trainer = taken(config, POINTS, CapturedSteps, tmp_path / "captured")
    assert found == pytest.approx(losses, rel=0.02)
    assert_close(trainer.model, expected.model, config, share=0.5)
