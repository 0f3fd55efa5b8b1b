"""Training data, validated on construction and kept in a dtype and layout that every kernel accepts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .validation import check_instance, check_number, check_range, check_tensor

__all__ = ["Dataset"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training data ``x``; the network sees scale * x + shift.

    Args:
        name: the name of the data set.
        x: a tensor or NumPy array ``[N, *shape]`` of finite numbers. uint8 is kept, bool becomes 0 and 255 in uint8,
            and every floating-point dtype becomes fp32.
        scale, shift: finite numbers, the scale not 0. By default floats are not changed, and for uint8 both are None
            until a `fastsde.training.Trainer` maps black and white to its config's ``pixel_range``.
        value_range: black and white as stored in ``x``. By default (0, 255) for uint8; for float images
            ``[N, C, H, W]`` of one or three channels (0, 1) or (-1, 1) if all values lie in it, else the smallest and
            the largest value; None for other data.

    Raises:
        TypeError: for an ``x`` of the wrong type or dtype, or any other argument of the wrong type.
        ValueError: for an ``x`` that is empty, a single number, or not finite (in fp32, and after scaling), or any
            other argument that is out of range.
    """

    name: str
    x: Tensor
    scale: float | None = None
    shift: float | None = None
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_instance("name", self.name, str)
        x = _numbers(self.x)
        scale, shift, value_range = self.scale, self.shift, self.value_range
        if scale is not None or shift is not None or x.is_floating_point():
            scale = check_number("scale", 1.0 if scale is None else scale, "finite and not 0", _is_scale)
            shift = check_number("shift", 0.0 if shift is None else shift)
        extremes = (0.0, 255.0) if x.dtype == torch.uint8 else _extremes(x)
        if scale is not None and shift is not None:
            furthest = max(abs(scale * extreme + shift) for extreme in extremes)
            if furthest > torch.finfo(torch.float32).max:
                raise ValueError(f"scale * x + shift must be finite in fp32, got up to {furthest:g}")
        if value_range is not None:
            value_range = check_range("value_range", value_range)
        elif x.dtype == torch.uint8 or (x.ndim == 4 and x.shape[1] in (1, 3)):
            value_range = _black_and_white(x, extremes)
        for name, value in (("x", x), ("scale", scale), ("shift", shift), ("value_range", value_range)):
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.x.shape[1:])

    @property
    def seen_range(self) -> tuple[float, float] | None:
        """Black and white as the network sees them, the lower first; None for other data, or before they are known."""
        if self.value_range is None or self.scale is None or self.shift is None:
            return None
        low, high = sorted(self.scale * value + self.shift for value in self.value_range)
        return low, high

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device | str) -> Dataset:
        """Returns the same data on a device."""
        return replace(self, x=self.x.to(device))

    def with_pixel_range(self, pixel_range: tuple[float, float]) -> Dataset:
        """Returns the same data, with pixels that have no scale and shift of their own mapped to ``pixel_range``."""
        low, high = check_range("pixel_range", pixel_range)
        if self.scale is not None or self.value_range is None:
            return self
        black, white = self.value_range
        scale = (high - low) / (white - black)
        return replace(self, scale=scale, shift=low - scale * black)

    def with_shape(self, shape: Sequence[int]) -> Dataset:
        """Returns the data as samples of ``shape``. Images ``[C, H, W]`` may be stored as ``[H, W, C]`` or ``[H, W]``.

        Raises:
            ValueError: for samples of any other shape.
        """
        shape = tuple(shape)
        if self.shape == shape:
            return self
        if len(shape) == 3 and self.shape == (*shape[1:], shape[0]):
            return replace(self, x=self.x.movedim(-1, 1))
        if len(shape) == 3 and (1, *self.shape) == shape:
            return replace(self, x=self.x[:, None])
        raise ValueError(f"the model takes samples of shape {shape}, the data have {self.shape}")


def _numbers(given: object) -> Tensor:
    """Returns the data as a `Dataset` keeps them: uint8 or fp32, contiguous."""
    if isinstance(given, np.ndarray):
        given = _from_numpy(given)
    if not isinstance(given, Tensor):
        raise TypeError(f"x must be a tensor or a NumPy array, got {type(given).__name__}")
    if given.layout != torch.strided or given.device.type == "meta":
        raise ValueError(f"x must be dense and hold data, got {given.layout} on {given.device}")
    if given.ndim == 0 or given.numel() == 0:
        raise ValueError(f"x must be [N, *shape] with at least one sample and one element, got {list(given.shape)}")
    x = given.detach().contiguous()
    if x.dtype == torch.bool:
        return x.to(torch.uint8) * 255
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise TypeError(
            f"x must be uint8 (pixels), bool or floating-point, got {x.dtype}: convert it to torch.uint8 if it holds "
            f"pixels from 0 to 255, else to torch.float32"
        )
    return x.float()


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    """Returns a copy of an array, which may have any strides and byte order."""
    if array.dtype.kind not in "biuf":
        raise TypeError(f"x must hold real numbers, got an array of {array.dtype}")
    wide = array.dtype.kind == "f" and array.dtype.itemsize > 8  # PyTorch has no long double
    native = np.dtype(np.float64) if wide else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=native, order="C"))


def _is_scale(value: float) -> bool:
    return math.isfinite(value) and value != 0


def _extremes(x: Tensor) -> tuple[float, float]:
    """Returns the smallest and largest element of fp32 data, which must be finite."""
    low, high = (float(each) for each in x.aminmax())  # NaN passes through
    if not (math.isfinite(low) and math.isfinite(high)):
        check_tensor("x (as fp32)", x, finite=True)
    return low, high


def _black_and_white(x: Tensor, extremes: tuple[float, float]) -> tuple[float, float] | None:
    """Returns the usual image range that contains all of ``x``, or else its own range; None if all values are equal."""
    if x.dtype == torch.uint8:
        return extremes
    low, high = extremes
    for black, white in ((0.0, 1.0), (-1.0, 1.0)):
        if black <= low and high <= white:
            return black, white
    return (low, high) if low < high else None
