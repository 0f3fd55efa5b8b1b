"""Data from files and folders, also from odd and broken ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastsde import data
from fastsde.conditions import Condition
from fastsde.data import StreamedDataset, files

POINTS = np.random.default_rng(0).standard_normal((6, 2)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2], np.int32)


@pytest.mark.parametrize(
    "array",
    [POINTS, np.asfortranarray(POINTS), POINTS.astype(">f8"), POINTS.astype(np.float16), POINTS[:, 0], POINTS > 0],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_an_array_of_a_file_is_the_data(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    dataset = data.arrays(tmp_path / "a.npy")
    assert dataset.name == str(tmp_path / "a.npy")
    assert dataset.shape == array.shape[1:]
    expected = array * 255 if array.dtype == bool else array.astype(np.float32)
    np.testing.assert_array_equal(dataset.x.numpy(), expected)
    assert torch.equal(data.load(str(tmp_path / "a.npy"), size=3).x, dataset.x[:3])


@pytest.mark.parametrize("kind", [".npz", ".safetensors", ".NPZ"])
def test_several_arrays_are_data_and_conditions(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a{kind}"

    def write(**arrays: np.ndarray) -> None:
        if kind == ".safetensors":
            save_file({name: torch.tensor(value) for name, value in arrays.items()}, path)
        else:
            with path.open("wb") as file:
                np.savez(file, **arrays)

    write(x=POINTS, label=LABELS, condition=POINTS.astype(np.float64))
    dataset = data.arrays(path)
    np.testing.assert_array_equal(dataset.x.numpy(), POINTS)
    assert dataset.described == {"label": Condition(classes=3), "condition": Condition(shape=(2,))}
    assert dataset.conditions["label"].tolist() == LABELS.tolist()
    for name in ("samples", "anything"):  # as fastsde sample writes them, and the only array of a file
        write(**{name: POINTS})
        assert torch.equal(data.arrays(path).x, dataset.x)
    write(a=POINTS, b=POINTS)
    with pytest.raises(ValueError, match=r"must have an array 'x' besides its conditions, got a, b"):
        data.arrays(path)
    write(x=POINTS, label=LABELS[:3])
    with pytest.raises(ValueError, match=r"cannot be trained on: conditions\['label'\] must have one value for"):
        data.arrays(path)


def test_arrays_that_cannot_be_trained_on_name_their_file(tmp_path: Path) -> None:
    for number, (array, message) in enumerate(
        [
            (LABELS, "got torch.int32: convert it to torch.uint8 if it holds pixels"),
            (POINTS[:0], "must be [N, *shape] with at least one sample and one element, got [0, 2]"),
            (POINTS * np.nan, "must be finite, got 12 values of NaN or infinity"),
            (POINTS.astype(complex), "must hold real numbers, got an array of complex128"),
            (np.array(["a"]), "must hold real numbers, got an array of <U1"),
        ]
    ):
        path = tmp_path / f"{number}.npy"
        np.save(path, array)
        with pytest.raises(ValueError, match=f"{path} cannot be trained on: x .*{re.escape(message)}"):
            data.arrays(path)
    pickled = np.array([{"a": 1}], dtype=object)
    np.save(tmp_path / "object.npy", pickled)
    np.savez(tmp_path / "object.npz", x=pickled)
    for name in ("object.npy", "object.npz"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read: Object arrays cannot be loaded"):
            data.arrays(tmp_path / name)
    for kind in files.ARRAYS:
        (tmp_path / f"broken{kind}").write_bytes(b"not an array")
        with pytest.raises(ValueError, match=f"broken{kind} cannot be read"):
            data.arrays(tmp_path / f"broken{kind}")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone\.npy"):
        data.load(str(tmp_path / "gone.npy"))
    with pytest.raises(ValueError, match=r"data set must be one of .*, a file that ends in .npy, .npz, .safetensors"):
        data.load(str(tmp_path / "a.csv"))
    np.save(tmp_path / "a.npy", POINTS)
    for options, message in (({"image_size": 8}, "image_size must be None for"), ({"size": 7}, "at most 6 for")):
        with pytest.raises(ValueError, match=message):
            data.load(str(tmp_path / "a.npy"), **options)


def picture(mode: str, size: tuple[int, int] = (4, 3), value: Any = None) -> Image.Image:
    image = Image.new(mode, size, value)
    if value is None:
        image.putpixel((1, 2), 1 if mode in ("1", "P") else 200 if mode == "L" else (200, 100, 50))
    return image


def test_a_folder_of_images_has_a_class_for_each_subfolder(tmp_path: Path) -> None:
    for folder in ("dog", "cat", "cat/more", ".cache"):
        (tmp_path / folder).mkdir()
    picture("L").save(tmp_path / "dog" / "1.png")
    picture("L").save(tmp_path / "cat" / "2.PNG")
    picture("1").save(tmp_path / "cat" / "more" / "3.bmp")
    picture("RGB").save(tmp_path / ".cache" / "hidden.png")
    (tmp_path / "dog" / "._1.png").write_bytes(b"written by another system")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "notes.txt").write_text("no image")
    dataset = data.load(str(tmp_path))
    assert dataset.described == {"label": Condition(classes=2, names=("cat", "dog"))}
    assert dataset.conditions["label"].tolist() == [0, 0, 1]
    assert (dataset.x.dtype, dataset.shape) == (torch.uint8, (1, 3, 4))
    assert dataset.x[2, 0, 2, 1] == 200
    assert dataset.x.sum() == 200 + 200 + 255
    assert dataset.seen_range == (-1.0, 1.0)
    picture("RGB").save(tmp_path / "dog" / "4.jpg")
    assert data.images(tmp_path).shape == (3, 3, 4)  # in colour, if any of them is
    (tmp_path / "fish").mkdir()
    with pytest.raises(ValueError, match=r"fish must have images, as each subfolder is a class .*, got none"):
        data.images(tmp_path)
    (tmp_path / "fish").rmdir()
    picture("L").save(tmp_path / "5.png")
    with pytest.raises(ValueError, match=r"must have images or a subfolder for each class, got both, such as 5.png"):
        data.images(tmp_path)


def test_images_of_every_kind_become_pixels(tmp_path: Path) -> None:
    white, red = (255, 255, 255), (255, 0, 0)
    half = Image.new("RGBA", (4, 3), (*red, 128))
    clear = Image.new("LA", (4, 3), (0, 0))
    palette = Image.new("P", (4, 3), 1)
    palette.putpalette([0, 0, 0, *red])
    for number, (image, expected) in enumerate(
        [
            (half, (255, 127, 127)),
            (clear, white),
            (palette, red),
            (Image.new("CMYK", (4, 3), (0, 255, 255, 0)), red),
            (Image.new("L", (4, 3), 7), (7, 7, 7)),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        image.save(folder / ("a.tiff" if image.mode == "CMYK" else "a.png"))
        picture("RGB").save(folder / "b.png")
        dataset = data.images(folder)
        assert dataset.conditions == {}
        assert abs(dataset.x[0, :, 0, 0].int() - torch.tensor(expected)).max() <= 1, image.mode
    palette.save(tmp_path / "0" / "c.png", transparency=bytes([255, 0]))
    assert data.images(tmp_path / "0").x[2, :, 0, 0].tolist() == list(white)
    grey = tmp_path / "grey"
    grey.mkdir()
    clear.save(grey / "a.png")
    assert (data.images(grey).shape, int(data.images(grey).x.min())) == ((1, 3, 4), 255)


def test_images_of_several_sizes_are_cropped_and_scaled(tmp_path: Path) -> None:
    wide = Image.new("L", (8, 4), 0)
    wide.paste(255, (2, 0, 6, 4))  # the square in the middle
    wide.save(tmp_path / "wide.png")
    picture("L", (6, 6), 90).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"image_size must be given for .*2 sizes, such as 4 x 8 and 6 x 6 pixels"):
        data.images(tmp_path)
    dataset = data.load(str(tmp_path), image_size=3)
    assert dataset.shape == (1, 3, 3)
    assert dataset.x.flatten(1).unique(dim=1).tolist() == [[90], [255]]
    for wrong, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="image_size must be"):
            data.images(tmp_path, wrong)
    # A photograph that is stored on its side: as it is shown.
    turned = Image.new("RGB", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = tmp_path / "photos"
    folder.mkdir()
    turned.save(folder / "a.jpg", exif=exif)
    assert data.images(folder).shape == (3, 8, 4)


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    written = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "whole.png").unlink()
    for number, (content, message) in enumerate(
        [
            (written[: len(written) // 2], "cannot be read as an image: "),
            (b"", "cannot be read as an image: cannot identify image file"),
            (b"<html>", "cannot be read as an image: cannot identify image file"),
        ]
    ):
        path = tmp_path / f"{number}.png"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{path} {message}")):
            data.images(tmp_path)
        path.unlink()
    for name, image in (
        ("deep.png", Image.fromarray(noise.astype(np.uint16) * 256)),
        ("floats.tiff", Image.fromarray(noise.astype(np.float32))),
    ):
        image.save(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} must have 8 bits a channel, got mode '.*: convert it"):
            data.images(tmp_path)
        (tmp_path / name).unlink()
    for folder, message in ((tmp_path, r"has no images \(.bmp"), (tmp_path / "gone", "there is no folder .*gone")):
        with pytest.raises(FileNotFoundError, match=message):
            data.images(folder)
    (tmp_path / "class").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no images"):
        data.images(tmp_path)


def test_many_images_are_loaded_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture("RGB").save(tmp_path / name / "1.png")
    loaded = data.images(tmp_path, 2)
    monkeypatch.setattr(files, "_IN_MEMORY", 23)  # one byte less than they take
    streamed = data.images(tmp_path, 2)
    assert isinstance(streamed, StreamedDataset)
    assert (streamed.shape, streamed.described, streamed.seen_range) == (loaded.shape, loaded.described, None)
    for i in range(2):
        x, conditions = streamed.item(i)
        assert torch.equal(x, loaded.x[i])
        assert conditions["label"] == loaded.conditions["label"][i] == i
