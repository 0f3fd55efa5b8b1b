"""How the threads that PyTorch computes with wait for one another.

By default they spin for milliseconds. On a machine with other work a spinning thread takes the processor from the one
that it waits for, and everything takes several times as long. Threads that sleep at once make small operations slow on
an idle machine, since waking one takes longer than the operation does. So they spin for about as long as waking takes,
and then sleep. OpenMP reads its environment when it is loaded, so this module does not import torch.
"""

from __future__ import annotations

import os
import sys

__all__ = ["wait_passively", "wait_policy"]

# What a user says it with, to the OpenMP of GCC or of LLVM and Intel.
_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_SPINS = "1000"  # of GCC's OpenMP, before a thread sleeps: some 10 microseconds, in which the next operation comes
_set_here = False


def wait_passively() -> None:
    """Makes threads that wait sleep after a short spin, in this process and those that it starts.

    For programs, before they import torch. Does nothing where the environment says how to wait, or where torch is
    loaded and has read it.
    """
    global _set_here
    if "torch" not in sys.modules and not _given():
        os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": _SPINS}
        _set_here = True


def wait_policy() -> str:
    """What is in force and where it comes from, such as "active (OMP_WAIT_POLICY)"."""
    if _set_here:
        return f"passive after {_SPINS} spins (set by fastsde)"
    return ", ".join(f"{os.environ[name]} ({name})" for name in _given()) or "the runtime's default"


def _given() -> list[str]:
    return [name for name in _VARIABLES if name in os.environ]
