from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import make_swiss_roll

from fastsde import data


def test_the_swiss_roll_is_the_tutorials() -> None:
    points, _ = make_swiss_roll(1000, noise=1.0, random_state=0)
    roll = data.swiss_roll()
    assert roll.x.dtype == torch.float32
    np.testing.assert_array_equal(roll.x.numpy(), (points[:, [0, 2]] / 10).astype(np.float32))


def test_digits_look_like_mnist() -> None:
    digits = data.digits()
    assert digits.x.shape == (1797, 1, 28, 28)
    assert digits.x.dtype == torch.uint8
    assert digits.x[:, :, :4].max() == 0  # the margin
    assert digits.x.max() == 255
    values = digits.scale * digits.x.float() + digits.shift
    assert (values.min(), values.max()) == (-1.0, 1.0)


def test_the_pixel_range_is_the_users_choice() -> None:
    digits = data.digits(pixel_range=(0.0, 1.0))
    values = digits.scale * digits.x.float() + digits.shift
    assert (values.min(), values.max()) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"pixel_range must be .*got \(1, 0\)"):
        data.digits(pixel_range=(1, 0))


def write_mnist(root: Path, pixels: np.ndarray) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in ("train", "t10k"):
        images = struct.pack(">iiii", 2051, len(pixels), 28, 28) + pixels.tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, len(pixels)) + bytes(len(pixels)))


def test_mnist_is_read_where_it_lies(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    write_mnist(tmp_path, pixels)
    for train in (True, False):
        np.testing.assert_array_equal(data.mnist(tmp_path, train=train).x.numpy(), pixels[:, None])
    assert len(data.load("mnist", root=tmp_path, size=3)) == 3
    with pytest.raises(ValueError, match="at most 5 for mnist, got 6"):
        data.load("mnist", root=tmp_path, size=6)


def test_mnist_that_cannot_be_had_names_the_folder_and_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import MNIST

    def no_network(self: MNIST) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(MNIST, "download", no_network)
    with pytest.raises(FileNotFoundError, match=r"MNIST/raw and could not be downloaded.*'digits'"):
        data.load("mnist", root=tmp_path / "new")
    assert list(tmp_path.iterdir()) == []  # a mistyped folder is not left behind


def test_the_current_folder_is_a_folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (3, 2)).save(tmp_path / "one.png")
    monkeypatch.chdir(tmp_path)
    assert data.load(".").shape == (1, 2, 3)
    with pytest.raises(ValueError, match="or a folder of images, got ''"):
        data.load("")


def test_the_name_and_size_are_checked() -> None:
    with pytest.raises(ValueError, match="got 'cifar'"):
        data.load("cifar")
    assert len(data.load("swiss-roll", size=7)) == 7
    assert not torch.equal(data.load("swiss-roll", seed=1).x, data.load("swiss-roll").x)


@pytest.mark.parametrize("name", ["swiss-roll", "digits"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"size": 5.0}, TypeError, "size must be an int, got float"),
        ({"size": True}, TypeError, "size must be an int, got bool"),
        ({"seed": -1}, ValueError, "seed must be in [0, 2^64), got -1"),
        ({"seed": 2**64}, ValueError, "seed must be in [0, 2^64), got 18446744073709551616"),
        ({"seed": None}, TypeError, "seed must be an int, got NoneType"),
        ({"pixel_range": 1}, TypeError, "pixel_range must be (low, high), got int"),
        ({"pixel_range": "01"}, TypeError, "pixel_range[0] must be a number, got str"),
        ({"pixel_range": (0, True)}, TypeError, "pixel_range[1] must be a number, got bool"),
        ({"pixel_range": (0, 1, 2)}, ValueError, "pixel_range must be (low, high) with low < high, both finite"),
        ({"pixel_range": (1, 1)}, ValueError, "pixel_range must be (low, high) with low < high, both finite"),
        ({"pixel_range": (0, float("inf"))}, ValueError, "both finite, got (0, inf)"),
        ({"root": None}, TypeError, "root must be a path, got NoneType"),
        ({"root": 3}, TypeError, "root must be a path, got int"),
    ],
    ids=repr,
)
def test_wrong_options_are_named(name: str, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        data.load(name, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 0}, ValueError, "n must be at least 1, got 0"),
        ({"noise": -1.0}, ValueError, "noise must be at least 0 and finite, got -1.0"),
        ({"noise": "1"}, TypeError, "noise must be a number, got str"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got float"),
    ],
    ids=repr,
)
def test_the_swiss_roll_names_what_is_wrong(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        data.swiss_roll(**options)
