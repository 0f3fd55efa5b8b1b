"""What a call of a sampler does after each row: keep states, call back, move the progress bar."""

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
        states: ``[K // every + 1, B, *shape]``, where every ``every``-th state goes, or None.
        callback: the user's own, called with the same arguments. A tensor that it returns replaces the state.
    """

    bar: tqdm[Any]
    states: Tensor | None = None
    every: int = 1
    callback: RowHook | None = None

    @property
    def is_busy(self) -> bool:
        """Whether it has anything to do after a row."""
        return self.callback is not None or self.states is not None or not self.bar.disable

    def start(self, x: Tensor) -> None:
        """Keeps the initial state."""
        if self.states is not None:
            self.states[0] = x

    def __call__(self, row: int, time: float, x: Tensor) -> Tensor | None:
        """Calls the callback, then keeps the state that it leaves, and returns it where there is a callback."""
        replaced = None if self.callback is None else self.callback(row, time, x)
        if replaced is not None:
            name = f"the result of callback in row {row}"
            check_tensor(name, replaced, shape=x.shape, device=x.device, floating=True, finite=True)
            x = replaced.to(x.dtype, copy=True)  # the caller may go on writing to its own
        self.advance(row + 1, 1, x)
        return None if self.callback is None else x

    def advance(self, rows: int, count: int, x: Tensor) -> None:
        """Keeps the state after ``rows`` rows, of which ``count`` are new, for an engine that has no callback."""
        if self.states is not None and rows % self.every == 0:
            self.states[rows // self.every] = x
        self.bar.update(count)
