"""Where CUDA itself is called: work recorded once as a CUDA graph, and replayed.

What is recorded reads and writes the same device memory at every replay; nothing of the host's part runs again.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

__all__ = ["CaptureError", "Recording", "can_record", "wait"]

# PyTorch records one graph at a time; another thread's kernels go on meanwhile (capture_error_mode "thread_local").
# Entered again by a network that itself samples while it warms up.
_ONE_AT_A_TIME = threading.RLock()
_ATTEMPTS = 2
# One stream a device to record on, since cuBLAS keeps a workspace of each stream that it has ever seen.
_streams: dict[torch.device, torch.cuda.Stream] = {}


class CaptureError(RuntimeError):
    """What was to be recorded does what a CUDA graph cannot hold."""


def can_record(device: torch.device) -> bool:
    """Returns whether a device has CUDA graphs."""
    return device.type == "cuda"


def wait(device: torch.device) -> None:
    """Waits for what is under way on the current stream, which on a CPU is nothing."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Recording:
    """Graphs that share one pool of memory, and so must be replayed one after the other.

    Each thread warms up before it first records: handles of cuBLAS and cuDNN belong to a thread, and cannot be made
    while a graph is recorded.

    It waits for streams, and for a whole device only while no other thread records here, which that would break.

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
        self._thread = threading.local()  # not its number, which a later thread may be given
        self._leaves_blocks = False

    @property
    def is_warm(self) -> bool:
        """Whether the calling thread has warmed up, so that it may record."""
        return hasattr(self._thread, "is_warm")

    def warm_up(self, run: Callable[[], None]) -> None:
        """Runs what is to be recorded, on the stream that records: kernels compile, libraries choose and allocate."""
        with _ONE_AT_A_TIME, self._on_stream():
            run()
            self._stream.synchronize()
            self._leaves_blocks = True
        self._thread.is_warm = True

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Records ``run``, without running it, and returns what replays it on the current stream.

        Raises:
            CaptureError: where ``run`` waits for the device, copies from the host, or does anything else that a graph
                cannot hold.
            RuntimeError: where the calling thread has not warmed up.
            torch.OutOfMemoryError: where the memory does not suffice.
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
                self._pool, self._leaves_blocks = torch.cuda.graph_pool_handle(), True  # the other one is given up
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                if attempt + 1 < _ATTEMPTS:
                    continue  # it may have been another thread, waiting for the whole device
                raise CaptureError(f"it cannot be captured as a CUDA graph: {error}") from error
            break
        return graph.replay

    def _free_blocks(self) -> None:
        """Gives back to CUDA what the allocator has cached since the last recording, once for several recordings.

        It keeps these blocks from a graph's own pool, and frees none while it records, so that otherwise a graph would
        need its memory twice. This waits for the device.
        """
        if self._leaves_blocks:
            with suppress(RuntimeError):  # PyTorch refuses while another library records; it then takes more memory
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
                with suppress(Exception):  # what went wrong first is what counts
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
            with suppress(Exception):  # what went wrong first is what counts; an empty graph warns
                graph.capture_end()
                ended = True
            raise
        graph.capture_end()
        ended = True
    finally:
        if not ended:
            _clean_up(pool, device)


def _clean_up(pool: Any, device: torch.device) -> None:
    """Undoes what PyTorch leaves undone where a capture could not be ended.

    The allocator believes that it goes on and keeps its pool, and the generator of random numbers refuses to draw
    until a capture has been ended as it should. An error here must not hide the one that led here; a warning may be
    an error.
    """
    with suppress(Exception):  # where the pool was not in use any more
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
    """Makes cuBLAS take a workspace of the graph's own pool: graphs that run at the same time must not share one."""
    clear: Callable[[], None] = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    clear()
    try:
        yield
    finally:
        clear()


@contextmanager
def _without_gc() -> Iterator[None]:
    """Keeps Python from freeing unrelated device memory while a graph is recorded, which would break it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
