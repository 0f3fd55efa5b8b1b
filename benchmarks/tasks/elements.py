"""Single kernels: what they have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsde import VPSDE, noise, ops

from ..suite.case import UnavailableError, check
from ..suite.measure import Figures
from ..suite.plan import Plan
from .trajectory import SEED

SDE = VPSDE()
CACHE_BYTES = 256 << 20  # more than any L2, or a core's share of L3: rotated inputs together are larger
_SMALL_BYTES = 1 << 20  # of what the step before has left in the cache in real use, too
_SMALL_ELEMENTS = 1 << 21
_KEPT_BYTES = 64 << 20  # of an output that is written again and again, and may never leave the cache
SPECIALS = 2  # of a normal: of two, a logarithm, a root, a sine and a cosine


def copies(input_bytes: int, plan: Plan) -> int:
    """How many sets of inputs to rotate."""
    if input_bytes < _SMALL_BYTES or plan.quick:
        return 2
    return max(2, math.ceil(CACHE_BYTES / input_bytes))


def calls(elements: int, plan: Plan) -> int:
    """How many a round has: on a GPU so many of a small kernel that the start of a graph is little beside them."""
    return 100 if plan.has_gpu and elements <= _SMALL_ELEMENTS else 20


def traffic(input_bytes: int, output_bytes: int, plan: Plan) -> int:
    """The bytes of a task that no cache holds."""
    read = input_bytes if copies(input_bytes, plan) * input_bytes >= CACHE_BYTES else 0
    return read + (output_bytes if output_bytes > _KEPT_BYTES else 0)


def check_normals(name: str, z: Tensor) -> Figures:
    """The first four moments and the correlation of one half with the other, in standard errors of so many normals."""
    z = z.detach().double().flatten()
    half = len(z) // 2
    expected = ((z, 0, 1), (z**2, 1, 2), (z**3, 0, 15), (z**4, 3, 96), (z[:half] * z[half : 2 * half], 0, 1))
    errors = [abs(float(each.mean()) - mean) * math.sqrt(len(each) / variance) for each, mean, variance in expected]
    return check(f"{name}, as normals", max(errors), 6.0)


def keys_of(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return noise.sample_keys(SEED, shape[0], device=device)


def need_kernels(device: torch.device) -> None:
    """Raises UnavailableError where fastsde has no kernels."""
    if not ops.has_kernels(device):
        raise UnavailableError(f"there are no kernels for {device} here: {ops.native_state()}")


def kernels_name(plan: Plan) -> str:
    return "fastsde Triton" if plan.has_gpu else "fastsde native"
