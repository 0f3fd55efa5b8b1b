"""What the benchmarks of single kernels have in common."""

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
CACHE_BYTES = 256 << 20  # more than any L2 or a core's share of L3; rotated inputs are at least as large together
_SMALL_BYTES = 1 << 20  # inputs below this size are in the cache in real use, too, left there by the step before
_SMALL_ELEMENTS = 1 << 21
_KEPT_BYTES = 64 << 20  # an output up to this size is overwritten in each call, and may never leave the cache
SPECIALS = 2  # per normal: a pair takes a logarithm, a root, a sine and a cosine


def copies(input_bytes: int, plan: Plan) -> int:
    """Returns how many sets of inputs to rotate."""
    if input_bytes < _SMALL_BYTES or plan.quick:
        return 2
    return max(2, math.ceil(CACHE_BYTES / input_bytes))


def calls(elements: int, plan: Plan) -> int:
    """Returns the number of calls per round: for a small kernel on a GPU so many that starting a graph costs little."""
    return 100 if plan.has_gpu and elements <= _SMALL_ELEMENTS else 20


def traffic(input_bytes: int, output_bytes: int, plan: Plan) -> int:
    """Returns the bytes of a task's inputs and outputs that no cache holds."""
    read = input_bytes if copies(input_bytes, plan) * input_bytes >= CACHE_BYTES else 0
    return read + (output_bytes if output_bytes > _KEPT_BYTES else 0)


def check_normals(name: str, z: Tensor) -> Figures:
    """Checks the first four moments, and the correlation of one half with the other, in standard errors."""
    z = z.detach().double().flatten()
    half = len(z) // 2
    expected = ((z, 0, 1), (z**2, 1, 2), (z**3, 0, 15), (z**4, 3, 96), (z[:half] * z[half : 2 * half], 0, 1))
    errors = [abs(float(each.mean()) - mean) * math.sqrt(len(each) / variance) for each, mean, variance in expected]
    return check(f"the normal distribution of {name}", max(errors), 6.0)


def keys_of(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return noise.sample_keys(SEED, shape[0], device=device)


def need_kernels(device: torch.device) -> None:
    """Raises UnavailableError if fastsde has no kernels for the device."""
    if not ops.has_kernels(device):
        raise UnavailableError(f"there are no kernels for {device} here: {ops.native_state()}")


def kernels_name(plan: Plan) -> str:
    return "fastsde Triton" if plan.has_gpu else "fastsde native"
