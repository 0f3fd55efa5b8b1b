"""Whole trajectories of a small network in one call, or in several if they take long."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .library import call, call_products
from .program import Packed, unknown_instruction

__all__ = ["Packed", "mlp_sampler", "piece", "unknown_instruction"]

_BLOCK, _LEAST = 64, 16  # the most and the fewest samples that a thread takes at once
_PIECES = 100  # a run that needs more pieces is also cut by samples, so that the state goes through memory less often


def piece(rows: int, batch: int, products: int, threads: int) -> tuple[int, int]:
    """Returns how many rows of how many samples a call takes.

    Args:
        products: multiply-adds per sample and row.
    """
    most = call_products() / products  # rows times samples that a thread may take
    each = math.ceil(batch / threads / _LEAST) * _LEAST
    rows_each = int(most / each)
    if rows_each * _PIECES >= rows:
        return math.ceil(rows / math.ceil(rows / min(rows_each, rows))), batch
    rows_each = max(1, min(math.ceil(rows / _PIECES), int(most / _BLOCK)))
    return rows_each, max(1, int(most / rows_each / _BLOCK)) * _BLOCK * threads


def mlp_sampler(
    packed: Packed,
    table: Tensor,
    keys: Tensor,
    *,
    vectors: Any,
    terms: Any,
    x_init: Tensor | None = None,
    clip: float | None = None,
    every: int = 1,
    states: Tensor | None = None,
    progress: Callable[[int], object] | None = None,
    precision: str = "fp32",
    out: Tensor,
) -> None:
    """Writes the samples to ``out`` fp32 ``[B, d]``, and every ``every``-th state to ``states`` if given.

    Args:
        table: fp32 ``[K, 2 + 5 m + m^2]``, as for `solver_step`.
        keys: int64 ``[B, 2]``.
        vectors: the program's numbers (`fastsde.lowering.Vectors`), with K rows and B samples.
        terms: `StepTable.trajectory_terms`; only its number of slots is used, since the kernel reads the table.
        x_init: fp32 ``[B, d]`` instead of a draw from the prior.
        states: fp32 ``[K // every + 1, B, d]``, from the initial state on.
        progress: called from time to time with the number of rows done since the last time.
        precision: ignored; the CPU computes in fp32.
    """
    (batch, dim), rows = out.shape, len(table)
    if dim != packed.dim:
        raise ValueError(f"out must be [B, {packed.dim}], like the network's output, got {list(out.shape)}")
    network, tensors = packed.arguments(vectors)
    rows_each, samples_each = piece(rows, max(1, batch), packed.products, torch.get_num_threads())
    one_call = rows_each == rows or terms.slots == 1
    others = None if one_call else out.new_empty((terms.slots - 1, batch, dim))
    limit = math.inf if clip is None else clip
    for row in range(0, rows, rows_each):
        end_row = min(row + rows_each, rows)
        for first in range(0, batch, samples_each):
            samples = (first, min(first + samples_each, batch), batch)
            drawn = (keys, x_init, limit, *samples)
            numbers = vectors.given, vectors.rows[row:end_row], packed.program.row_width
            call(
                "mlp_sampler", *network, *numbers, table, terms.slots, row, end_row, *drawn, every, states, others, out
            )
        if progress is not None:
            progress(end_row - row)
    del tensors  # kept alive until here for the pointers
