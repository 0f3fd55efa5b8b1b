"""Training data from files and folders: arrays, and images with a folder for each class."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..extras import require
from ..validation import check_int
from .dataset import Dataset
from .streamed import StreamedDataset, in_memory

__all__ = ["ARRAYS", "arrays", "images", "square"]

ARRAYS = (".npy", ".npz", ".safetensors")
_IN_MEMORY = 2**30  # bytes of images that are loaded at once
_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_ENDINGS = ", ".join(_SUFFIXES)
_ORIENTATION = 0x0112  # in EXIF data


def arrays(path: str | Path) -> Dataset:
    """Loads a data set from an .npy, .npz or .safetensors file.

    Of several arrays, "x" are the data, or "samples", as ``fastsde sample --save`` writes them; the others are its
    conditions (`fastsde.data.Dataset`). An .npy file is the data alone.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file of another kind, a damaged one, one whose data cannot be told from its conditions, or
            arrays that a `Dataset` cannot hold.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    found = _read(path)
    names: list[str] = [name for name in ("x", "samples") if name in found]
    if not names and len(found) == 1:
        names = list(found)
    if not names:
        raise ValueError(f"{path} must have an array 'x' besides its conditions, got {', '.join(found) or 'none'}")
    x = found.pop(names[0])
    try:
        return Dataset(str(path), x, conditions=found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be trained on: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """Returns the arrays of a file by name."""
    kind = path.suffix.lower()
    if kind not in ARRAYS:
        raise ValueError(f"{path} must end in {', '.join(ARRAYS)}, or be a folder of images")
    try:
        if kind == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        loaded = np.load(path, allow_pickle=False)  # a pickle can run any code
        if isinstance(loaded, np.ndarray):
            return {"x": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except Exception as error:  # each library has errors of its own
        raise ValueError(f"{path} cannot be read: {error}") from error


def images(folder: str | Path, size: int | None = None) -> Dataset | StreamedDataset:
    """Loads the images of a folder: uint8 ``[N, C, H, W]``, grey if all of them are, else in colour.

    With subfolders, each is a class, in the order of their names, and the condition "label" is its number
    (as in ``torchvision.datasets.ImageFolder``). Images are turned as their EXIF data say, and what is transparent
    becomes white. Hidden files and folders are left out. Images of more than 1 GiB are loaded step by step instead.

    Args:
        folder: the folder.
        size: height and width: the largest square in the middle of each image is cut out and scaled to it, bicubically
            and with antialiasing. By default images are taken as they are, and must all have one size.

    Raises:
        FileNotFoundError: for no folder, or one without images.
        ValueError: for images of several sizes without ``size``, one that cannot be read or has more than 8 bits a
            channel, a class without images, or images beside the folders of classes.
    """
    folder = Path(folder)
    size = None if size is None else check_int("image_size", size, 1)
    places, classes = _places(folder)
    headers = [_header(path) for path, _ in places]
    shapes = {(height, width) for height, width, _ in headers}
    if size is None and len(shapes) > 1:
        raise ValueError(
            f"image_size must be given for {folder}, whose images have {len(shapes)} sizes, such as "
            f"{' and '.join(f'{height} x {width}' for height, width in sorted(shapes)[:2])} pixels"
        )
    mode = "L" if all(grey for _, _, grey in headers) else "RGB"
    source = _Images(places, partial(_pixels, size=size, mode=mode), classes)
    height, width = (size, size) if size is not None else next(iter(shapes))
    if len(places) * height * width * len(mode) <= _IN_MEMORY:
        return in_memory(source, str(folder))
    return StreamedDataset(str(folder), source)


def square(path: str | Path, size: int, channels: int) -> Tensor:
    """Loads an image as `images` does one of a folder: uint8 ``[channels, size, size]``, in grey for one channel.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an image that cannot be read or has more than 8 bits a channel.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no image {path}")
    _header(str(path))
    return _pixels(str(path), size, "L" if channels == 1 else "RGB")


class _Images(torch.utils.data.Dataset[Any]):
    """Images and their labels; without classes, images alone."""

    def __init__(self, places: Sequence[tuple[str, int]], load: Any, classes: Sequence[str]) -> None:
        self._places, self._load, self.classes = places, load, list(classes)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Any:
        path, label = self._places[index]
        return (self._load(path), label) if self.classes else self._load(path)


def _places(folder: Path) -> tuple[list[tuple[str, int]], list[str]]:
    """Returns the path and label of each image of a folder, and the names of the classes; hidden ones are left out."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    folders = sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    own = sorted(each for each in folder.iterdir() if _is_image(each))
    if own and folders:
        raise ValueError(
            f"{folder} must have images or a subfolder for each class, got both, such as {own[0].name} and "
            f"{folders[0].name}"
        )
    found = [sorted(each for each in place.rglob("*") if _is_image(each, folder)) for place in folders]
    for place, paths in zip(folders, found, strict=True):
        if not paths and any(found):
            raise ValueError(f"{place} must have images, as each subfolder is a class ({_ENDINGS}), got none")
    places = [(str(path), label) for label, paths in enumerate(found or [own]) for path in paths]
    if not places:
        raise FileNotFoundError(f"the folder {folder} has no images ({_ENDINGS})")
    return places, [place.name for place in folders]


def _is_image(path: Path, inside: Path | None = None) -> bool:
    """Returns whether a path is that of an image, and neither it nor a folder above it, up to ``inside``, is hidden."""
    parts = [path.name] if inside is None else path.relative_to(inside).parts
    return path.suffix.lower() in _SUFFIXES and not any(part.startswith(".") for part in parts) and path.is_file()


def _header(path: str) -> tuple[int, int, bool]:
    """Returns the height and width of an image as it is shown, and whether it is grey; its pixels are not read."""
    with _opened(path) as image:
        kind, turned = image.mode, image.getexif().get(_ORIENTATION, 1) >= 5  # by a quarter
        height, width = (image.width, image.height) if turned else (image.height, image.width)
    if kind.startswith(("I", "F")):
        raise ValueError(
            f"{path} must have 8 bits a channel, got mode {kind!r}: convert it, or give an array of floats"
        )
    return height, width, kind in ("1", "L", "LA", "La")


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Opens an image, with errors of any kind that name it."""
    pillow = require("PIL.Image", extra="data", what="images in files")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata
            with pillow.open(path) as image:
                yield image
    except Exception as error:  # each format has errors of its own
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _pixels(path: str, size: int | None, mode: str) -> Tensor:
    """Returns an image as uint8 ``[C, H, W]``."""
    from PIL import Image, ImageOps

    with _opened(path) as image:
        picture = ImageOps.exif_transpose(image)
        if "A" in picture.mode.upper() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert(mode)
    if size is not None:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side))  # as the box of resize, it would take in its margin
        picture = square.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if mode == "L" else pixels.movedim(-1, 0).contiguous()
