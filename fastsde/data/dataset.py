"""Training data, validated on construction and kept in a dtype and layout that every kernel accepts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..conditions import Condition, describe
from ..validation import check_instance, check_number, check_range, check_tensor

__all__ = ["Dataset"]

_MOST_CLASSES = 2**24


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training data ``x``; the network sees scale * x + shift.

    Args:
        name: the name of the data set.
        x: a tensor or NumPy array ``[N, *shape]`` of finite numbers. uint8 is kept, bool becomes 0 and 255 in uint8,
            and every floating-point dtype becomes fp32.
        scale: a finite number, not 0. By default floats are not changed, and for uint8 it is None until a
            `fastsde.training.Trainer` maps black and white to its config's ``pixel_range``.
        shift: a finite number; None as ``scale`` is.
        value_range: black and white as stored in ``x``. By default (0, 255) for uint8; for float images
            ``[N, C, H, W]`` of one or three channels (0, 1) or (-1, 1) if all values lie in it, else the smallest and
            the largest value; None for other data.
        conditions: what a conditional network is also called with, by the name of its argument: labels, integers
            ``[N]`` from 0 on, kept as int64, or vectors, finite floats ``[N, ...]``, kept in fp32.
        described: the number and names of classes, and the values that stand for "no condition", where they differ from
            what the values of ``conditions`` say (`fastsde.data.Condition`).

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
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    described: Mapping[str, Condition] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_instance("name", self.name, str)
        x = numbers(self.x)
        if x.ndim == 0 or x.numel() == 0:
            raise ValueError(f"x must be [N, *shape] with at least one sample and one element, got {list(x.shape)}")
        value_range = self.value_range
        scale, shift = check_scaling(self.scale, self.shift, x)
        extremes = (0.0, 255.0) if x.dtype == torch.uint8 else _extremes(x)
        if scale is not None and shift is not None:
            furthest = max(abs(scale * extreme + shift) for extreme in extremes)
            if furthest > torch.finfo(torch.float32).max:
                raise ValueError(f"scale * x + shift must be finite in fp32, got up to {furthest:g}")
        if value_range is not None:
            value_range = check_range("value_range", value_range)
        elif x.dtype == torch.uint8 or is_image(x):
            value_range = black_and_white(x, extremes)
        conditions = _conditions(self.conditions, len(x))
        described = _described(conditions, self.described)
        for name, value in (("x", x), ("scale", scale), ("shift", shift), ("value_range", value_range)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "conditions", conditions)
        object.__setattr__(self, "described", described)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.x.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the data as they are stored: uint8 or fp32."""
        return self.x.dtype

    @property
    def seen_range(self) -> tuple[float, float] | None:
        """Black and white as the network sees them, the lower first; None for other data, or before they are known."""
        return seen_range(self.value_range, self.scale, self.shift)

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device | str) -> Dataset:
        """Returns the same data on a device."""
        conditions = {name: value.to(device) for name, value in self.conditions.items()}
        return replace(self, x=self.x.to(device), conditions=conditions)

    def head(self, n: int | None) -> Dataset:
        """Returns the first ``n`` samples, or all of them for None."""
        if n is None:
            return self
        conditions = {name: value[:n] for name, value in self.conditions.items()}
        described = {name: replace(each, shares=()) for name, each in self.described.items()}  # those of these samples
        return replace(self, x=self.x[:n], conditions=conditions, described=described)

    def with_pixel_range(self, pixel_range: tuple[float, float]) -> Dataset:
        """Returns the same data, with pixels that have no scale and shift of their own mapped to ``pixel_range``."""
        check_range("pixel_range", pixel_range)
        if self.scale is not None or self.value_range is None:
            return self
        scale, shift = mapping(self.value_range, pixel_range)
        return replace(self, scale=scale, shift=shift)

    def with_shape(self, shape: Sequence[int]) -> Dataset:
        """Returns the data as samples of ``shape``. Images ``[C, H, W]`` may be stored as ``[H, W, C]`` or ``[H, W]``.

        Raises:
            ValueError: for samples of any other shape.
        """
        x = in_shape(self.x, shape)
        return self if x is self.x else replace(self, x=x)


def in_shape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns samples ``[N, ...]`` as ``[N, *shape]``; see `Dataset.with_shape`."""
    shape, own = tuple(shape), tuple(x.shape[1:])
    if own == shape:
        return x
    if len(shape) == 3 and own == (*shape[1:], shape[0]):
        return x.movedim(-1, 1).contiguous()
    if len(shape) == 3 and (1, *own) == shape:
        return x[:, None]
    raise ValueError(f"the model takes samples of shape {shape}, the data have {own}")


def seen_range(
    value_range: tuple[float, float] | None, scale: float | None, shift: float | None
) -> tuple[float, float] | None:
    """Returns black and white after scaling, the lower first; None if any of it is not known."""
    if value_range is None or scale is None or shift is None:
        return None
    low, high = sorted(scale * value + shift for value in value_range)
    return low, high


def mapping(value_range: tuple[float, float], pixel_range: tuple[float, float]) -> tuple[float, float]:
    """Returns the scale and shift that map black and white to ``pixel_range``."""
    (black, white), (low, high) = value_range, check_range("pixel_range", pixel_range)
    scale = (high - low) / (white - black)
    return scale, low - scale * black


def is_image(x: Tensor) -> bool:
    """Returns whether data are grey or colour images ``[N, C, H, W]``."""
    return x.ndim == 4 and x.shape[1] in (1, 3)


def check_scaling(scale: float | None, shift: float | None, x: Tensor) -> tuple[float | None, float | None]:
    """Returns scale and shift, which are 1 and 0 by default, but None for pixels without either."""
    if scale is None and shift is None and not x.is_floating_point():
        return None, None
    return (
        check_number("scale", 1.0 if scale is None else scale, "finite and not 0", _is_scale),
        check_number("shift", 0.0 if shift is None else shift),
    )


def _conditions(given: Mapping[str, object], n: int) -> dict[str, Tensor]:
    """Returns the conditions as a `Dataset` keeps them: int64 labels and fp32 values, contiguous."""
    check_instance("conditions", given, Mapping)
    found: dict[str, Tensor] = {}
    for key, value in given.items():
        name = f"conditions[{key!r}]"
        if key in ("x", "t"):
            raise ValueError(f"{name} would hide the {key} that model(x, t) is called with")
        tensor = check_tensor(name, from_numpy(value, name) if isinstance(value, np.ndarray) else value).detach()
        if tensor.ndim == 0 or len(tensor) != n:
            raise ValueError(f"{name} must have one value for each of the {n} samples, got shape {list(tensor.shape)}")
        if tensor.is_floating_point():
            found[key] = check_tensor(f"{name} (as fp32)", tensor.float().contiguous(), finite=True)
            continue
        if tensor.is_complex() or tensor.ndim != 1:
            raise ValueError(
                f"{name} must be labels, integers [{n}], or floats [{n}, ...], got {tensor.dtype} {list(tensor.shape)}"
            )
        labels = tensor.long().contiguous()
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= _MOST_CLASSES:  # all classes are counted
            raise ValueError(f"{name} must be labels from 0 on, below 2^24, got {low} .. {high}")
        found[key] = labels
    return found


def _described(conditions: Mapping[str, Tensor], given: Mapping[str, Condition]) -> dict[str, Condition]:
    """Returns what each condition is, as given or as its values say."""
    check_instance("described", given, Mapping)
    for name in given:
        if name not in conditions:
            raise ValueError(f"described must be of conditions ({', '.join(conditions) or 'none'}), got {name!r}")
    found: dict[str, Condition] = {}
    for name, value in conditions.items():
        own, known = describe(value), given.get(name)
        if known is not None:
            check_instance(f"described[{name!r}]", known, Condition)
            if own.shape != known.shape or own.classes > known.classes or bool(own.classes) != bool(known.classes):
                raise ValueError(f"described[{name!r}] must fit the values of the condition, {own}, got {known}")
        if known is not None and known.classes and not known.shares:
            known = replace(known, shares=(*own.shares, *(0.0 for _ in range(known.classes - own.classes))))
        found[name] = known or own
    return found


def numbers(given: object, name: str = "x") -> Tensor:
    """Returns data as a `Dataset` keeps them: uint8 or fp32, contiguous.

    Raises:
        TypeError, ValueError: for anything but a dense array of real numbers; the message starts with ``name``.
    """
    if isinstance(given, np.ndarray):
        given = from_numpy(given, name)
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor or a NumPy array, got {type(given).__name__}")
    if given.layout != torch.strided or given.device.type == "meta":
        raise ValueError(f"{name} must be dense and hold data, got {given.layout} on {given.device}")
    x = given.detach().contiguous()
    if x.dtype == torch.bool:
        return x.to(torch.uint8) * 255
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise TypeError(
            f"{name} must be uint8 (pixels), bool or floating-point, got {x.dtype}: convert it to torch.uint8 if it "
            f"holds pixels from 0 to 255, else to torch.float32"
        )
    return x.float()


def from_numpy(array: np.ndarray[Any, Any], name: str = "x") -> Tensor:
    """Returns a copy of an array, which may have any strides and byte order."""
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers, got an array of {array.dtype}")
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


def black_and_white(x: Tensor, extremes: tuple[float, float]) -> tuple[float, float] | None:
    """Returns the usual image range that contains all of ``x``, or else its own range; None if all values are equal."""
    if x.dtype == torch.uint8:
        return extremes
    low, high = extremes
    for black, white in ((0.0, 1.0), (-1.0, 1.0)):
        if black <= low and high <= white:
            return black, white
    return (low, high) if low < high else None
