"""The calls to CUDA itself: work is recorded once as a CUDA graph, and replayed.

Recorded work reads and writes the same device memory at every replay; its host code does not run again.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ..notices import first_line

__all__ = ["CaptureError", "Recording", "can_record", "wait"]

# PyTorch records one graph at a time; another thread's kernels go on meanwhile (capture_error_mode "thread_local").
# Reentrant, for a network that itself samples while it warms up.
_ONE_AT_A_TIME = threading.RLock()
_ATTEMPTS = 2
# One stream per device to record on, since cuBLAS keeps a workspace for each stream that it has ever seen.
_streams: dict[torch.device, torch.cuda.Stream] = {}


class CaptureError(RuntimeError):
    """The work to be recorded does something that a CUDA graph cannot hold."""


def can_record(device: torch.device) -> bool:
    """Returns whether a device supports CUDA graphs."""
    return device.type == "cuda"


def wait(device: torch.device) -> None:
    """Waits for the work on the current stream; on a CPU there is none."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Recording:
    """Graphs that share one memory pool, and so must be replayed one after the other.

    Each thread warms up before it first records: handles of cuBLAS and cuDNN belong to a thread, and cannot be created
    while a graph is recorded.

    It waits only for streams; it waits for the whole device only while no other thread records, as that would break the
    other recording.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with _ONE_AT_A_TIME:
            if device not in _streams:
                _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream = _streams[device]
        self._pool = torch.cuda.graph_pool_handle()
        self._thread = threading.local()  # not the thread's id, which a later thread may reuse
        self._leaves_blocks = False

    @property
    def is_warm(self) -> bool:
        """Whether the calling thread has warmed up and may record."""
        return hasattr(self._thread, "is_warm")

    def warm_up(self, run: Callable[[], None]) -> None:
        """Runs the work once on the recording stream, so that kernels compile and libraries choose and allocate."""
        with _ONE_AT_A_TIME, self._on_stream():
            run()
            self._stream.synchronize()
            self._leaves_blocks = True
        self._thread.is_warm = True

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Records ``run`` without running it, and returns a function that replays it on the current stream.

        Raises:
            CaptureError: if ``run`` waits for the device, copies from the host, or does anything else that a graph
                cannot hold.
            RuntimeError: if the calling thread has not warmed up.
            torch.OutOfMemoryError: if there is not enough memory.
        """
        if not self.is_warm:
            raise RuntimeError("warm_up must be called in a thread before it records")
        for attempt in range(_ATTEMPTS):
            graph = torch.cuda.CUDAGraph()
            try:
                with _ONE_AT_A_TIME, _without_gc(), self._on_stream(), _own_workspace():
                    self._free_blocks()
                    _record(graph, self._pool, self.device, run)
            except Exception as error:
                self._pool, self._leaves_blocks = torch.cuda.graph_pool_handle(), True  # the old one is given up
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                if attempt + 1 < _ATTEMPTS:
                    continue  # it may have been another thread, waiting for the whole device
                raise CaptureError(f"it cannot be captured as a CUDA graph: {first_line(error)}") from error
            break
        return graph.replay

    def _free_blocks(self) -> None:
        """Gives back to CUDA what the allocator has cached since the last recording, once for several recordings.

        The allocator does not use these blocks for a graph's own pool, and frees none during a recording, so a graph
        would otherwise need its memory twice. This waits for the device.
        """
        if self._leaves_blocks:
            with suppress(RuntimeError):  # PyTorch refuses while another library records; more memory is then used
                torch.cuda.empty_cache()
                self._leaves_blocks = False

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(self._stream):
                    yield
            except BaseException:
                with suppress(Exception):  # the first error is the one to report
                    torch.cuda.current_stream().wait_stream(self._stream)
                raise
            torch.cuda.current_stream().wait_stream(self._stream)


def _record(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device, run: Callable[[], None]) -> None:
    ended = False
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            run()
        except BaseException:
            with suppress(Exception):  # the first error is the one to report; an empty graph warns
                graph.capture_end()
                ended = True
            raise
        graph.capture_end()
        ended = True
    finally:
        if not ended:
            _clean_up(pool, device)


def _clean_up(pool: Any, device: torch.device) -> None:
    """Cleans up what PyTorch leaves behind when a capture could not be ended.

    The allocator believes that the capture goes on and keeps its pool, and the random number generator refuses to draw
    until a capture has ended properly. An error here must not hide the original one; warnings may be raised as errors.
    """
    with suppress(Exception):  # if the pool was no longer in use
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    with suppress(Exception):
        element = torch.zeros(1, dtype=torch.float32, device=device)
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        element.zero_()
        graph.capture_end()


@contextmanager
def _own_workspace() -> Iterator[None]:
    """Makes cuBLAS allocate a workspace from the graph's own pool: graphs that run concurrently must not share one."""
    clear: Callable[[], None] = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    clear()
    try:
        yield
    finally:
        clear()


@contextmanager
def _without_gc() -> Iterator[None]:
    """Keeps Python from freeing unrelated device memory during a recording, which would break the recording."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
