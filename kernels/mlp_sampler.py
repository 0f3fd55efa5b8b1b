"""A whole trajectory of an MLP score network in one launch.

Each program takes M samples from the prior to the end: all slots of the state stay in registers, and the weights stay
on the chip if they fit. A layer of the network is one matrix product of the tile (`mlp_network`); the time is an extra
input, whose weights are added to the bias of the first layer once per row:

    x = n.s,  h_1 = act(W_1 x + (b_1 + time w_time)),  h_l = act(W_l h_{l-1} + b_l),  f = W_L h_{L-1} + b_L

and then comes the row's step, as in `solver_step`. Terms that are absent from all rows are dropped at compile time, and
a slot that takes over another one reuses its registers. The weights are packed (`mlp_packing`) in blocks whose sides
are powers of two of at least 16, so that a product is never ragged. Precisions: "fp32" (three TF32 products), "tf32"
and "bf16"; the state, the bias and the activations are fp32 in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .mlp_network import load_weights, network, per_sample, per_unit
from .mlp_packing import MIN_WIDTH, Packed, blocks_of, has_activation
from .philox import STREAM_SAMPLING, draw_offset, load_keys, normal
from .solver_step import data_prediction, new_slot, plus
from .tile import fast_math, on_device

__all__ = [
    "PRECISIONS",
    "Packed",
    "has_activation",
    "launch_config",
    "mlp_sampler",
    "mlp_sampler_kernel",
    "network_constants",
    "table_constants",
]

PRECISIONS = ("fp32", "tf32", "bf16")
_SLOT_0 = (1, *(0,) * 7)  # the kinds of n if slot 0 itself is the network's input
_RESIDENT_BYTES = 88 * 1024  # of shared memory, available on every GPU from sm_80 on


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
    weights_ptr,
    biases_ptr,
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
    LAYERS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ACTIVATIONS: tl.constexpr,
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
        # The stride is 0, which the compiler cannot know: it reloads the biases in each row. Kept in registers from row
        # to row, they would make others spill.
        nothing = tl.multiple_of(row * stride, 16)
        x = _network_input(slots, row_ptr, SLOTS, KINDS, HAS_INPUT)
        f = network(
            *(x, tl.load(row_ptr), weights, weights_ptr + nothing, biases_ptr + nothing),
            *(LAYERS, BLOCKS, ACTIVATIONS, RESIDENT, TRANSPOSED, PRECISION, FAST),
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


def is_resident(packed: Packed, precision: str) -> bool:
    """Returns whether the weights stay in shared memory from row to row."""
    copies = 2 if precision == "fp32" else 1  # the leading bits and the remainder
    return copies * packed.nbytes <= _RESIDENT_BYTES


def network_constants(packed: Packed, precision: str) -> dict[str, object]:
    """Returns the compile-time constants of an MLP."""
    return {
        "P": triton.next_power_of_2(triton.cdiv(packed.dim, 4)),
        "D": blocks_of(packed.dim)[1],
        "LAYERS": packed.layers,
        "BLOCKS": packed.blocks,
        "ACTIVATIONS": packed.activations,
        "RESIDENT": is_resident(packed, precision),
        "PRECISION": precision,
    }


def table_constants(terms: Any) -> dict[str, object]:
    """Returns the compile-time constants of a table, from its `StepTable.trajectory_terms`."""
    return {
        "SLOTS": terms.slots,
        "KINDS": terms.columns,
        "HAS_INPUT": terms.n != _SLOT_0[: terms.slots],
        "HAS_DATA": terms.has_data,
        "HAS_NOISE": terms.has_noise,
    }


def launch_config(
    batch: int, packed: Packed, precision: str, processors: int, capability: int
) -> dict[str, int | bool]:
    """Returns the form and the height of the tiles that a batch is cut into, and their warps.

    Few samples are cut into transposed tiles of 8, for latency; many into tiles as high as the product of a warp group.
    In fp32, whose operands come in two parts, many dimensions and wide layers would spill a hundred registers in those:
    they use transposed tiles for any batch.

    Args:
        processors: how many multiprocessors the GPU has.
        capability: 10 times the compute capability.
    """
    few = batch <= 16 * processors
    blocks = max(count for _, _, count, _ in packed.layers)  # of the widest layer
    narrow = blocks == 1 and packed.dim <= MIN_WIDTH
    if few and (precision == "fp32" or is_resident(packed, precision)):
        # A warp for each 16 units. Not four warps on sm_100 for narrow networks: those would use the tensor memory, and
        # the way there and back takes longer than so small a product.
        widest = max(width for *_, width in packed.layers)
        return {"M": 8, "TRANSPOSED": True, "num_warps": min(widest // 16, 2 if narrow and capability >= 100 else 4)}
    if precision == "fp32" and not narrow:
        return {"M": 16 if blocks == 1 else 8, "TRANSPOSED": True, "num_warps": 4}
    if blocks > 2 and capability >= 100:  # Triton 3.6 compiles to an empty program if there is too little tensor memory
        return {"M": 16, "TRANSPOSED": True, "num_warps": 4}
    if capability < 90 and precision == "fp32":  # in larger tiles more registers spill
        return {"M": 32, "TRANSPOSED": False, "num_warps": 2}
    # From sm_100 on the accumulator of a product is in tensor memory, so that more warps can share the rest of a tile.
    warps = 8 if packed.dim > MIN_WIDTH or capability >= 100 else 4
    return {"M": 64, "TRANSPOSED": False, "num_warps": warps}


def _device_config(batch: int, packed: Packed, precision: str, device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return launch_config(batch, packed, precision, 1, 90)
    properties = torch.cuda.get_device_properties(device)
    capability = properties.major * 10 + properties.minor
    return launch_config(batch, packed, precision, properties.multi_processor_count, capability)


def mlp_sampler(
    packed: Packed,
    table: Tensor,
    keys: Tensor,
    *,
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
        weights, biases = packed.read()
        config = _device_config(batch, packed, precision, out.device)
        with on_device(out):
            mlp_sampler_kernel[(triton.cdiv(batch, config["M"]),)](
                x_init,
                keys,
                table,
                weights,
                biases,
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
