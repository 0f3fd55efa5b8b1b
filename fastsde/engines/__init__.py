"""Ways to run a trajectory. Every engine has the signature of `fastsde.reference.sample` and gives its samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..vocabulary import BACKENDS
from . import capture, eager, graph, persistent
from .capture import CaptureError
from .graph import release
from .network import Network

__all__ = ["BACKENDS", "CaptureError", "choose", "get", "release", "unavailable_reason"]

_ENGINES: dict[str, Callable[..., Tensor]] = {
    "reference": reference.sample,
    "eager": eager.sample,
    "graph": graph.sample,
    "persistent": persistent.sample,
}
_FASTEST_FIRST = ("persistent", "graph", "eager", "reference")
# What a backend is, where it runs rows together, and the options of a call that need the host or another network call.
_TOGETHER = {"graph": "replays rows as CUDA graphs", "persistent": "is one launch for a whole trajectory"}
_WITHOUT = {"graph": ("noise", "callback"), "persistent": ("compile", "guidance", "noise", "callback", "model_kwargs")}


def unavailable_reason(
    backend: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    compile: bool = False,
    network: Network | None = None,
    sample_shape: Sequence[int] = (),
    options: Collection[str] = (),
) -> str | None:
    """Why a backend cannot run, and what to do; None where it can.

    Args:
        dtype: of the state.
        network, sample_shape: what is to be run on samples of which shape, where that is known.
        options: the names of a call's options that are in use, as far as not every backend has them.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        return f"device {device} is not there (torch.cuda.is_available() is False); use device='cpu'"
    if compile and dtype == torch.float64:
        return "compile=True and dtype=torch.float64 exclude each other; leave one of them out"
    if backend == "reference":
        return "backend 'reference' is plain PyTorch; for compile=True use 'eager'" if compile else None
    if dtype == torch.float64:
        return f"backend {backend!r} keeps the state in fp32; for dtype=torch.float64 use 'reference'"
    if backend == "eager":
        return None
    if backend == "graph" and not (ops.has_triton(device) and capture.can_record(device)):
        return f"backend 'graph' needs Triton and a CUDA GPU, got device {device}; use 'eager' or 'reference'"
    if backend == "persistent" and not ops.has_kernels(device):
        needs = f"Triton and a CUDA GPU, or the CPU and native kernels, got device {device}"
        if device.type == "cpu":
            needs += f" ({ops.native_state()})"
        return f"backend 'persistent' needs {needs}; use 'eager' or 'reference'"
    used = [*options, "compile"] if compile else options
    missing = next((name for name in _WITHOUT[backend] if name in used), None)
    if missing is not None:
        return f"backend {backend!r} {_TOGETHER[backend]}, without {missing}; use 'eager' or 'reference'"
    if backend == "persistent" and network is not None:
        reason = persistent.unavailable_reason(network, sample_shape, device)
        others = "'graph' or 'eager'" if device.type == "cuda" else "'eager' or 'reference'"
        return None if reason is None else f"backend 'persistent': {reason}; use {others}"
    return None


def choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compile: bool = False,
    network: Network | None = None,
    sample_shape: Sequence[int] = (),
    options: Collection[str] = (),
    without: Collection[str] = (),
) -> str:
    """The name of the backend that runs: the one asked for, or for "auto" the fastest that can.

    Args:
        without: backends that "auto" does not take, since they have failed.

    Raises:
        ValueError: for an unknown backend, or one that cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    given: dict[str, Any] = {"compile": compile, "network": network, "sample_shape": sample_shape, "options": options}
    reason = None
    fastest_first = [candidate for candidate in _FASTEST_FIRST if candidate not in without]
    for candidate in fastest_first if backend == "auto" else (backend,):
        reason = unavailable_reason(candidate, device, dtype, **given)
        if reason is None and (candidate == backend or _pays(candidate, network, device)):
            return candidate
    raise ValueError(reason)


def _pays(backend: str, network: Network | None, device: torch.device) -> bool:
    """Whether "auto" takes a backend that can run."""
    return backend != "persistent" or network is None or persistent.pays(network, device)


def get(backend: str) -> Callable[..., Tensor]:
    """The engine of a chosen backend."""
    return _ENGINES[backend]
