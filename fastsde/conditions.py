"""What a network takes besides x and t: a class label or a vector a sample, and the value that stands for none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import noise
from .validation import check_instance, check_int, check_ints, check_number

__all__ = [
    "Condition",
    "check_labels",
    "completed",
    "describe",
    "from_dicts",
    "null_values",
    "rows_of",
    "to_dicts",
    "unconditional",
]


@dataclass(frozen=True)
class Condition:
    """A condition of a network: labels in [0, classes), or floating-point values of a shape.

    Args:
        classes: the number of classes; 0 for values.
        shape: the shape of one sample's values.
        null: the value of "no condition", which takes the place of dropped conditions in training and is what guidance
            guides away from. By default ``classes`` for labels and 0 for values.
        names: the names of the classes, or none.
        shares: how frequent each class is, by which labels are drawn for samples that are given none; they need not add
            up to 1. By default all classes are equally frequent.

    Raises:
        TypeError, ValueError: for a field of the wrong type or out of range.
    """

    classes: int = 0
    shape: tuple[int, ...] = ()
    null: float | None = None
    names: tuple[str, ...] = ()
    shares: tuple[float, ...] = field(default=(), compare=False)

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
        shares = tuple(check_number("shares", share, "at least 0 and finite", _is_share) for share in self.shares)
        if shares and (len(shares) != self.classes or sum(shares) == 0):
            raise ValueError(f"shares must have a share for each of the {self.classes} classes, got {shares}")
        object.__setattr__(self, "shares", shares)

    def draw(self, u: Tensor) -> Tensor:
        """Returns labels int64 for uniforms on [0, 1) of the same shape, by the shares of the classes."""
        shares = torch.tensor(self.shares or [1.0] * self.classes, dtype=torch.float64, device=u.device)
        edges = shares.cumsum(0) / shares.sum()
        return torch.searchsorted(edges, u.double(), right=True).clamp(max=self.classes - 1)

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
    counts = value.bincount()
    return Condition(classes=len(counts), shares=tuple((counts / len(value)).tolist()))


def _is_share(value: float) -> bool:
    return 0 <= value < math.inf


def completed(
    known: Mapping[str, Condition], given: Mapping[str, Any] | None, keys: Tensor, has_null: bool
) -> Mapping[str, Any]:
    """Returns the conditions of samples, with those that are not given.

    If none is given, labels are drawn, as frequent as in the data: a sample's label is a function of its key, by a
    uniform of step 0 in stream 4. Vectors cannot be drawn; they, and what is left out of several conditions, are
    "no condition".

    Args:
        keys: int64 ``[n, 2]``, one key per sample.
        has_null: whether the network has learned to do without its conditions.

    Raises:
        ValueError: for a condition that is not given, and that the network has not learned to do without.
    """
    if given is None and all(condition.classes for condition in known.values()):
        u = noise.uniform(keys, 0, (len(known),), noise.STREAM_OTHER)
        return {name: condition.draw(u[:, i]) for i, (name, condition) in enumerate(known.items())}
    lacks = [name for name in known if name not in (given or {})]
    if lacks and not has_null:
        raise ValueError(
            f"model_kwargs must be given, as the network was trained without dropping its conditions "
            f"({', '.join(known)}); got none for {', '.join(lacks)}"
        )
    return {**(given or {}), **{name: known[name].nulls(len(keys), keys.device) for name in lacks}}


def check_labels(name: str, given: Mapping[str, Any] | None, known: Mapping[str, Condition]) -> None:
    """Raises TypeError or ValueError for labels that are none. It waits for a GPU."""
    for key, condition in known.items():
        value = (given or {}).get(key)
        if not condition.classes or value is None:
            continue
        who, end = f"{name}[{key!r}]", condition.classes - 1
        expected = f"labels from 0 to {end}, or {condition.null} for none"
        if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
            came = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{who} must be a tensor of {expected}, got {came}")
        wrong = (value < 0) | (value > end) & (value != condition.null)
        if wrong.any():
            raise ValueError(f"{who} must be {expected}, got {int(value.min())} .. {int(value.max())}")


def unconditional(
    known: Mapping[str, Condition], n: int, device: torch.device | str, has_null: bool
) -> dict[str, Tensor]:
    """Returns "no condition" for n samples, which guidance guides away from.

    Raises:
        ValueError: if the network has not learned to do without its conditions.
    """
    if not has_null:
        raise ValueError(
            f"uncond_kwargs must be given, as the network was trained without dropping its conditions "
            f"({', '.join(known)}); got none"
        )
    return null_values(known, n, device)


def null_values(known: Mapping[str, Condition], n: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Returns "no condition" for n samples, by name."""
    return {name: condition.nulls(n, device) for name, condition in known.items()}


def rows_of(kwargs: Mapping[str, Any], rows: slice | Tensor) -> dict[str, Any]:
    """Returns the arguments of some samples: the rows of tensors, and all other values as they are."""
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in kwargs.items()}


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
