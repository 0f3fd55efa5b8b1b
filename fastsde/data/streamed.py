"""Data sets that are loaded item by item, since they need not fit into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..conditions import Condition
from ..randomness import preserved, seed_everywhere
from ..validation import check_instance, check_range, check_tensor
from .dataset import (
    Dataset,
    black_and_white,
    check_scaling,
    from_numpy,
    in_shape,
    is_image,
    mapping,
    numbers,
    seen_range,
)

__all__ = ["StreamedDataset", "as_dataset", "in_memory"]


@dataclass(frozen=True, eq=False)
class StreamedDataset:
    """A map-style data set, such as any ``torch.utils.data.Dataset``, whose items are loaded when a step needs them.

    An item is x, ``(x, label)``, ``(x, conditions)`` or a mapping with "x"; x is a tensor, a NumPy array or a PIL
    image, uint8 or floating-point, of the same shape in all items. Random transforms are repeatable: before an item is
    loaded, the generators of Python, NumPy and PyTorch are seeded by the run's seed, the step and the place in the
    batch. With ``workers`` in the run's config, the data set is used in other processes.

    Args:
        name: the name of the data set.
        source: has ``len`` and ``[i]``.
        scale: as for `fastsde.data.Dataset`; by default floats are not changed.
        shift: as for `fastsde.data.Dataset`.
        value_range: black and white as stored in x, as for `fastsde.data.Dataset`.
        described: the conditions. By default those of the first item; the number of classes of a label comes from the
            attribute ``classes`` of the source, as torchvision's data sets have it.
        as_shape: the shape of a sample, where items are stored in another layout (`with_shape`).

    Attributes:
        shape: the shape of one sample.
        dtype: uint8 or fp32.

    Raises:
        TypeError: for an argument of the wrong type, or items of another form.
        ValueError: for no items, or a label whose number of classes is not known.
    """

    name: str
    source: Any
    scale: float | None = None
    shift: float | None = None
    value_range: tuple[float, float] | None = None
    described: Mapping[str, Condition] = field(default_factory=dict)
    as_shape: tuple[int, ...] | None = None
    shape: tuple[int, ...] = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        check_instance("name", self.name, str)
        if not (hasattr(self.source, "__len__") and hasattr(self.source, "__getitem__")):
            raise TypeError(f"source must have a length and items, got {type(self.source).__name__}")
        if len(self.source) == 0:
            raise ValueError("source must have at least one item, got none")
        with preserved():  # from a random transform
            seed_everywhere(0)
            x, conditions = _item(self.source[0], 0)
        for key in conditions.keys() & {"x", "t"}:
            raise ValueError(f"item 0 has a condition {key!r}, which would hide the {key} that model(x, t) is given")
        x = x if self.as_shape is None else in_shape(x[None], self.as_shape)[0]
        scale, shift = check_scaling(self.scale, self.shift, x)
        value_range = self.value_range
        if value_range is not None:
            value_range = check_range("value_range", value_range)
        elif x.dtype == torch.uint8:
            value_range = (0.0, 255.0)
        elif is_image(x[None]):
            value_range = black_and_white(x, (float(x.min()), float(x.max())))
        described = {name: self.described.get(name) or self._describe(name, each) for name, each in conditions.items()}
        given = {"scale": scale, "shift": shift, "value_range": value_range, "described": described}
        for name, value in (given | {"shape": tuple(x.shape), "dtype": x.dtype}).items():
            object.__setattr__(self, name, value)
        self._checked(x, conditions, 0)

    def _describe(self, name: str, value: Tensor) -> Condition:
        if value.is_floating_point():
            return Condition(shape=tuple(value.shape))
        source = self.source
        while isinstance(source, torch.utils.data.Subset):
            source = source.dataset
        classes = getattr(source, "classes", None)
        if classes is None:
            raise ValueError(
                f"described must say how many classes the condition {name!r} has, since not all items are looked at: "
                f"give the Trainer StreamedDataset('name', dataset, described={{{name!r}: Condition(classes=10)}}) of "
                f"fastsde.data, or in_memory(dataset), which looks at all of them"
            )
        return Condition(classes=len(classes), names=tuple(str(each) for each in classes))

    @property
    def seen_range(self) -> tuple[float, float] | None:
        """Black and white as the network sees them; as `fastsde.data.Dataset.seen_range`."""
        return seen_range(self.value_range, self.scale, self.shift)

    def with_pixel_range(self, pixel_range: tuple[float, float]) -> StreamedDataset:
        """Returns the same data with another range of pixels; as `fastsde.data.Dataset.with_pixel_range`."""
        if self.scale is not None or self.value_range is None:
            return self
        scale, shift = mapping(self.value_range, pixel_range)
        return replace(self, scale=scale, shift=shift)

    def __len__(self) -> int:
        return len(self.source)

    def head(self, n: int | None) -> StreamedDataset:
        """Returns the first ``n`` items, or all of them for None."""
        return self if n is None else replace(self, source=torch.utils.data.Subset(self.source, range(n)))

    def to(self, device: torch.device | str) -> StreamedDataset:
        """Returns the data set itself: its batches are copied to the device one by one."""
        return self

    def with_shape(self, shape: Any) -> StreamedDataset:
        """Returns the data as samples of ``shape``. As `fastsde.data.Dataset.with_shape`."""
        return self if self.shape == tuple(shape) else replace(self, as_shape=tuple(shape))

    def item(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns an item: uint8 or fp32 of the data set's shape, and its conditions.

        Raises:
            ValueError: if its shape or dtype is not that of the first item, it is not finite, it has other conditions,
                or a label is out of range.
        """
        x, conditions = _item(self.source[index], index)
        try:
            x = in_shape(x[None], self.shape)[0]
        except ValueError as error:
            raise ValueError(f"item {index} of {self.name}: {error}") from None
        return self._checked(x, conditions, index)

    def _checked(self, x: Tensor, conditions: dict[str, Tensor], index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns an item in the data set's shape; raises as `item` does."""
        who = f"item {index} of {self.name}"
        if x.dtype != self.dtype:
            raise ValueError(f"{who} must be {self.dtype} like the first one, got {x.dtype}")
        if x.is_floating_point():
            check_tensor(f"{who} (as fp32)", x, finite=True)
        if conditions.keys() != self.described.keys():
            raise ValueError(f"{who} must have the conditions {list(self.described)}, got {list(conditions)}")
        for name, value in conditions.items():
            problem = self.described[name].problem(value)
            if problem is not None:
                raise ValueError(f"{who} has a wrong {name}: {problem}")
        return x, conditions


def as_dataset(given: Any, name: str = "") -> Dataset | StreamedDataset:
    """Returns a data set of this package as it is, and any other map-style one as a `StreamedDataset`.

    Raises:
        TypeError: for anything else, such as an array; the message says what to do.
    """
    if isinstance(given, (Dataset, StreamedDataset)):
        return given
    if isinstance(given, (Tensor, np.ndarray)):
        return Dataset(name, given)  # type: ignore[arg-type]
    _check_map_style(given)
    return StreamedDataset(name or type(given).__name__, given)


def _check_map_style(given: Any) -> None:
    iterable = isinstance(given, (torch.utils.data.IterableDataset, Mapping, str))
    if iterable or not (hasattr(given, "__getitem__") and hasattr(given, "__len__")):
        raise TypeError(
            f"dataset must be a fastsde.data.Dataset, an array [N, *shape], or have a length and items, got "
            f"{type(given).__name__}"
        )


def in_memory(dataset: Any, name: str = "", described: Mapping[str, Condition] | None = None) -> Dataset:
    """Loads all items of a map-style data set into a `fastsde.data.Dataset`, once: random transforms are then fixed.

    Args:
        dataset: as the source of a `StreamedDataset`.
        name: its name, by default that of its class.
        described: as for `fastsde.data.Dataset`.

    Raises:
        TypeError, ValueError: as for `StreamedDataset` and `fastsde.data.Dataset`, or for items of different shapes.
    """
    _check_map_style(dataset)
    items = [_item(dataset[i], i) for i in range(len(dataset))]
    if not items:
        raise ValueError("dataset must have at least one item, got none")
    expected = _form(*items[0])
    for number, item in enumerate(items):
        if _form(*item) != expected:
            raise ValueError(
                f"all items must have the shapes, dtypes and conditions of the first, {expected}, got {_form(*item)} "
                f"in item {number}"
            )
    values = {key: torch.stack([conditions[key] for _, conditions in items]) for key in items[0][1]}
    classes = getattr(dataset, "classes", None)
    if described is None and classes is not None and "label" in values:
        described = {"label": Condition(classes=len(classes), names=tuple(str(each) for each in classes))}
    name = name or type(dataset).__name__
    return Dataset(name, torch.stack([x for x, _ in items]), conditions=values, described=described or {})


def _form(x: Tensor, conditions: Mapping[str, Tensor]) -> str:
    """Returns the dtypes and shapes of an item, for messages."""
    values = {"x": x, **conditions}
    return ", ".join(f"{name}: {value.dtype} {list(value.shape)}" for name, value in sorted(values.items()))


def _item(given: Any, index: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns x and the conditions of an item."""
    if isinstance(given, Mapping):
        if "x" not in given:
            raise TypeError(f"item {index} must have an 'x', got {', '.join(map(str, given))}")
        x, rest = given["x"], {key: value for key, value in given.items() if key != "x"}
    elif isinstance(given, (tuple, list)):
        if len(given) not in (1, 2):
            raise TypeError(f"item {index} must be x, (x, label) or (x, conditions), got {len(given)} values")
        x, second = given[0], given[1] if len(given) == 2 else {}
        rest = dict(second) if isinstance(second, Mapping) else {"label": second}
    else:
        x, rest = given, {}
    return numbers(_array(x), f"item {index}"), {key: _condition(key, value, index) for key, value in rest.items()}


def _array(x: Any) -> Any:
    """Returns a PIL image as an array ``[C, H, W]``, and anything else as it is."""
    if not (hasattr(x, "getbands") and hasattr(x, "convert")):
        return x
    pixels = np.array(x if x.mode in ("L", "RGB") else x.convert("RGB"))
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def _condition(key: str, value: Any, index: int) -> Tensor:
    try:
        array = isinstance(value, (np.ndarray, np.generic))
        tensor = from_numpy(np.asarray(value), key) if array else torch.as_tensor(value, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"item {index} must have a number or an array as {key}, got {type(value).__name__}") from error
    if tensor.is_complex():
        raise TypeError(f"item {index} must have real numbers as {key}, got {tensor.dtype}")
    return tensor.float() if tensor.is_floating_point() else tensor.long()
