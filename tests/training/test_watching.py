"""What a run shows: pictures of samples, TensorBoard, the time left."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastsde import Sampler, pictures
from fastsde.checkpoints import Checkpoint
from fastsde.data import Dataset, StreamedDataset, swiss_roll
from fastsde.models import MLP
from fastsde.sde import EDM
from fastsde.training import TrainConfig, Trainer

pytestmark = pytest.mark.usefixtures("every_checkpoint")

LABELS = torch.arange(12) % 3
IMAGES = Dataset("own", torch.rand(12, 3, 4, 4), conditions={"label": LABELS, "style": torch.rand(12, 2)})
CONFIG = TrainConfig("own", "", steps=7, batch_size=4, sample_every=3, log_every=2)


class Net(nn.Module):
    """Takes a label and a vector, and counts its calls as Python code may."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.labels, self.style = MLP((3, 4, 4), (4,)), nn.Embedding(4, 48), nn.Linear(2, 48)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor, style: Tensor) -> Tensor:
        self.seen.append(label)
        return self.net(x, t) + (self.labels(label) + self.style(style)).reshape(x.shape)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sde": EDM(), "prediction": "x0", "preconditioning": "edm", "weighting": "target", "times": "lognormal"},
        {"condition_dropout": 0.2, "ema_decay": 0.0},
    ],
    ids=["eps", "edm", "dropout"],
)
def test_samples_are_drawn_every_so_many_steps(tmp_path: Path, options: dict[str, Any]) -> None:
    model = Net()
    trainer = Trainer(replace(CONFIG, **options), tmp_path / "run", model=model, dataset=IMAGES)
    trainer.train(progress=False)
    found = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert found == ["step-0000003.png", "step-0000006.png", "step-0000007.png"]
    assert len(model.seen) == 7  # the samples are those of a copy
    with Image.open(tmp_path / "run" / "samples" / found[-1]) as picture:
        drawn = np.asarray(picture)
    # The same samples as the checkpoint gives: labels take turns, vectors are those of the data.
    places = torch.arange(20)
    given = {"label": places % 3, "style": IMAGES.conditions["style"][places % 12]}
    x = Sampler(trainer.checkpoint(), solver="heun", steps=39)(20, model_kwargs=given)
    assert np.array_equal(drawn, np.asarray(pictures.draw(trainer.checkpoint(), x)))
    # Without pictures the weights are the same.
    other = Trainer(replace(CONFIG, sample_every=0, **options), tmp_path / "other", model=Net(), dataset=IMAGES)
    assert other.train(progress=False).record["step"] == 7
    assert not (tmp_path / "other" / "samples").exists()


def test_points_and_streams_have_pictures_too(tmp_path: Path) -> None:
    points = replace(CONFIG, model=MLP(2, (4,)).config, data="swiss-roll", steps=3, condition_dropout=0.0)
    Trainer(points, tmp_path / "points").train(progress=False)
    assert [path.name for path in (tmp_path / "points" / "samples").iterdir()] == ["step-0000003.png"]
    items = [(IMAGES.x[i], {"label": int(LABELS[i]), "style": torch.ones(2)}) for i in range(12)]
    source = StreamedDataset("own", items, described={"label": IMAGES.described["label"]})
    Trainer(replace(CONFIG, steps=3), tmp_path / "stream", model=Net(), dataset=source).train(progress=False)
    assert len(list((tmp_path / "stream" / "samples").iterdir())) == 1


def test_a_network_that_is_not_finite_yet_has_no_picture(tmp_path: Path) -> None:
    class Wild(Net):
        def forward(self, x: Tensor, t: Tensor, label: Tensor, style: Tensor) -> Tensor:
            f = super().forward(x, t, label, style)
            return f if self.training else f / 0

    with pytest.warns(RuntimeWarning, match="there is no picture of step 3: the network returned NaN or infinity"):
        Trainer(replace(CONFIG, steps=3), tmp_path, model=Wild(), dataset=IMAGES).train(progress=False)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    found = {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}
    images = {f"image {name}": [(each.step, 0.0) for each in events.Images(name)] for name in events.Tags()["images"]}
    return found | images


def test_tensorboard_has_the_lines_of_the_log_and_the_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trainer = Trainer(CONFIG, tmp_path, model=Net(), dataset=IMAGES, tensorboard=True)
    take = trainer._report

    def die_after(*args: Any, **options: Any) -> None:
        take(*args, **options)
        if trainer.step == 5:
            raise KeyboardInterrupt

    trainer._report = die_after  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train(progress=False)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [2, 4]
    # It died before its next checkpoint: it goes on from the first one, and nothing is there twice.
    Trainer(CONFIG, tmp_path, model=Net(), dataset=IMAGES, tensorboard=True, resume=True).train(progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = scalars(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    for name in ("loss", "lr", "steps_per_s", "left_s"):
        assert found[name] == [(line["step"], pytest.approx(line[name], rel=1e-5)) for line in lines]
    assert [step for step, _ in found["image samples"]] == [3, 6, 7]


def test_without_tensorboard_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"^tensorboard is not installed; .*: pip install 'fastsde\[tensorboard\]'$"):
        Trainer(CONFIG, tmp_path, model=Net(), dataset=IMAGES, tensorboard=True)
    assert not list(tmp_path.iterdir())


def test_the_time_left_is_that_of_the_steps_left_at_the_rate(tmp_path: Path) -> None:
    config = replace(CONFIG, model=MLP(2, (4,)).config, sample_every=0)
    Trainer(config, tmp_path, dataset=swiss_roll(20)).train(progress=False)
    for line in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()):
        assert line["left_s"] == pytest.approx((7 - line["step"]) / line["steps_per_s"], abs=0.1)
    assert line["left_s"] == 0


def test_which_samples_have_pictures() -> None:
    shapes = [(2,), (1, 5, 4), (3, 5, 4), (3,), (2, 2), (4, 5, 4), ()]
    assert [pictures.has_picture(shape) for shape in shapes] == [True] * 3 + [False] * 4
    grey = Checkpoint(nn.Identity(), sample_shape=(1, 5, 4), value_range=(0.0, 1.0))
    picture = pictures.draw(grey, torch.ones(11, 1, 5, 4))
    assert (picture.mode, picture.width > 2 * picture.height) == ("L", True)  # ten columns
