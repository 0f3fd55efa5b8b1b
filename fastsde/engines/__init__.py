"""Ways to run a trajectory. An engine, ``run(network, request)``, returns `fastsde.reference.sample`'s samples."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..request import Request
from . import adaptive, eager, graph, persistent, plain
from .capture import CaptureError
from .graph import release
from .network import Network

__all__ = ["CaptureError", "Network", "get", "release"]

_ENGINES: dict[str, Callable[[Network, Request], Tensor]] = {
    "reference": plain.run,
    "eager": eager.run,
    "graph": graph.run,
    "persistent": persistent.run,
}


def get(backend: str) -> Callable[[Network, Request], Tensor]:
    """Returns the engine of a backend, or of adaptive solvers, which have one of their own."""
    return adaptive.run if backend == "adaptive" else _ENGINES[backend]
