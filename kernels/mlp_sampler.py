"""A whole trajectory of a small score network in one launch.

Each program of the grid takes M samples from the prior to the end: all slots of the state stay in registers, and the
weights stay on the chip if they fit. The network is unrolled at compile time (`mlp_network`, `program_blocks`); what it
computes from the time alone is given as numbers for each row of the table, and what it computes from a sample's
conditions as numbers for each sample. A row is

    x = n.s,  f = network(x)

and then comes the row's step, as in `solver_step`. Terms that are absent from all rows are dropped at compile time, and
a slot that takes over another one reuses its registers. Precisions of the network's products: "fp32" (three TF32
products), "tf32" and "bf16"; the state and all else are fp32 in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .mlp_config import PRECISIONS, device_config, launch_config, network_constants, table_constants
from .mlp_network import load_weights, network, per_sample, per_unit
from .mlp_packing import Packed, unknown_instruction
from .philox import STREAM_SAMPLING, draw_offset, load_keys, normal
from .solver_step import data_prediction, new_slot, plus
from .tile import fast_math, on_device

__all__ = [
    "PRECISIONS",
    "Packed",
    "launch_config",
    "mlp_sampler",
    "mlp_sampler_kernel",
    "network_constants",
    "table_constants",
    "unknown_instruction",
]


@triton.jit
def _noise(
    seed,
    offset,
    row,
    unit,
    dim,
    M: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FAST: tl.constexpr,
):
    """Draws normals ``[M, D]``, or transposed; zero beyond ``dim``."""
    counter = (offset + draw_offset(row, STREAM_SAMPLING))[:, None] + tl.arange(0, P)[None, :]
    z = normal(seed[:, None], counter, FAST)
    if 4 * P < D:  # the tile of a product is wider than a sample of few elements
        z = tl.reshape(tl.broadcast_to(z[:, None, :], (M, D // (4 * P), 4 * P)), (M, D))
    return tl.where(unit < dim, tl.trans(z) if TRANSPOSED else z, 0.0)


@triton.jit
def _store(ptr, x, sample, unit, batch, dim):
    tl.store(ptr + sample * dim + unit, x, mask=(sample < batch) & (unit < dim))


@triton.jit
def _network_input(slots, row_ptr, SLOTS: tl.constexpr, KINDS: tl.constexpr, HAS_INPUT: tl.constexpr):
    """Returns n.s, or slot 0 if the two are the same."""
    if not HAS_INPUT:
        return slots[0]
    else:
        x = None
        for i in tl.static_range(SLOTS):
            if KINDS[2 + i] != 0:
                x = plus(x, KINDS, 2 + i, row_ptr, slots[i])
        return tl.zeros_like(slots[0]) if x is None else x


@triton.jit
def _not_finite(slots, x, f, HAS_INPUT: tl.constexpr):
    """Returns 0, or NaN where slot 0, the network's input or its output is not finite. Added to slot 0, it keeps the
    sample non-finite to the end, whatever clips or activations do.
    """
    return 0.0 * (slots[0] + x + f) if HAS_INPUT else 0.0 * (x + f)


@triton.jit(do_not_specialize=["batch", "dim", "rows", "every", "stride"])
def mlp_sampler_kernel(
    x_init_ptr,
    keys_ptr,
    table_ptr,
    rows_ptr,
    given_ptr,
    weights_ptr,
    constants_ptr,
    out_ptr,
    states_ptr,
    clip,
    batch: tl.int64,
    dim: tl.int64,
    rows: tl.int64,
    every: tl.int64,
    stride: tl.int64,
    M: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    NAMES: tl.constexpr,
    CODE: tl.constexpr,
    RESULT: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROW_WIDTH: tl.constexpr,
    GIVEN_WIDTH: tl.constexpr,
    RESIDENT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOTS: tl.constexpr,
    KINDS: tl.constexpr,
    HAS_INPUT: tl.constexpr,
    HAS_DATA: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    FAST: tl.constexpr,
):
    WIDTH: tl.constexpr = 2 + 5 * SLOTS + SLOTS * SLOTS
    sample = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    unit = per_unit(tl.arange(0, D), TRANSPOSED)
    seed, first = load_keys(keys_ptr, sample, sample < batch)
    sample = per_sample(sample, TRANSPOSED)
    zero = tl.zeros([], tl.int64)
    if x_init_ptr is not None:
        x = tl.load(x_init_ptr + sample * dim + unit, mask=(sample < batch) & (unit < dim), other=0.0)
    else:
        x = _noise(seed, first, zero, unit, dim, M, P, D, TRANSPOSED, FAST)
    if states_ptr is not None:
        _store(states_ptr, x, sample, unit, batch, dim)
    slots = (x,)
    for _ in tl.static_range(SLOTS - 1):
        slots += (tl.zeros_like(x),)
    weights = load_weights(weights_ptr, BLOCKS, TRANSPOSED) if RESIDENT else ()
    for index in range(rows):
        row = zero + index  # the interpreter counts in plain ints
        row_ptr = table_ptr + row * WIDTH
        # The stride is 0, which the compiler cannot know: it reloads constants in each row. Kept in registers from row
        # to row, they would make others spill. All pointers take part, since Triton arranges those products alike that
        # it can see to be connected.
        nothing = tl.multiple_of(row * stride, 16)
        x = _network_input(slots, row_ptr, SLOTS, KINDS, HAS_INPUT)
        numbers_ptr = rows_ptr + nothing + row * ROW_WIDTH
        sample_ptr = given_ptr + nothing + sample * GIVEN_WIDTH
        f = network(
            *(x, numbers_ptr, sample_ptr, sample < batch, weights, weights_ptr + nothing, constants_ptr + nothing),
            *(NAMES, CODE, RESULT, BLOCKS, RESIDENT, TRANSPOSED, PRECISION, FAST),
        )
        data = None
        if HAS_DATA:
            data = data_prediction(slots, f, row_ptr, clip, SLOTS, KINDS)
        z = None
        if HAS_NOISE:
            z = _noise(seed, first, row + 1, unit, dim, M, P, D, TRANSPOSED, FAST)
        x = new_slot(_not_finite(slots, x, f, HAS_INPUT), slots, f, data, z, row_ptr, SLOTS, 0, KINDS)
        if states_ptr is not None and (row + 1) % every == 0:
            _store(states_ptr + (row + 1) // every * batch * dim, x, sample, unit, batch, dim)
        new = (x,)
        for j in tl.static_range(1, SLOTS):
            new += (new_slot(None, slots, f, data, z, row_ptr, SLOTS, j, KINDS),)
        slots = new
    _store(out_ptr, slots[0], sample, unit, batch, dim)


def mlp_sampler(
    packed: Packed,
    table: Tensor,
    keys: Tensor,
    *,
    vectors: Any,
    terms: Any,
    x_init: Tensor | None = None,
    clip: float | None = None,
    precision: str = "fp32",
    every: int = 1,
    states: Tensor | None = None,
    progress: Callable[[int], object] | None = None,
    out: Tensor,
) -> None:
    """Writes the samples to ``out`` fp32 ``[B, d]``, and every ``every``-th state to ``states`` if given.

    Args:
        table: fp32 ``[K, 2 + 5 m + m^2]`` on the device, as for `solver_step`.
        keys: int64 ``[B, 2]``.
        vectors: the program's numbers (`fastsde.lowering.Vectors`), with K rows and B samples.
        terms: which coefficients are zero, or one, in all rows (`StepTable.trajectory_terms`).
        x_init: fp32 ``[B, d]`` instead of a draw from the prior.
        states: fp32 ``[K // every + 1, B, d]``, from the initial state on.
        progress: called with the number of rows, once all of them are launched.

    Raises:
        ValueError: for an ``out`` of another width than the network's output, or an unknown precision.
    """
    batch, dim = out.shape
    if dim != packed.dim:
        raise ValueError(f"out must be [B, {packed.dim}], like the network's output, got {list(out.shape)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if batch:
        weights, constants, rows, given = packed.read(vectors)
        config = device_config(batch, packed, precision, out.device)
        with on_device(out):
            mlp_sampler_kernel[(triton.cdiv(batch, config["M"]),)](
                x_init,
                keys,
                table,
                table if rows is None else rows,  # of which nothing is read
                table if given is None else given,
                weights,
                constants,
                out,
                states,
                None if clip is None else float(clip),
                batch,
                dim,
                len(table),
                every,
                0,
                FAST=fast_math(out),
                **config,
                **network_constants(packed, precision),
                **table_constants(terms),
            )
    if progress is not None:
        progress(len(table))
