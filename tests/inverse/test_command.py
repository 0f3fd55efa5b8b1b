"""``fastsde sample --inpaint``, and known values of several processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from fastsde import Sampler, checkpoints, cli, distributed
from fastsde.checkpoints import Checkpoint
from fastsde.cli.inpaint import SIDES, known_image
from fastsde.conditions import Condition
from fastsde.models import MLP, UNet


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small U-Net, two images of it and two masks."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    checkpoints.save("small.safetensors", Checkpoint(UNet(1, 8, (4, 8)), prediction="v", value_range=(0.0, 1.0)))
    checkpoints.save("points.safetensors", Checkpoint(MLP(2), prediction="v"))
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(pixels).save("image.png")
    Image.fromarray(np.pad(pixels, ((0, 0), (3, 3)))).save("wide.png")
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save("diagonal.png")
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save("black.png")
    return tmp_path


def command(*arguments: str, save: str = "x.npz") -> Result:
    options = ["--steps", "4", "-n", "3", "--quiet", "--device", "cpu", "--save", save]
    return CliRunner().invoke(cli.main, ["sample", "small.safetensors", *options, *arguments])


@pytest.mark.slow
def test_an_image_is_completed(folder: Path) -> None:
    for image in ("image.png", "wide.png"):  # of which the middle is taken
        result = command("--inpaint", image, "--mask", "left", "--resamples", "2", "--jump", "2", "--out", "x.png")
        assert result.exit_code == 0, result.output
        x = torch.from_numpy(np.load("x.npz")["samples"])
        known = torch.arange(64).reshape(8, 8) * 4 / 255
        torch.testing.assert_close(x[:, 0, :, :4], known[:, :4].expand(3, 8, 4))
        sampler = Sampler(checkpoints.load("small.safetensors"), steps=4, resamples=2, jump=2)
        mask = (torch.arange(8) < 4).expand(1, 8, 8)
        assert torch.equal(x, sampler(3, mask=mask, known=known[None]))
    with Image.open("x.png") as picture:  # the image, and three samples
        assert picture.size == (3 * (2 * (8 + 2) + 2), 3 * (2 * (8 + 2) + 2))


def test_masks(folder: Path) -> None:
    checkpoint = checkpoints.load("small.safetensors")
    masks = {side: known_image("small", checkpoint, Path("image.png"), side)[0][0] for side in SIDES}
    assert {side: int(mask.sum()) for side, mask in masks.items()} == {
        "left": 32, "right": 32, "top": 32, "bottom": 32, "center": 16, "border": 48
    }  # fmt: skip
    assert masks["left"][:, 0].all()
    assert masks["top"][0].all()
    assert masks["center"][2:6, 2:6].all()
    for one, other in (("left", "right"), ("top", "bottom"), ("center", "border")):
        assert torch.equal(masks[one], ~masks[other])
    assert torch.equal(known_image("small", checkpoint, Path("image.png"), "diagonal.png")[0][0], torch.eye(8).bool())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inpaint", "image.png"], "--inpaint IMAGE and --mask PART go together: give both or neither"),
        (["--mask", "left"], "--inpaint IMAGE and --mask PART go together: give both or neither"),
        (["--inpaint", "no.png", "--mask", "left"], "there is no image no.png"),
        (
            ["--inpaint", "image.png", "--mask", "middle"],
            "--mask must be one of left, right, .*, or an image: there is",
        ),
        (["--inpaint", "image.png", "--mask", "black.png"], "--mask black.png must leave some pixels known and some"),
        (["--inpaint", "small.safetensors", "--mask", "left"], "small.safetensors cannot be read as an image"),
        (["--resamples", "2"], "--resamples is for --inpaint: leave it out, or give an image"),
        (
            ["--inpaint", "image.png", "--mask", "left", "--resamples", "2", "--jump", "4"],
            "jump must be less than the number of rows, 4, got 4",
        ),
    ],
)
def test_mistakes(folder: Path, arguments: list[str], message: str) -> None:
    import re

    result = command(*arguments)
    assert result.exit_code != 0
    assert re.search(message, result.output), result.output


def test_points_have_no_image(folder: Path) -> None:
    result = CliRunner().invoke(cli.main, ["sample", "points.safetensors", "--inpaint", "image.png", "--mask", "left"])
    assert "--inpaint needs a model of square images, and samples of points.safetensors have shape [2]" in result.output


def test_ranks_take_the_known_values_of_their_samples() -> None:
    torch.manual_seed(0)
    sampler = Sampler(MLP(3), (3,), steps=4)
    mask, known = torch.rand(5, 3) < 0.5, torch.randn(5, 3)
    x = distributed.sample(sampler, 5, mask=mask, known=known, part=5)
    assert torch.equal(x, sampler(5, mask=mask, known=known))
    with pytest.raises(ValueError, match="mask and known go together"):
        distributed.sample(sampler, 5, mask=mask)


def test_no_label_is_drawn_beside_known_values() -> None:
    """A label that does not go with what is known would be in its way."""
    torch.manual_seed(0)
    checkpoint = Checkpoint(MLP(2, classes=3), conditions={"label": Condition(3)}, has_null=True)
    sampler = Sampler(checkpoint, steps=3)
    given = {"mask": torch.tensor([True, False]), "known": torch.zeros(2)}
    assert torch.equal(sampler(4, **given), sampler(4, model_kwargs={"label": torch.full((4,), 3)}, **given))
    assert not torch.equal(sampler(4, **given), sampler(4, model_kwargs={"label": torch.zeros(4).long()}, **given))
