"""Training data from files and folders: arrays, and images with a folder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .dataset import Dataset
from .streamed import StreamedDataset, in_memory
from .validation import check_int

__all__ = ["ARRAYS", "arrays", "images"]

ARRAYS = (".npy", ".npz", ".safetensors")
_IN_MEMORY = 2**30  # bytes of images that are loaded at once


def arrays(path: str | Path) -> Dataset:
    """Loads a data set from an .npy, .npz or .safetensors file.

    Of several arrays, "x" are the data, or "samples", as ``fastsde sample --save`` writes them; the others are its
    conditions (`fastsde.data.Dataset`). An .npy file is the data alone.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file of another kind, a damaged one, or one whose data cannot be told from its conditions.
        TypeError: for an array of other than real numbers.
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
    return Dataset(str(path), x, conditions=found)


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
        return {"x": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except Exception as error:  # each library has errors of its own
        raise ValueError(f"{path} cannot be read: {error}") from error


def images(folder: str | Path, size: int | None = None) -> Dataset | StreamedDataset:
    """Loads the images of a folder: uint8 ``[N, C, H, W]``, grey if all of them are, else in colour.

    With subfolders, each is a class, in the order of their names, and the condition "label" is its number
    (`torchvision.datasets.ImageFolder`). Images of more than 1 GiB are loaded step by step instead.

    Args:
        size: height and width: the largest square in the middle of each image is cut out and scaled to it, bicubically
            and with antialiasing. By default images are taken as they are, and must all have one size.

    Raises:
        FileNotFoundError: for no folder, or one without images.
        ValueError: for images of several sizes without ``size``, or one that cannot be read.
    """
    folder = Path(folder)
    size = None if size is None else check_int("image_size", size, 1)
    places, classes = _places(folder)
    shapes, modes = set[tuple[int, int]](), set[str]()
    for path, _ in places:
        height, width, mode = _header(path)
        shapes.add((height, width))
        modes.add(mode)
    if size is None and len(shapes) > 1:
        raise ValueError(
            f"image_size must be given for {folder}, whose images have {len(shapes)} sizes, such as "
            f"{' and '.join(f'{height} x {width}' for height, width in sorted(shapes)[:2])} pixels"
        )
    mode = "L" if modes <= {"1", "L"} else "RGB"
    source = _Images(places, partial(_pixels, size=size, mode=mode), classes)
    height, width = (size, size) if size is not None else next(iter(shapes))
    if len(places) * height * width * len(mode) <= _IN_MEMORY:
        return in_memory(source, str(folder))
    return StreamedDataset(str(folder), source)


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
    """Returns the path and label of each image of a folder, and the names of the classes."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if any(each.is_dir() and not each.name.startswith(".") for each in folder.iterdir()):
        found = ImageFolder(str(folder), allow_empty=True)
        places, classes = list(found.samples), list(found.classes)
    else:
        paths = sorted(each for each in folder.iterdir() if each.suffix.lower() in IMG_EXTENSIONS)
        places, classes = [(str(path), 0) for path in paths], []
    if not places:
        raise FileNotFoundError(f"the folder {folder} has no images ({', '.join(IMG_EXTENSIONS)})")
    return places, classes


def _header(path: str) -> tuple[int, int, str]:
    """Returns the height, width and mode of an image, without its pixels."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width, image.mode
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _pixels(path: str, size: int | None, mode: str) -> Tensor:
    """Returns an image as uint8 ``[C, H, W]``."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            picture = image.convert(mode)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if size is not None:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = (left, top, left + side, top + side)
        picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=square)
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if mode == "L" else pixels.movedim(-1, 0).contiguous()
