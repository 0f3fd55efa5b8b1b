"""CUDA graphs for tests: CUDA's own on a GPU, and a tape of PyTorch's operations on the CPU.

The tape replaces the calls of CUDA in `fastsde.engines.capture`. As with CUDA, recording changes no memory, a replay
reads and writes the recorded memory and runs no host code, a thread must warm up before it records, and waiting for the
device while recording is an error. Kernels are launched in Triton's interpreter.

The tape cannot test the following; only the tests marked ``gpu`` can:

- streams: everything runs immediately and in order, so that races, missing waits and use by two threads do not show;
- memory: the pool of a graph, its size, when it runs out, and whether it is freed. A tape keeps all its tensors, so
  that memory which a replay reads after it was freed, or which two graphs share, is never overwritten;
- handles and workspaces of cuBLAS and cuDNN, per thread or stream, and what a library allocates or chooses at first;
- where a tensor is: host and device tensors in one operation, and copies between them that name the device by a
  `torch.device`. A list or the word "cpu" is detected; setting a mask to one element on the device is not;
- waiting that is not an operation of PyTorch (events, ``synchronize``, another library), kernels that wait only for
  some sizes (``mode``), and waiting inside an operation that tests/waiting.py does not know. A few calls that do not
  wait on a GPU are refused, too (``one_hot`` with a known number of classes, ``equal`` of a tensor and itself);
- kernels other than the CPU's: dtypes, layouts and shapes that CUDA lacks, TF32, results that vary;
- random numbers of PyTorch's generator, whose state CUDA advances in each replay by its own rule.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from launches import Launches, interpret, launch, paused, storage, watching
from torch import Tensor
from torch.utils._pytree import tree_leaves
from waiting import HostReads, refuse_waiting

from fastsde.benchmarks.suite.measure import fp32_products
from fastsde.engines import capture


class Tape(Launches):
    """The operations and launches of one recording."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Callable[[], None]] = []
        self._made: dict[int, Tensor] = {}  # by storage: memory of the graph itself
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # memory from outside, and what it held

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        schema = func._schema
        names = [argument.name for argument in schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        refuse_waiting(func, given)
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(given.get(argument.name))
        result = super().call(func, args, kwargs)
        inputs = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        # Detached, to hold the memory and not the tensors: autograd takes over a gradient only if nobody else holds it.
        outputs = [leaf.detach() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        fresh = [storage(output) not in inputs for output in outputs]
        self._made |= {storage(output): output for output, new in zip(outputs, fresh, strict=True) if new}
        if any(fresh) or schema.is_mutable:
            self._calls.append(lambda: _run(func, args, kwargs, outputs, fresh))
        return result

    def launch(self, name: str, run: Callable[[], Any], args: Any) -> None:
        """Records a launch of a kernel, which may write to any of its arguments."""
        self._keep(args)
        super().launch(name, run, args)
        self._calls.append(run)

    def _keep(self, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and storage(value) not in self._made:
                with paused():
                    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
                    self._before.setdefault(storage(value), (whole, whole.clone()))

    def finish(self) -> None:
        """Restores memory from outside the graph, and fills the graph's own memory with NaN."""
        with torch.no_grad():
            for whole, held in self._before.values():
                whole.copy_(held)
            for value in self._made.values():
                if value.is_floating_point():
                    value.detach().fill_(torch.nan)

    def replay(self) -> None:
        """Runs all calls again, as one launch."""
        launch("replay", self._run_again)

    def _run_again(self) -> None:
        with torch.no_grad():
            for call in self._calls:
                call()


def _run(func: Any, args: Any, kwargs: Any, outputs: list[Tensor], fresh: list[bool]) -> None:
    again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
    for output, value, new in zip(outputs, again, fresh, strict=True):
        if new:
            output.detach().copy_(value)  # detach: it may have been made in inference mode


class TapeRecording(capture.Recording):
    """A recording on the CPU."""

    made: ClassVar[list[TapeRecording]] = []
    recorded: ClassVar[list[list[str]]] = []  # the launches of each graph

    def __init__(self, device: torch.device) -> None:
        self._thread = threading.local()
        type(self).made.append(self)

    def warm_up(self, run: Callable[[], None]) -> None:
        run()
        self._thread.is_warm = True

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        assert self.is_warm, "warm_up must be called in a thread before it records"
        tape = Tape()
        try:
            with watching(tape), HostReads():
                run()
        except RuntimeError as error:
            raise capture.CaptureError(f"it cannot be captured as a CUDA graph: {error}") from error
        finally:
            tape.finish()
        type(self).recorded.append(tape.names)
        return tape.replay


class CudaRecording(capture.Recording):
    """A recording of CUDA's own graphs that counts them."""

    made: ClassVar[list[Any]] = []
    recorded: ClassVar[list[list[str]]] = []

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        type(self).made.append(None)  # not self, which would keep its memory alive

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        replay = super().record(run)
        type(self).recorded.append([])
        return replay


def _never_capturable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Makes an optimizer for the tape: PyTorch refuses capturable=True for weights on the CPU."""
    adam = getattr(torch.optim, name)
    monkeypatch.setattr(torch.optim, name, lambda *args, capturable=False, **options: adam(*args, **options))


@pytest.fixture(params=["tape", pytest.param("cuda", marks=pytest.mark.gpu)])
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Counted graphs, of CUDA or of the tape, with their device as the default device."""
    kind: Any = CudaRecording if request.param == "cuda" else TapeRecording
    monkeypatch.setattr(kind, "made", [])
    monkeypatch.setattr(kind, "recorded", [])
    monkeypatch.setattr("fastsde.engines.capture.Recording", kind)
    if request.param == "cuda":
        with fp32_products(torch.backends.cudnn, "ieee"), torch.device("cuda"):
            yield kind
        return
    if torch.cuda.is_available():
        pytest.skip("the graphs are CUDA's own where there is a GPU")
    interpret(monkeypatch)
    monkeypatch.setattr("fastsde.engines.capture.can_record", lambda device: True)
    for name in ("Adam", "AdamW"):
        _never_capturable(monkeypatch, name)
    yield kind
