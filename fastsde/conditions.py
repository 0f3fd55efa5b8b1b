"""What a network takes besides x and t: a class label or a vector a sample, and the value that stands for none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import noise
from .validation import check_instance, check_int, check_ints, check_number

__all__ = ["Condition", "check_labels", "describe", "drawn", "from_dicts", "to_dicts", "unconditional"]


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
    shares: tuple[float, ...] = ()

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

    def label(self, name: str) -> int:
        """Returns the label that a name or a number stands for.

        Raises:
            ValueError: for no name or number of a class.
        """
        if name in self.names:
            return self.names.index(name)
        if name.isdecimal() and int(name) < self.classes:
            return int(name)
        known = f" or one of {', '.join(self.names)}" if self.names else ""
        raise ValueError(f"label must be a number from 0 to {self.classes - 1}{known}, got {name!r}")


def describe(value: Tensor) -> Condition:
    """Returns the condition that a data set's values ``[N, ...]`` are of: labels if they are integers."""
    if value.is_floating_point():
        return Condition(shape=tuple(value.shape[1:]))
    counts = value.bincount()
    return Condition(classes=len(counts), shares=tuple((counts / len(value)).tolist()))


def _is_share(value: float) -> bool:
    return 0 <= value < math.inf


def drawn(known: Mapping[str, Condition], keys: Tensor, has_null: bool) -> dict[str, Tensor]:
    """Returns conditions for samples that are given none: labels as frequent as in the data, else "no condition".

    The label of a sample is a function of its key: a uniform of step 0 in stream 4.

    Args:
        keys: int64 ``[n, 2]``, one key per sample.
        has_null: whether the network has learned to do without its conditions.

    Raises:
        ValueError: for vectors that the network has not learned to do without.
    """
    if all(condition.classes for condition in known.values()):
        u = noise.uniform(keys, 0, (len(known),), noise.STREAM_OTHER)
        return {name: condition.draw(u[:, i]) for i, (name, condition) in enumerate(known.items())}
    if not has_null:
        raise ValueError(
            f"model_kwargs must be given, as the network was trained with {', '.join(known)} and not without; got none"
        )
    return {name: condition.nulls(len(keys), keys.device) for name, condition in known.items()}


def check_labels(known: Mapping[str, Condition], given: Any) -> None:
    """Raises ValueError for a label out of range. Anything else that may be wrong is left to others."""
    if not isinstance(given, Mapping):
        return
    for name, condition in known.items():
        value = given.get(name)
        if not condition.classes or not isinstance(value, Tensor) or value.is_floating_point() or not value.numel():
            continue
        low, high, null = int(value.min()), int(value.max()), int(condition.null or 0)
        if low < 0 or high > max(condition.classes - 1, null):
            raise ValueError(
                f"model_kwargs[{name!r}] must be labels from 0 to {condition.classes - 1}, or {null} for none, got "
                f"{low} .. {high}"
            )


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
    return {name: condition.nulls(n, device) for name, condition in known.items()}


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
