"""Processes: how data become noise. One process per file, with the file's name; see `Process` for the interface."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from typing import Any

from ..validation import check_instance
from ..vocabulary import PROCESSES as _NAMES
from .cosine_vp import CosineVPSDE
from .edm import EDM
from .process import Process, as_time, check_process, match_dims
from .rectified_flow import RectifiedFlow
from .sub_vp import SubVPSDE
from .ve import VESDE
from .vp import VPSDE

__all__ = [
    "EDM",
    "PROCESSES",
    "VESDE",
    "VPSDE",
    "CosineVPSDE",
    "Process",
    "RectifiedFlow",
    "SubVPSDE",
    "as_time",
    "check_process",
    "from_dict",
    "match_dims",
    "to_dict",
]


def _process_in(file: str) -> type[Process]:
    """Returns the process that a file of this folder defines."""
    for kind in vars(import_module(f".{file}", __name__)).values():
        if isinstance(kind, type) and issubclass(kind, Process) and vars(kind).get("name") == file:
            return kind
    raise ImportError(f"fastsde/sde/{file}.py must define a process whose name is {file!r}")


PROCESSES: dict[str, type[Process]] = {name: _process_in(name) for name in _NAMES}
"""The classes of the processes by name, the default first."""
globals().update({kind.__name__: kind for kind in PROCESSES.values()})  # the imports above are for type checkers


def to_dict(sde: Process) -> dict[str, Any]:
    """Returns the name of a process and its fields as a dict for JSON.

    Raises:
        TypeError: for a value that is not a process, or not a process of this package.
    """
    check_process("sde", sde)
    if type(sde) not in PROCESSES.values():
        raise TypeError(
            f"sde must be one of {', '.join(kind.__name__ for kind in PROCESSES.values())} to be saved, got "
            f"{type(sde).__name__}: a checkpoint holds the name of its process"
        )
    return asdict(sde)  # type: ignore[call-overload,no-any-return]


def from_dict(values: Mapping[str, Any]) -> Process:
    """Returns the process of a dict from `to_dict`; without a name the VP-SDE, the only process of early checkpoints.

    Raises:
        TypeError: for a value that is not a dict, or for fields that the process does not have.
        ValueError: for an unknown name, or a field out of its range.
    """
    check_instance("sde", values, dict)
    fields = dict(values)
    name = fields.pop("name", "vp")
    if name not in PROCESSES:
        raise ValueError(f"sde must have the name of a process, one of {', '.join(PROCESSES)}, got {name!r}")
    return PROCESSES[name](**fields)
