"""Counts on the CPU what would be launched on a GPU.

A launch is an operation of PyTorch that reads or writes elements, or a Triton kernel. Views and new memory do not
count. An operation of PyTorch may be several CUDA kernels (a convolution and its backward, a reduction, an operation on
a long list of tensors), and a copy is not always a kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

__all__ = ["Launches", "interpret", "paused", "storage", "watching"]

_EMPTY = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_"}
_watching: list[Launches] = []


class Launches(TorchDispatchMode):
    """Counts the launches inside ``with watching(Launches()) as launches``.

    Args:
        host: tensors that would be on the host if there were a GPU, such as a table of a solver. Operations on only
            these are not launches.

    Attributes:
        names: of the launches, in order. A replay of a graph of tests/cuda_graphs.py is one launch, named "replay".
    """

    def __init__(self, host: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.names: list[str] = []
        self._host = {storage(each): each for each in host}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastsde":  # counts the launches inside the operation
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        result = self.call(func, args, kwargs)
        namespace, name = func._schema.name.split("::")
        inputs = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        is_view = bool(outputs) and all(storage(output) in inputs for output in outputs)
        if inputs and inputs <= self._host.keys():
            self._host |= {storage(output): output for output in outputs}
        elif namespace == "aten" and name not in _EMPTY and (func._schema.is_mutable or not is_view):
            self.names.append(name)
        return result

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs an operation."""
        with paused():
            return func(*args, **kwargs)

    def launch(self, name: str, run: Callable[[], Any], args: Any) -> None:
        """Counts and runs a launch of a kernel."""
        self.names.append(name)
        with paused():
            run()


@contextmanager
def watching(launches: Any) -> Iterator[Any]:
    """Makes ``launches`` see the operations and kernels inside."""
    _watching.append(launches)
    try:
        with launches:
            yield launches
    finally:
        _watching.remove(launches)


@contextmanager
def paused() -> Iterator[None]:
    """Hides the operations and kernels inside from all watchers."""
    held, _watching[:] = list(_watching), []
    try:
        with _disable_current_modes():
            yield
    finally:
        _watching[:] = held


def launch(name: str, run: Callable[[], Any], args: Any = ()) -> None:
    """Runs something that counts as one launch."""
    if _watching:
        _watching[-1].launch(name, run, args)
    else:
        run()


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs kernels in Triton's interpreter, visible to watchers."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    on_grid, one_at_a_time = interpreter.GridExecutor.__call__, threading.Lock()

    def quiet(self: Any, *args: Any, **kwargs: Any) -> None:
        # The interpreter computes with NumPy, which warns about infinities, and it is not thread-safe.
        with one_at_a_time, np.errstate(all="ignore"):
            on_grid(self, *args, **kwargs)

    def seen(self: Any, *args: Any, **kwargs: Any) -> None:
        launch(self.fn.__name__, lambda: quiet(self, *args, **kwargs), (args, kwargs))

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", seen)
