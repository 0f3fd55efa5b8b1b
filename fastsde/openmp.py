"""How PyTorch's compute threads wait for one another.

By default they spin for milliseconds. On a busy machine a spinning thread takes the processor from the thread that it
waits for, and everything takes several times as long. Threads that sleep at once make small operations slow on an idle
machine, since waking a thread takes longer than the operation. So threads spin for about as long as waking takes, and
then sleep. OpenMP reads its environment when it is loaded, so this module does not import torch.
"""

from __future__ import annotations

import os
import sys

__all__ = ["wait_passively", "wait_policy"]

# The variables by which a user sets this, for the OpenMP of GCC, or of LLVM and Intel.
_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_SPINS = "1000"  # of GCC's OpenMP, before a thread sleeps: about 10 microseconds, in which the next operation starts
_set_here = False


def wait_passively() -> None:
    """Makes waiting threads sleep after a short spin, in this process and those that it starts.

    Programs call this before they import torch. Does nothing if the environment already says how to wait, or if torch
    is already loaded.
    """
    global _set_here
    if "torch" not in sys.modules and not _given():
        os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": _SPINS}
        _set_here = True


def wait_policy() -> str:
    """Returns the policy in force and where it comes from, such as "active (OMP_WAIT_POLICY)"."""
    if _set_here:
        return f"passive after {_SPINS} spins (set by fastsde)"
    return ", ".join(f"{os.environ[name]} ({name})" for name in _given()) or "the runtime's default"


def _given() -> list[str]:
    return [name for name in _VARIABLES if name in os.environ]
