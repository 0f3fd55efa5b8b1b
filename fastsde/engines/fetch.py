"""Results that are copied from a device while it goes on working."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Fetch"]


class Fetch:
    """A copy to the host that has been started.

    Waiting for it waits only for work launched before it, not, as ``Tensor.item`` does, for work launched since.

    Args:
        value: a tensor, which may be overwritten at once.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._copied: Any = None  # the event, whose methods PyTorch does not type
        if value.device.type == "cuda":
            self._value = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
            with torch.cuda.device(value.device):
                self._value.copy_(value, non_blocking=True)
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._copied.record()

    def is_ready(self) -> bool:
        """Returns whether `wait` returns at once."""
        return self._copied is None or bool(self._copied.query())

    def wait(self) -> Tensor:
        """Waits for the copy and returns it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value
