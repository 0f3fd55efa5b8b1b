"""Ways to run a trajectory. Every engine has the signature of `fastsde.reference.sample` and gives its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from . import eager, persistent
from .network import Network

__all__ = ["BACKENDS", "choose", "get", "unavailable_reason"]

_ENGINES: dict[str, Callable[..., Tensor]] = {
    "reference": reference.sample,
    "eager": eager.sample,
    "persistent": persistent.sample,
}
BACKENDS = ("auto", "reference", "eager", "graph", "persistent")
_FASTEST_FIRST = ("persistent", "eager", "reference")


def unavailable_reason(
    backend: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    compile: bool = False,
    network: Network | None = None,
    sample_shape: Sequence[int] = (),
    option: str | None = None,
) -> str | None:
    """Why a backend cannot run, and what to do; None where it can.

    Args:
        dtype: of the state.
        network, sample_shape: what is to be run on samples of which shape, where that is known.
        option: the name of a call's option that not every backend has, if there is one.
    """
    if backend not in _ENGINES:
        return f"backend {backend!r} is not part of this version of fastsde; use 'eager' or 'reference'"
    if device.type == "cuda" and not torch.cuda.is_available():
        return f"device {device} is not there (torch.cuda.is_available() is False); use device='cpu'"
    if compile and dtype == torch.float64:
        return "compile=True and dtype=torch.float64 exclude each other; leave one of them out"
    if backend == "reference":
        return "backend 'reference' is plain PyTorch; for compile=True use 'eager'" if compile else None
    if dtype == torch.float64:
        return f"backend {backend!r} keeps the state in fp32; for dtype=torch.float64 use 'reference'"
    if backend == "persistent":
        if not ops.has_kernels(device):
            return f"backend 'persistent' needs Triton and a CUDA GPU, got device {device}; use 'eager' or 'reference'"
        if compile or option is not None:
            name = "compile" if compile else option
            return (
                f"backend 'persistent' is one launch for a whole trajectory, without {name}; use 'eager' or 'reference'"
            )
        reason = None if network is None else persistent.unavailable_reason(network, sample_shape)
        return None if reason is None else f"backend 'persistent': {reason}; use 'eager' or 'reference'"
    return None


def choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compile: bool = False,
    network: Network | None = None,
    sample_shape: Sequence[int] = (),
    option: str | None = None,
) -> str:
    """The name of the backend that runs: the one asked for, or for "auto" the fastest that can.

    Raises:
        ValueError: for an unknown backend, or one that cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    options: dict[str, Any] = {"compile": compile, "network": network, "sample_shape": sample_shape, "option": option}
    reason = None
    for candidate in _FASTEST_FIRST if backend == "auto" else (backend,):
        reason = unavailable_reason(candidate, device, dtype, **options)
        if reason is None and (candidate == backend or _pays(candidate, network)):
            return candidate
    raise ValueError(reason)


def _pays(backend: str, network: Network | None) -> bool:
    """Whether "auto" takes a backend that can run."""
    return backend != "persistent" or network is None or persistent.pays(network)


def get(backend: str) -> Callable[..., Tensor]:
    """The engine of a chosen backend."""
    return _ENGINES[backend]
