"""Ways to run a trajectory. Every engine has the signature of `fastsde.reference.sample` and gives its samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
from . import eager

__all__ = ["BACKENDS", "choose", "unavailable_reason"]

_ENGINES: dict[str, Callable[..., Tensor]] = {"reference": reference.sample, "eager": eager.sample}
BACKENDS = ("auto", "reference", "eager", "graph", "persistent")


def unavailable_reason(
    backend: str, device: torch.device, dtype: torch.dtype = torch.float32, compile: bool = False
) -> str | None:
    """Why a backend cannot run on a device with a state of ``dtype``, and what to do; None where it can."""
    if backend not in _ENGINES:
        return f"backend {backend!r} is not part of this version of fastsde; use 'eager' or 'reference'"
    if compile and dtype == torch.float64:
        return "compile=True and dtype=torch.float64 exclude each other; leave one of them out"
    if backend == "eager" and dtype == torch.float64:
        return "backend 'eager' keeps the state in fp32; for dtype=torch.float64 use 'reference'"
    if backend == "reference" and compile:
        return "backend 'reference' is plain PyTorch; for compile=True use 'eager'"
    if device.type == "cuda" and not torch.cuda.is_available():
        return f"device {device} is not there (torch.cuda.is_available() is False); use device='cpu'"
    return None


def choose(backend: str, device: torch.device, dtype: torch.dtype, compile: bool = False) -> str:
    """The name of the backend that runs: the one asked for, or for "auto" the fastest that can.

    Raises:
        ValueError: for an unknown backend, or one that cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        backend = "reference" if dtype == torch.float64 else "eager"
    reason = unavailable_reason(backend, device, dtype, compile)
    if reason is not None:
        raise ValueError(reason)
    return backend


def get(backend: str) -> Callable[..., Tensor]:
    """The engine of a chosen backend."""
    return _ENGINES[backend]
