"""Tracing: a sampling loop that somebody else wrote is run once on symbols and becomes a table."""

from __future__ import annotations

from .accelerated import Accelerated, accelerate, trace
from .draws import Replay
from .errors import MismatchError, TraceError
from .program import Program
from .recording import record
from .traced import Traced

__all__ = [
    "Accelerated",
    "MismatchError",
    "Program",
    "Replay",
    "TraceError",
    "Traced",
    "accelerate",
    "record",
    "trace",
]
