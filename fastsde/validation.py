"""Checks of arguments. Each error names the argument, the value given and what was expected."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_bool",
    "check_device",
    "check_instance",
    "check_int",
    "check_ints",
    "check_keys",
    "check_kwargs",
    "check_number",
    "check_range",
    "check_shape",
    "check_tensor",
]


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """Returns an int, also from another integral type such as NumPy's, of at least ``low`` and below ``high``."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    value = int(value)
    if value < low or (high is not None and value >= high):
        power = high is not None and high >= 2**16 and high & (high - 1) == 0
        end = f"2^{high.bit_length() - 1}" if high is not None and power else high
        bounds = f"at least {low}" if high is None else f"in [{low}, {end})"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return value


def check_bool(name: str, value: object) -> bool:
    """Returns True or False; values that are merely truthy or falsy are refused."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_instance(name: str, value: object, kind: type) -> None:
    """Raises TypeError unless ``value`` is an instance of ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")


def check_number(
    name: str, value: object, expected: str = "finite", within: Callable[[Any], bool] = math.isfinite
) -> float:
    """Returns a real number that is ``within`` its range, which ``expected`` describes."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not within(value):
        raise ValueError(f"{name} must be {expected}, got {value}")
    return float(value)


def check_range(name: str, value: object) -> tuple[float, float]:
    """Returns two finite numbers, the lower one first."""
    if not isinstance(value, Sequence):
        raise TypeError(f"{name} must be (low, high), got {type(value).__name__}")
    bounds = tuple(check_number(f"{name}[{i}]", bound, within=lambda _: True) for i, bound in enumerate(value))
    if len(bounds) != 2 or not -math.inf < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"{name} must be (low, high) with low < high, both finite, got {value}")
    return bounds


def check_device(device: torch.device | str) -> torch.device:
    """Returns a device that tensors can be created on, with its index (so "cuda" becomes the current one)."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {error}") from error


def check_ints(name: str, values: object, low: int = -(2**63)) -> tuple[int, ...]:
    """Returns a sequence of ints of at least ``low``, as a tuple."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of ints, got {type(values).__name__}")
    return tuple(check_int(f"{name}[{i}]", value, low) for i, value in enumerate(values))


def check_shape(name: str, shape: object) -> tuple[int, ...]:
    """Returns a sequence of ints of at least 0, as a tuple."""
    return check_ints(name, shape, 0)


def check_tensor(
    name: str,
    value: object,
    *,
    shape: Sequence[int] | None = None,
    device: torch.device | None = None,
    floating: bool = False,
    finite: bool = False,
) -> Tensor:
    """Returns a tensor, after the requested checks of its shape, device, dtype and finiteness."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if floating and not value.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got {value.dtype}")
    if shape is not None and value.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")
    if finite and not torch.isfinite(value).all():
        raise ValueError(f"{name} must be finite, got {int((~torch.isfinite(value)).sum())} values of NaN or infinity")
    return value


def check_keys(keys: object, n: int, device: torch.device) -> Tensor:
    """Returns the keys of n samples, int64 ``[n, 2]`` (uint64 is accepted too)."""
    tensor = check_tensor("keys", keys, shape=(n, 2), device=device)
    if tensor.dtype == torch.uint64:
        tensor = tensor.view(torch.int64)
    if tensor.dtype != torch.int64:
        raise TypeError(f"keys must be int64 (the bits of uint64 values), got {tensor.dtype}")
    return tensor


def check_kwargs(name: str, kwargs: object, n: int, device: torch.device) -> dict[str, Any]:
    """Returns keyword arguments of a network: tensors ``[n, ...]`` on the device, and plain scalars."""
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"{name} must be a mapping of names to tensors, got {type(kwargs).__name__}")
    for key, value in kwargs.items():
        argument = f"{name}[{key!r}]"
        if key in ("x", "t"):
            raise ValueError(f"{argument} would hide the {key} that model(x, t) is called with")
        if value is None or isinstance(value, (bool, int, float, str)):
            continue
        tensor = check_tensor(argument, value, device=device)
        if tensor.ndim == 0 or len(tensor) != n:
            raise ValueError(f"{argument} must have the batch of {n} first, got shape {list(tensor.shape)}")
    return dict(kwargs)
