"""Which calls of CUDA record a graph, and in which order: with stand-ins that log them, and on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import fastsde
from fastsde.engines import CaptureError, capture
from fastsde.models import UNet

EMPTY = "The CUDA Graph is empty. This usually means that the graph was attempted to be captured on wrong device."


class Cuda:
    """The calls of CUDA in order, and what some of them raise."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.raises: dict[str, list[Exception]] = {}

    def __call__(self, name: str) -> None:
        self.calls.append(name)
        if self.raises.get(name):
            raise self.raises[name].pop(0)

    def count(self, name: str) -> int:
        return self.calls.count(name)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    calls = Cuda()

    class Graph:
        def capture_begin(self, **options: Any) -> None:
            calls("begin")

        def capture_end(self) -> None:
            calls("end")

        def replay(self) -> None:
            calls("replay")

    class Stream:
        def __init__(self, *args: Any) -> None: ...

        def synchronize(self) -> None:
            calls("synchronize")

        def wait_stream(self, stream: Any) -> None: ...

    monkeypatch.setattr(capture, "_streams", {})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: calls("pool") or object())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls("empty_cache"))
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *args, name=name: calls(name), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: calls("workspaces"), raising=False)
    return calls


@pytest.fixture
def recording(cuda: Cuda) -> capture.Recording:
    made = capture.Recording(torch.device("cpu"))
    cuda.calls.clear()
    return made


def in_a_thread(run: Callable[[], Any]) -> list[BaseException]:
    """Runs a function in a new thread, and returns what it raised."""
    errors: list[BaseException] = []

    def catch() -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=catch)
    thread.start()
    thread.join()
    return errors


def test_cached_blocks_are_freed_once_before_the_graphs_of_a_run(cuda: Cuda, recording: capture.Recording) -> None:
    recording.warm_up(lambda: cuda("run"))
    replays = [recording.record(lambda i=i: cuda(f"rows {i}")) for i in range(2)]  # type: ignore[misc]
    first = ["workspaces", "empty_cache", "begin", "rows 0", "end", "workspaces"]
    assert cuda.calls == ["run", "synchronize", *first, "workspaces", "begin", "rows 1", "end", "workspaces"]
    recording.warm_up(lambda: None)
    recording.record(lambda: None)
    assert cuda.count("empty_cache") == 2
    recording.warm_up(lambda: None)
    cuda.raises["empty_cache"] = [RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")]
    for _ in range(2):  # refused, then done later
        recording.record(lambda: None)
    assert cuda.count("empty_cache") == 4
    replays[0]()
    assert cuda.calls[-1] == "replay"


def test_a_second_attempt_has_a_pool_of_its_own_and_the_memory_of_the_first(
    cuda: Cuda, recording: capture.Recording
) -> None:
    recording.warm_up(lambda: None)
    cuda.raises["rows"] = [RuntimeError("operation not permitted when stream is capturing")]
    recording.record(lambda: cuda("rows"))
    assert [cuda.count(name) for name in ("rows", "pool", "empty_cache")] == [2, 1, 2]
    cuda.raises["rows"] = [RuntimeError("it waits")] * 2
    with pytest.raises(CaptureError, match="it cannot be captured as a CUDA graph: it waits"):
        recording.record(lambda: cuda("rows"))


@pytest.mark.parametrize(
    ("message", "line"), [("it waits\nSearch for it in https://...\n", "it waits"), ("", "KeyError")]
)
def test_the_message_is_one_line_and_the_cause_has_the_rest(
    cuda: Cuda, recording: capture.Recording, message: str, line: str
) -> None:
    recording.warm_up(lambda: None)
    error = RuntimeError(message) if message else KeyError()
    cuda.raises["rows"] = [error] * 2
    with pytest.raises(CaptureError) as caught:
        recording.record(lambda: cuda("rows"))
    assert str(caught.value) == f"it cannot be captured as a CUDA graph: {line}"
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("cleaned_up", [False, True])
def test_what_went_wrong_first_is_what_is_raised(cuda: Cuda, recording: capture.Recording, cleaned_up: bool) -> None:
    recording.warm_up(lambda: None)
    cuda.raises["rows"] = [torch.OutOfMemoryError("CUDA out of memory")]
    cuda.raises["end"] = [UserWarning(EMPTY)] * (1 + cleaned_up)  # as where warnings are errors
    cuda.raises["_cuda_endAllocateToPool"] = [RuntimeError("not currently recording to mempool_id")]
    if cleaned_up:
        cuda.raises["begin"] = [RuntimeError("no capture can begin")]
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        recording.record(lambda: cuda("rows"))


def test_a_thread_that_has_not_warmed_up_does_not_record(cuda: Cuda, recording: capture.Recording) -> None:
    with pytest.raises(RuntimeError, match="warm_up must be called in a thread before it records"):
        recording.record(lambda: None)
    recording.warm_up(lambda: None)
    assert recording.is_warm
    errors = in_a_thread(lambda: recording.record(lambda: None))
    assert [str(error) for error in errors] == ["warm_up must be called in a thread before it records"]
    assert not in_a_thread(lambda: (recording.warm_up(lambda: None), recording.record(lambda: None)))
    failing = capture.Recording(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError):
        failing.warm_up(lambda: 1 // 0)
    assert not failing.is_warm
    assert cuda.count("begin") == 1


# On a GPU -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    torch.cuda.empty_cache()
    device = torch.device("cuda", torch.cuda.current_device())
    yield device
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_a_graph_does_not_need_its_memory_twice(gpu: torch.device) -> None:
    size = 2**28

    def run() -> None:
        torch.zeros(size, dtype=torch.uint8, device=gpu).add_(1)

    recording = capture.Recording(gpu)
    limit = torch.cuda.memory_reserved() + size + size // 2
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(gpu).total_memory)
    recording.warm_up(run)
    replay = recording.record(run)
    replay()
    torch.cuda.current_stream().synchronize()
    assert torch.cuda.memory_reserved() <= limit


@pytest.mark.gpu
@pytest.mark.filterwarnings("error")
def test_memory_that_runs_out_at_once_is_no_warning(gpu: torch.device) -> None:
    recording = capture.Recording(gpu)
    recording.warm_up(lambda: None)
    with pytest.raises(torch.OutOfMemoryError):
        recording.record(lambda: torch.zeros(2**45, dtype=torch.uint8, device=gpu))
    assert torch.randn(3, device=gpu).isfinite().all()
    x = torch.zeros(3, device=gpu)
    recording.record(lambda: x.add_(1))()
    assert x.tolist() == [1, 1, 1]


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_new_length_can_be_recorded_by_another_thread() -> None:
    model = UNet(channels=(8, 8)).cuda()
    options: dict[str, Any] = {"steps": 12, "solver": "ddim"}
    sampler = fastsde.Sampler(model, (1, 28, 28), backend="graph", **options)
    sampler(3)
    found: list[Any] = []
    assert not in_a_thread(lambda: found.append(sampler(3, trajectory=5)[0].cpu()))
    torch.testing.assert_close(found[0], sampler(3).cpu(), rtol=1e-5, atol=1e-4)
