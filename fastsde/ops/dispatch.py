"""Where kernels run, and what they are given."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

__all__ = ["contiguous", "has_kernels", "needs_grad"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device: a GPU of capability 8.0 up, or the CPU under TRITON_INTERPRET."""
    if not _HAS_TRITON:
        return False
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient is wanted of any."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """The same in contiguous memory, as the kernels take them."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
