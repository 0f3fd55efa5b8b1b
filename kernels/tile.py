"""How a batch ``[B, *shape]`` is cut into tiles: S samples by P blocks of four elements (a block is one Philox call).

Tiles are large, or small if there are too few large ones to occupy every multiprocessor of a GPU: a kernel has at most
two variants per sample size, whatever the batch. Both give the same results to the bit. Offsets are int64.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4
# (Blocks of four elements in a tile, warps). A thread has 16 elements, which share what is computed once per sample and
# keep loads in flight, or 4.
_LARGE, _SMALL = (512, WARPS), (32, 1)
PROCESSORS = 132  # of an H100 or H200; a constant, so that only the shape decides on the tiles
# Two large tiles for each multiprocessor. With fewer the time is that of one tile's chain of instructions, which small
# tiles cut by four. The interpreter runs one tile after another at the same cost each, so there large tiles are always
# better.
_MANY = 0 if triton.knobs.runtime.interpret else 2 * PROCESSORS
GRID_AXIS_1 = 65_535


class Tiling(NamedTuple):
    """The compile-time constants of a tile, including its warps, and the grid of tiles."""

    constants: dict[str, int | bool]
    grid: tuple[int, int]


def tiling(batch: int, size: int) -> Tiling:
    """Returns the tiling of ``batch`` samples of ``size`` elements."""
    large = _tiling(batch, size, *_LARGE)
    return large if math.prod(large.grid) >= _MANY else _tiling(batch, size, *_SMALL)


def whole_samples(batch: int, size: int) -> tuple[dict[str, int | bool], tuple[int]]:
    """Returns constants and grid for programs that each go through all elements of S samples, 4 P at a time.

    They do not depend on the batch, and so neither does the order in which a sum over a sample is taken.
    """
    constants, (rows, _) = _tiling(batch, min(size, 4 * _LARGE[0]), *_LARGE)
    return {**{k: v for k, v in constants.items() if k != "ROWS_FIRST"}, "ALIGNED": size % 4 == 0}, (rows,)


def _tiling(batch: int, size: int, most: int, warps: int) -> Tiling:
    blocks = max(triton.cdiv(size, 4), 1)  # samples without elements still have times
    width = min(triton.next_power_of_2(blocks), most)
    height = most // width
    rows, columns = triton.cdiv(batch, height), triton.cdiv(blocks, width)
    # Axis 1 of a grid is short. A batch in which both counts exceed it would not fit in any memory.
    rows_first = columns <= GRID_AXIS_1
    constants = {"S": height, "P": width, "ALIGNED": size % 4 == 0, "ROWS_FIRST": rows_first, "num_warps": warps}
    return Tiling(constants, (rows, columns) if rows_first else (columns, rows))


def fast_math(x: Tensor) -> bool:
    """Returns whether a kernel on ``x`` may use the special functions of NVIDIA GPUs."""
    return x.is_cuda and torch.version.hip is None and not triton.knobs.runtime.interpret


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of ``x`` current, so that kernels are launched there."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@triton.jit
def tile(batch, size, S: tl.constexpr, P: tl.constexpr, ALIGNED: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """Returns this program's part of a batch.

    Returns:
        The samples ``[S]`` and which of them exist, the first block of the columns, the elements ``[4 P]`` of a sample,
        their offsets ``[S, 4 P]`` in the batch and which of them exist. All int64 or bool.
    """
    sample = tl.program_id(0 if ROWS_FIRST else 1).to(tl.int64) * S + tl.arange(0, S)
    start = tl.program_id(1 if ROWS_FIRST else 0).to(tl.int64) * P
    element = start * 4 + tl.arange(0, 4 * P)
    size = aligned_size(size, ALIGNED)
    exists = sample < batch
    offset = sample[:, None] * size + element[None, :]
    return sample, exists, start, element, offset, exists[:, None] & (element < size)[None, :]


@triton.jit
def aligned_size(size, ALIGNED: tl.constexpr):
    """Returns ``size`` in a form that shows the compiler that rows are aligned to 16 bytes, if they are."""
    return size // 4 * 4 if ALIGNED else size


@triton.jit
def program_slot():
    """Returns the number of this program in the grid, int64."""
    return tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
