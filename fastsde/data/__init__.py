"""Training data: the swiss roll, MNIST, scikit-learn's digits for offline use, and your own files and folders.

A `Dataset` is a tensor or array in memory. Anything else that has a length and items, such as a
``torch.utils.data.Dataset``, is loaded by `in_memory`, or step by step as a `StreamedDataset`.

Images are kept as uint8 and mapped to floats batch by batch, x_0 = scale * pixel + shift. By default pixels are mapped
to [-1, 1]; the tutorial uses [0, 1] (``pixel_range=(0, 1)``). Images given as floats are trained on as they are.
"""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..conditions import Condition
from ..extras import require
from ..validation import check_int, check_number, check_range
from ..vocabulary import DATASETS
from .dataset import Dataset
from .files import ARRAYS, arrays, images
from .streamed import StreamedDataset, in_memory

__all__ = [
    "DATASETS",
    "Condition",
    "Dataset",
    "StreamedDataset",
    "arrays",
    "digits",
    "images",
    "in_memory",
    "load",
    "mnist",
    "swiss_roll",
]

DEFAULT_ROOT = Path("data")


def swiss_roll(n: int = 1000, noise: float = 1.0, seed: int = 0) -> Dataset:
    """Draws the tutorial's swiss roll: columns 0 and 2 of scikit-learn's ``make_swiss_roll(n, noise)`` over 10, to the
    bit. fp32 ``[n, 2]``.

    Args:
        n: how many points.
        noise: the standard deviation of the noise, before the division by 10.
        seed: of the points, in [0, 2^64).
    """
    check_int("n", n, 1), check_number("noise", noise, "at least 0 and finite", lambda std: 0 <= std < math.inf)
    seed = check_int("seed", seed, 0, 2**64)
    # NumPy's legacy generator refuses seeds of more than 32 bits as an int, so they are passed as two words.
    state = np.random.RandomState(seed if seed < 2**32 else [seed & 0xFFFFFFFF, seed >> 32])
    angle = 1.5 * np.pi * (1 + 2 * state.uniform(size=n))
    state.uniform(size=n)  # scikit-learn's column 1, which is left out
    points = np.stack((angle * np.cos(angle), angle * np.sin(angle)))
    points += noise * state.standard_normal(size=(3, n))[[0, 2]]
    return Dataset("swiss-roll", torch.tensor(points.T / 10, dtype=torch.float32, device="cpu"))


def digits(pixel_range: tuple[float, float] = (-1.0, 1.0)) -> Dataset:
    """Loads scikit-learn's 1,797 handwritten 8x8 digits as 28x28 images. uint8 ``[1797, 1, 28, 28]``.

    They are scaled bilinearly to 20x20 and padded by 4 pixels, as in MNIST. Their condition "label" is the digit.

    Args:
        pixel_range: the values that black and white are mapped to.
    """
    loaded = require("sklearn.datasets", extra="data", what="the data set digits").load_digits()
    small = torch.tensor(loaded.images, dtype=torch.float32, device="cpu")[:, None] * (255 / 16)
    large = F.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False)
    pixels = F.pad(large, (4, 4, 4, 4)).round().to(torch.uint8)
    labels = torch.tensor(loaded.target, dtype=torch.int64, device="cpu")
    return _with_labels("digits", pixels, labels).with_pixel_range(pixel_range)


def _with_labels(name: str, pixels: Tensor, labels: Tensor) -> Dataset:
    return Dataset(name, pixels, conditions={"label": labels}, described={"label": Condition(classes=10)})


def mnist(
    root: str | Path = DEFAULT_ROOT, train: bool = True, pixel_range: tuple[float, float] = (-1.0, 1.0)
) -> Dataset:
    """Loads MNIST through torchvision, downloading it to ``root`` if it is missing. uint8 ``[N, 1, 28, 28]``.

    Its condition "label" is the digit.

    Args:
        root: the folder that holds it, or gets it.
        train: the 60,000 training digits, or the 10,000 test digits.
        pixel_range: the values that black and white are mapped to.

    Raises:
        FileNotFoundError: if the files are missing and cannot be downloaded; the message names the folder.
    """
    return _with_labels("mnist", *mnist_files(root, train)).with_pixel_range(pixel_range)


def mnist_files(root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Returns MNIST's pixels uint8 ``[N, 1, 28, 28]`` and labels int64 ``[N]``. Raises as `mnist` does."""
    datasets = require("torchvision.datasets", extra="data", what="the data set mnist")
    folder = Path(root) / "MNIST" / "raw"
    made = [path for path in (folder, folder.parent, Path(root)) if not path.exists()]
    try:
        # download=True checks for the files of the full set and creates the folder, so try without it first.
        files = datasets.MNIST(str(root), train=train)
    except RuntimeError:
        try:
            files = datasets.MNIST(str(root), train=train, download=True)
        except (RuntimeError, OSError) as error:
            for path in made:
                with suppress(OSError):  # torchvision creates it even if the download then fails
                    path.rmdir()
            raise FileNotFoundError(
                f"MNIST is not in {folder} and could not be downloaded. Put train-images-idx3-ubyte, "
                f"train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte (or their .gz) there, "
                f"name another folder (--data or --data-root, or root in Python), or take the data set 'digits', which "
                f"needs no download"
            ) from error
    return files.data[:, None], files.targets


def load(
    name: str,
    *,
    size: int | None = None,
    root: str | Path = DEFAULT_ROOT,
    pixel_range: tuple[float, float] = (-1.0, 1.0),
    image_size: int | None = None,
    seed: int = 0,
) -> Dataset | StreamedDataset:
    """Loads a training set by name, "swiss-roll", "digits" or "mnist", or from a file or folder (`arrays`, `images`).

    Args:
        name: "swiss-roll", "digits" or "mnist"; an .npy, .npz or .safetensors file; or a folder of images.
        size: how many points of the swiss roll (by default 1000), or how many samples from the start of the set.
        root: the folder that holds MNIST.
        pixel_range: the values that black and white are mapped to.
        image_size: the height and width that the images of a folder are cropped and scaled to.
        seed: in [0, 2^64), for the points of the swiss roll.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for an unknown name, a size that is not positive or larger than the set, or any other value that is
            out of range.
        FileNotFoundError: if MNIST is missing and cannot be downloaded.
    """
    if size is not None:
        check_int("size", size, 1)
    if not isinstance(root, (str, os.PathLike)):
        raise TypeError(f"root must be a path, got {type(root).__name__}")
    check_int("seed", seed, 0, 2**64), check_range("pixel_range", pixel_range)
    is_path = isinstance(name, (str, os.PathLike)) and name not in (*DATASETS, "")
    path = Path(name if is_path else "")
    is_folder = is_path and path.is_dir()
    if image_size is not None and not is_folder:
        raise ValueError(f"image_size must be None for {name}, which is no folder of images, got {image_size}")
    if name == "swiss-roll":
        return swiss_roll(1000 if size is None else size, seed=seed)
    dataset: Dataset | StreamedDataset
    if name == "digits":
        dataset = digits(pixel_range)
    elif name == "mnist":
        dataset = mnist(root, pixel_range=pixel_range)
    elif is_folder:
        dataset = images(path, image_size).with_pixel_range(pixel_range)
    elif path.suffix.lower() in ARRAYS:
        dataset = arrays(path).with_pixel_range(pixel_range)
    else:
        raise ValueError(
            f"data set must be one of {', '.join(DATASETS)}, a file that ends in {', '.join(ARRAYS)}, or a folder of "
            f"images, got {name!r}"
        )
    if size is not None and size > len(dataset):
        raise ValueError(f"size must be at most {len(dataset)} for {name}, got {size}")
    return dataset.head(size)
