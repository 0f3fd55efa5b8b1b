"""What a network takes besides x and t: a class label or a vector a sample, and the value that stands for none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .validation import check_instance, check_int, check_ints, check_number

__all__ = ["Condition", "describe", "from_dicts", "null_values", "to_dicts"]


@dataclass(frozen=True)
class Condition:
    """A condition of a network: labels in [0, classes), or floating-point values of a shape.

    Args:
        classes: the number of classes; 0 for values.
        shape: the shape of one sample's values.
        null: the value of "no condition", which takes the place of dropped conditions in training and is what guidance
            guides away from. By default ``classes`` for labels and 0 for values.
        names: the names of the classes, or none.

    Raises:
        TypeError, ValueError: for a field of the wrong type or out of range.
    """

    classes: int = 0
    shape: tuple[int, ...] = ()
    null: float | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_int("classes", self.classes, 0)
        object.__setattr__(self, "shape", check_ints("shape", self.shape, 0))
        if self.classes and self.shape:
            raise ValueError(f"shape must be () for labels, got {self.shape}")
        null: float = self.classes if self.null is None else self.null
        object.__setattr__(self, "null", check_int("null", null, 0) if self.classes else check_number("null", null))
        names = tuple(self.names)
        for name in names:
            check_instance("names", name, str)
        if names and len(names) != self.classes:
            raise ValueError(f"names must have one name for each of the {self.classes} classes, got {len(names)}")
        object.__setattr__(self, "names", names)

    def nulls(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """Returns "no condition" for n samples: int64 ``[n]`` or fp32 ``[n, *shape]``."""
        assert self.null is not None
        dtype = torch.int64 if self.classes else torch.float32
        return torch.full((n, *self.shape), self.null, dtype=dtype, device=device)

    def problem(self, value: Tensor) -> str | None:
        """Returns what is wrong with the value of one sample, a tensor on the CPU; None for a valid one."""
        if self.classes and not value.is_floating_point() and value.ndim == 0:
            low, high = 0, self.classes - 1
            return None if low <= int(value) <= high else f"it must be a label from {low} to {high}, got {int(value)}"
        if self.classes:
            return f"it must be a label, one integer, got {value.dtype} {list(value.shape)}"
        if not value.is_floating_point() or tuple(value.shape) != self.shape:
            return f"it must be floating-point of shape {list(self.shape)}, got {value.dtype} {list(value.shape)}"
        return None if bool(value.isfinite().all()) else "it must be finite, got NaN or infinity"

    def label(self, name: str) -> int:
        """Returns the label that a name or a number stands for; only a name if there are names that are numbers.

        Raises:
            ValueError: for no name or number of a class.
        """
        if name in self.names:
            return self.names.index(name)
        counts = not any(each.isdecimal() for each in self.names)
        if counts and name.isdecimal() and int(name) < self.classes:
            return int(name)
        known = [f"a number from 0 to {self.classes - 1}"] if counts else []
        known += [f"one of {', '.join(self.names)}"] if self.names else []
        raise ValueError(f"label must be {' or '.join(known)}, got {name!r}")


def describe(value: Tensor) -> Condition:
    """Returns the condition that a data set's values ``[N, ...]`` are of: labels if they are integers."""
    if value.is_floating_point():
        return Condition(shape=tuple(value.shape[1:]))
    return Condition(classes=int(value.max()) + 1)


def null_values(conditions: Mapping[str, Condition], n: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Returns "no condition" for n samples, by name."""
    return {name: condition.nulls(n, device) for name, condition in conditions.items()}


def to_dicts(conditions: Mapping[str, Condition]) -> dict[str, Any]:
    """Returns conditions ready for JSON."""
    return {name: asdict(condition) for name, condition in conditions.items()}


def from_dicts(values: Mapping[str, Any]) -> dict[str, Condition]:
    """Inverts `to_dicts`, also after a JSON round trip.

    Raises:
        TypeError, ValueError: for anything else.
    """
    check_instance("conditions", values, dict)
    return {name: Condition(**value) for name, value in values.items()}
