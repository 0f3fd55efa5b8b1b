"""Single kernels: what they have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsde import VPSDE, noise, ops

from ..suite.case import UnavailableError
from ..suite.plan import Plan
from .trajectory import SEED

SDE = VPSDE()
CACHE_BYTES = 256 << 20  # more than any L2, or a core's share of L3: rotated inputs together are larger
SPECIALS = 2  # of a normal: of two, a logarithm, a root, a sine and a cosine


def copies(elements: int, bytes_an_element: int, plan: Plan) -> int:
    """How many sets of inputs to rotate: as many as no cache holds, unless one set is small enough to stay in it."""
    if elements * bytes_an_element < 1 << 20 or plan.quick:  # what the step before has left in the cache
        return 2
    return max(2, math.ceil(CACHE_BYTES / (elements * bytes_an_element)))


def keys_of(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return noise.sample_keys(SEED, shape[0], device=device)


def need_kernels(device: torch.device) -> None:
    """Raises UnavailableError where fastsde has no kernels."""
    if not ops.has_kernels(device):
        raise UnavailableError(f"there are no kernels for {device} here: {ops.native_state()}")


def kernels_name(plan: Plan) -> str:
    return "fastsde Triton" if plan.has_gpu else "fastsde native"
