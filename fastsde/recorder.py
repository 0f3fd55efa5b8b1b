"""What a sampler does after each row: keep states, run the callback, and update the progress bar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from .reference import RowHook
from .validation import check_tensor

__all__ = ["Recorder"]


@dataclass
class Recorder:
    """The ``after_row`` of an engine, called as ``recorder(row, time, x)``.

    Args:
        bar: the progress bar, which counts rows.
        states: the buffer ``[K // every + 1, B, *shape]`` for every ``every``-th state, or None.
        callback: the user's callback, called with the same arguments. A tensor that it returns replaces the state.
        calls: the buffer int64 ``[B]`` for how often an adaptive solver calls the network for each sample, or None.
    """

    bar: tqdm[Any]
    states: Tensor | None = None
    every: int = 1
    callback: RowHook | None = None
    calls: Tensor | None = None

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to do after a row."""
        return self.callback is not None or self.states is not None or not self.bar.disable

    def start(self, x: Tensor) -> None:
        """Stores the initial state."""
        if self.states is not None:
            self.states[0] = x

    def __call__(self, row: int, time: float, x: Tensor) -> Tensor | None:
        """Calls the callback, stores the resulting state, and returns it if there is a callback."""
        replaced = None if self.callback is None else self.callback(row, time, x)
        if replaced is not None:
            name = f"the result of callback in row {row}"
            check_tensor(name, replaced, shape=x.shape, device=x.device, floating=True, finite=True)
            x = replaced.to(x.dtype, copy=True)  # the caller may keep writing to its own tensor
        self.advance(row + 1, 1, x)
        return None if self.callback is None else x

    def count(self, calls: Tensor) -> None:
        """Stores how often the network was called for each sample, and advances the bar by one batch."""
        if self.calls is not None:
            self.calls.copy_(calls)
        self.bar.update(1)

    def advance(self, rows: int, count: int, x: Tensor) -> None:
        """Stores the state after ``rows`` rows, ``count`` of them new, for an engine without callbacks."""
        if self.states is not None and rows % self.every == 0:
            self.states[rows // self.every] = x
        self.bar.update(count)
