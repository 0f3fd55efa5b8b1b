"""The image and the mask of ``fastsde sample --inpaint``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoints import Checkpoint

SIDES = ("left", "right", "top", "bottom", "center", "border")


def known_image(model: str, checkpoint: Checkpoint, image: Path, mask: str) -> tuple[Tensor, Tensor]:
    """Returns the mask and the known image ``[C, H, W]`` on the CPU, cropped and scaled as the model's data.

    Args:
        mask: one of `SIDES`, or the path of an image that is light where the given one is known.

    Raises:
        ValueError: for a model of something else than square images, a file that is no image, or a mask without any
            known or any unknown pixel.
        FileNotFoundError: if there is no such file.
    """
    from ..data.files import square

    shape = checkpoint.shape
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2]:
        raise ValueError(
            f"--inpaint needs a model of square images, and samples of {model} have shape {list(shape)}: give "
            f"fastsde.sample its arguments mask and known"
        )
    low, high = checkpoint.value_range or (-1.0, 1.0)
    known = square(image, shape[1], shape[0]).float() / 255 * (high - low) + low
    side = _side(mask, shape[1])
    if side is None and not Path(mask).is_file():
        raise FileNotFoundError(f"--mask must be one of {', '.join(SIDES)}, or an image: there is no file {mask}")
    is_known = (square(mask, shape[1], 1)[0] >= 128 if side is None else side).expand(*shape)
    if is_known.all() or not is_known.any():
        raise ValueError(f"--mask {mask} must leave some pixels known and some unknown")
    return is_known, known


def _side(name: str, size: int) -> Tensor | None:
    """Returns a mask ``[size, size]`` by its name, or None for another name."""
    import torch

    if name not in SIDES:
        return None
    half, quarter = size // 2, size // 4
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    inside = (torch.minimum(row, column) >= quarter) & (torch.maximum(row, column) < size - quarter)
    sides = {"left": column < half, "right": column >= half, "top": row < half, "bottom": row >= half}
    return {**sides, "center": inside, "border": ~inside}[name]


def with_given(checkpoint: Checkpoint, x: Tensor, mask: Tensor, known: Tensor) -> Tensor:
    """Returns samples after the known image, whose unknown part is grey."""
    import torch

    grey = sum(checkpoint.value_range or (-1.0, 1.0)) / 2
    return torch.cat((torch.where(mask, known, torch.full_like(known, grey))[None].to(x), x))
