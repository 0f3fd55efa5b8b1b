"""The data that ``fastsde likelihood`` and ``fastsde encode`` take: a data set by name, a file, or a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..vocabulary import DATASETS

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoints import Checkpoint
    from ..data import Dataset

__all__ = ["conditions_of", "load_data", "takes_data"]

_DATA = (
    click.option(
        "--data",
        metavar="NAME|PATH",
        help=f"{', '.join(DATASETS)}, a file or a folder of images as for 'fastsde train'; of mnist the test digits, "
        "of swiss-roll fresh points.  [default: what the model was trained on]",
    ),
    click.option(
        "--data-root",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="The folder that MNIST is in.  [default: data]",
    ),
    click.option("-n", type=click.IntRange(1), help="How many, from the start.  [default: 1000 points, 100 images]"),
    click.option(
        "--label",
        metavar="LABEL",
        help="Class of all samples, a number or name, or none.  [default: the data's own labels, else none]",
    ),
)


def takes_data(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that name data: data, data_root, n and label."""
    for option in reversed(_DATA):
        command = option(command)
    return command


def load_data(checkpoint: Checkpoint, name: str | None, root: Path | None, n: int | None) -> Dataset:
    """Returns the first ``n`` samples, in the shape that a checkpoint takes.

    Raises:
        ValueError, FileNotFoundError: if there are no such data, or not of that shape.
    """
    from .. import data

    name = name or checkpoint.data
    if not name:
        raise ValueError("the checkpoint does not name its data: give --data")
    n = n or (100 if len(checkpoint.shape) == 3 else 1000)
    root = data.DEFAULT_ROOT if root is None else root
    pixel_range = checkpoint.value_range or (-1.0, 1.0)
    loaded: data.Dataset | data.StreamedDataset
    if name == "mnist":
        loaded = data.mnist(root, train=False, pixel_range=pixel_range)
    elif name == "swiss-roll":
        loaded = data.swiss_roll(n, seed=1)  # the recipes train on seed 0
    else:
        size = checkpoint.shape[-1] if len(checkpoint.shape) == 3 and Path(name).is_dir() else None
        loaded = data.load(name, pixel_range=pixel_range, image_size=size)
    loaded = loaded.head(min(n, len(loaded)))
    if not isinstance(loaded, data.Dataset):
        loaded = data.in_memory(loaded, name).with_pixel_range(pixel_range)
    return loaded.with_shape(checkpoint.shape)


def conditions_of(
    model: str, checkpoint: Checkpoint, dataset: Dataset, label: str | None, device: Any
) -> dict[str, Tensor]:
    """Returns the conditions of the data's samples: those that are given, those of the data, else "no condition"."""
    import torch

    from ..conditions import completed

    known, n = checkpoint.conditions, len(dataset)
    if label is not None and "label" not in known:
        raise ValueError(f"{model} takes no labels: leave --label out")
    given = {name: value.to(device) for name, value in dataset.conditions.items() if name in known}
    if label == "none":
        given.pop("label", None)
    elif label is not None:
        given["label"] = torch.full((n,), known["label"].label(label), dtype=torch.int64, device=device)
    keys = torch.zeros(n, 2, dtype=torch.int64, device=device)  # nothing is drawn
    return dict(completed(known, given, keys, checkpoint.has_null))
