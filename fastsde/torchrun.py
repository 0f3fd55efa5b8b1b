"""Processes that torchrun starts: the group they form, the device of each, and how their errors are reported."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from .validation import check_device

__all__ = ["Ranks", "device", "job", "launched", "process_group", "ranks"]

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# How long ranks wait for each other to start, and for each other's gradients.
_JOIN = timedelta(minutes=30)
# After an error: how long to wait for another rank to report it, or for NCCL to leave a group that lost a member.
_GRACE = timedelta(seconds=10)
# After this time, torchrun has noticed that a rank failed, and names that rank as the cause.
_NOTICED = timedelta(seconds=2)
_joined = itertools.count()


@dataclass(frozen=True)
class Ranks:
    """The place of this process among all (``rank`` of ``world``) and among those of its machine.

    Args:
        rank: its number among all processes, from 0.
        world: the number of all processes.
        local_rank: its number among the processes of its machine.
        local_world: the number of processes of its machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def launched() -> bool:
    """Returns whether torchrun (or a similar launcher) has started this process, judging by the environment."""
    return all(name in os.environ for name in _ENVIRONMENT)


def ranks() -> Ranks | None:
    """Returns this process's place in its torch.distributed group, or None without one."""
    from torch import distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    rank, world = dist.get_rank(), dist.get_world_size()
    return Ranks(rank, world, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", world)))


@contextmanager
def process_group() -> Iterator[Ranks | None]:
    """Joins the group that torchrun describes, and leaves it at the end, even after an error.

    Uses Gloo on the CPU, and NCCL on GPUs if there are any. Does nothing if there is a group already, or if no launcher
    started the process.

    Raises:
        RuntimeError: if the other ranks do not join.
    """
    if ranks() is not None or not launched():
        yield ranks()
        return
    from torch import distributed as dist

    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    store, rank, world = _store(f"group-{next(_joined)}")  # the addresses of a group outlive it
    with _steady_threads():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=_JOIN, store=store, rank=rank, world_size=world
        )
        with _leaving():
            yield ranks()


def _store(name: str) -> tuple[Any, int, int]:
    """Returns a key-value store that all ranks share, this rank, and the number of ranks."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://", timeout=_JOIN))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # a store outlives the ranks that torchrun restarts
    return PrefixStore(f"fastsde-{attempt}-{name}", store), rank, world


@contextmanager
def _leaving() -> Iterator[None]:
    """Destroys all groups at the end. After an error it waits only briefly, since another rank may be dead."""
    from torch import distributed as dist

    try:
        yield
    except BaseException:

        def leave() -> None:
            with contextlib.suppress(Exception):  # the first error is the one to report
                dist.destroy_process_group()

        thread = threading.Thread(target=leave, daemon=True)
        thread.start()
        thread.join(_GRACE.total_seconds())
        raise
    # A DistributedDataParallel module that is garbage, but not collected, keeps the group's threads alive, and a thread
    # that needs the interpreter while it shuts down aborts the process: in PyTorch 2.14 one time out of twenty.
    gc.collect()
    dist.destroy_process_group()


@contextmanager
def _steady_threads() -> Iterator[None]:
    """Uses one thread, unless OMP_NUM_THREADS is set: torchrun sets this for several ranks, but not for one.

    With another number of threads, sums are split, and so rounded, differently.
    """
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def job(command: Callable[..., None]) -> Callable[..., None]:
    """Makes a command run on every rank of a `process_group`, if torchrun started the process.

    An error that a user can fix becomes exit code 1. The first rank that fails prints its error and passes it to
    torchrun, which ends the other ranks; those print nothing.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        if not launched():
            return command(*args, **kwargs)
        from torch.distributed.elastic.multiprocessing.errors import record

        store, _, _ = _store("errors")

        def run() -> None:
            try:
                command(*args, **kwargs)
            except (ValueError, OSError, RuntimeError) as error:
                # Reported while this rank is still in the group: once it has left, other ranks fail because of that.
                if not _told_first(error, store):
                    raise SystemExit(1) from error
                raise

        with process_group():
            try:
                record(run)()
            except (ValueError, OSError, RuntimeError) as error:
                raise SystemExit(1) from error

    return wrapped


def _told_first(error: Exception, store: Any) -> bool:
    """Prints an error and returns True, or, if another rank failed first, waits for its report and returns False."""
    try:
        if store.add("failed", 1) > 1:
            store.wait(["told"], _GRACE)
            time.sleep(_NOTICED.total_seconds())
            return False
        print(f"Error: {error}", file=sys.stderr, flush=True)
        store.set("told", "")
    except RuntimeError:  # the rank that should print, or that holds the store, is dead
        print(f"Error: {error}", file=sys.stderr, flush=True)
    return True


def device(asked: str | None = None) -> torch.device:
    """Returns the device of this rank: of several ranks on a machine, each uses the GPU of its local rank.

    Args:
        asked: a device, or None for CUDA if available, else the CPU.

    Raises:
        ValueError: for a device that cannot be used, or that several ranks would share.
    """
    asked = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    here = ranks()
    if here is None or not asked.startswith("cuda") or not torch.cuda.is_available():
        return check_device(asked)
    if here.local_world > 1:
        if asked != "cuda":
            raise ValueError(
                f"device {asked!r} would be shared by the {here.local_world} ranks of this machine: give 'cuda', and "
                f"each rank uses a GPU of its own, or start one rank"
            )
        gpus = torch.cuda.device_count()
        # A launcher other than torchrun may show each rank only its own GPU.
        own = gpus == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
        if here.local_rank >= gpus and not own:
            raise ValueError(
                f"rank {here.rank} has no GPU of its own, {here.local_world} ranks share a machine with {gpus}: start "
                f"--nproc-per-node {gpus}, or give the device 'cpu'"
            )
        asked = "cuda:0" if own else f"cuda:{here.local_rank}"
    chosen = check_device(asked)
    torch.cuda.set_device(chosen)  # NCCL and Triton use the current device
    return chosen
