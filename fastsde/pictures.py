"""Pictures of samples: points in the plane, and grey or colour images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from . import data, plotting
from .checkpoints import Checkpoint

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["check_installed", "columns", "draw", "has_picture", "save"]


def check_installed(shape: Sequence[int]) -> None:
    """Imports what draws samples of a shape.

    Raises:
        ImportError: if it is not installed; the message names the extra.
    """
    plotting.pillow()
    if tuple(shape) == (2,):
        plotting.figures()


def has_picture(shape: Sequence[int]) -> bool:
    """Returns whether samples of a shape are points in the plane, or grey or colour images."""
    return tuple(shape) == (2,) or (len(shape) == 3 and shape[0] in (1, 3))


def draw(checkpoint: Checkpoint, x: Tensor) -> Image.Image:
    """Returns a picture of samples: points next to fresh data, images in a grid."""
    if checkpoint.shape == (2,):
        fresh = data.swiss_roll(len(x), seed=1).x if checkpoint.data == "swiss-roll" else None
        return plotting.scatter(x, fresh)
    return plotting.image_grid(x, checkpoint.value_range or (-1.0, 1.0), columns(len(x)), scale=3)


def save(checkpoint: Checkpoint, x: Tensor, path: Path) -> None:
    """Writes a picture of samples."""
    plotting.save_image(draw(checkpoint, x), path)


def columns(n: int) -> int | None:
    """Returns the columns of a grid of n images, or None for the default."""
    return 10 if 10 < n <= 100 else None
