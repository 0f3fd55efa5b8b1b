"""CUDA graphs for tests: CUDA's own where there is a GPU, and on the CPU a tape of PyTorch's operations.

The tape stands for what `fastsde.engines.capture` calls CUDA for. As with CUDA, recording changes no memory, a replay
reads and writes the memory that was recorded and runs nothing of the host's part, and waiting for the device while
recording is an error. Kernels are launches of Triton's interpreter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fastsde.benchmarks.suite.measure import fp32_products
from fastsde.engines import capture

_WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default}
_current: list[Tape] = []


class Tape(TorchDispatchMode):
    """The operations and launches of one recording."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Callable[[], None]] = []
        self._made: dict[int, Tensor] = {}  # by storage: memory of the graph itself
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # memory from outside, and what it held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        schema = func._schema
        for argument, value in zip(schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(value)
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in kwargs:
                self._keep(kwargs[argument.name])
        with _paused():
            result = func(*args, **kwargs)
        inputs = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        fresh = [_storage(output) not in inputs for output in outputs]
        self._made |= {_storage(output): output for output, new in zip(outputs, fresh, strict=True) if new}
        if any(fresh) or schema.is_mutable:
            self._calls.append(lambda: _run(func, args, kwargs, outputs, fresh))
        return result

    def launch(self, run: Callable[[], Any], args: Any) -> None:
        """A launch of a kernel, which may write to any of its arguments."""
        self._keep(args)
        with _paused():
            run()
        self._calls.append(run)

    def _keep(self, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and _storage(value) not in self._made:
                with _paused():
                    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
                    self._before.setdefault(_storage(value), (whole, whole.clone()))

    def finish(self) -> None:
        """Gives memory from outside what it held, and that of the graph NaN."""
        with torch.no_grad():
            for whole, held in self._before.values():
                whole.copy_(held)
            for value in self._made.values():
                if value.is_floating_point():
                    value.detach().fill_(torch.nan)

    def replay(self) -> None:
        with torch.no_grad():
            for call in self._calls:
                call()


def _run(func: Any, args: Any, kwargs: Any, outputs: list[Tensor], fresh: list[bool]) -> None:
    again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
    for output, value, new in zip(outputs, again, fresh, strict=True):
        if new:
            output.detach().copy_(value)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _paused() -> Iterator[None]:
    """What happens inside is not recorded."""
    tapes, _current[:] = list(_current), []
    try:
        with _disable_current_modes():
            yield
    finally:
        _current[:] = tapes


class TapeRecording:
    """`fastsde.engines.capture.Recording` on the CPU."""

    made: ClassVar[list[TapeRecording]] = []
    recorded: ClassVar[list[int]] = []

    def __init__(self, device: torch.device) -> None:
        type(self).made.append(self)

    def warm_up(self, run: Callable[[], None]) -> None:
        run()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        tape = Tape()
        _current.append(tape)
        try:
            with tape:
                run()
        except RuntimeError as error:
            raise capture.CaptureError(f"it cannot be captured as a CUDA graph: {error}") from error
        finally:
            _current.remove(tape)
            tape.finish()
        type(self).recorded.append(len(tape._calls))
        return tape.replay


class CudaRecording(capture.Recording):
    """CUDA's own graphs, counted."""

    made: ClassVar[list[Any]] = []
    recorded: ClassVar[list[int]] = []

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        type(self).made.append(None)  # not itself, which would keep its memory

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        replay = super().record(run)
        type(self).recorded.append(0)
        return replay


@pytest.fixture(params=["tape", pytest.param("cuda", marks=pytest.mark.gpu)])
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Graphs that are counted, of CUDA or of the tape, and their device as the default one."""
    kind: Any = CudaRecording if request.param == "cuda" else TapeRecording
    monkeypatch.setattr(kind, "made", [])
    monkeypatch.setattr(kind, "recorded", [])
    monkeypatch.setattr("fastsde.engines.capture.Recording", kind)
    if request.param == "cuda":
        with fp32_products(torch.backends.cudnn.conv, "ieee"), torch.device("cuda"):
            yield kind
        return
    if torch.cuda.is_available():
        pytest.skip("the graphs are CUDA's own where there is a GPU")
    _interpret(monkeypatch)
    monkeypatch.setattr("fastsde.engines.capture.can_record", lambda device: True)
    yield kind


def _interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs kernels by Triton's interpreter, and lets the tape see them."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launch, one_at_a_time = interpreter.GridExecutor.__call__, threading.Lock()

    def quiet_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        # NumPy computes there: it warns of infinities, and knows one thread.
        with one_at_a_time, np.errstate(all="ignore"):
            launch(self, *args, **kwargs)

    def recorded_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        if _current:
            _current[-1].launch(lambda: quiet_launch(self, *args, **kwargs), (args, kwargs))
        else:
            quiet_launch(self, *args, **kwargs)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", recorded_launch)
