"""Results that come from a device while it works on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["fetch"]


def fetch(value: Tensor) -> Callable[[], Tensor]:
    """Starts a copy to the host, and returns what waits for it and gives it.

    It waits for what has been launched before the copy, and not, as ``Tensor.item`` does, for all that has been since.
    """
    if value.device.type != "cuda":
        return lambda: value
    host = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
    with torch.cuda.device(value.device):
        host.copy_(value, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait
