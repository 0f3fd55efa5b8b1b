"""A whole trajectory of an MLP score network in one launch.

Each program takes M samples from the prior to the end: the state and history stay in registers, and the weights on
the chip where they fit. A layer of the network is one matrix product of the tile; the time is an extra input, whose
weights join the bias of the first layer, once a row:

    h_1 = act(x W_1 + (b_1 + time w_time)),  h_l = act(h_{l-1} W_l + b_l),  f = h_{L-1} W_L + b_L

and then the row's step, as in `solver_step`. The weights are packed (`Packed`) in blocks whose sides are powers of two
of at least 16, so that a product is never ragged. Precisions: "fp32" (three TF32 products), "tf32" and "bf16"; the
state, the bias and the activations are fp32 in each.

LogSigmoid and Softplus are computed as min(x, 0) - log2(1 + 2^-|x|): the packing multiplies the layer before by log2(e)
and the one after by ln 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import STREAM_SAMPLING, draw_offset, load_keys, normal, special
from .tile import fast_math, on_device

PRECISIONS = ("fp32", "tf32", "bf16")
# Those that `activate` has, by the names of fastsde/models/activations.py.
ACTIVATIONS = ("LogSigmoid", "Softplus", "SiLU", "ReLU", "Tanh", "GELU", "GELU_tanh", "Identity")
_MIN_WIDTH, _BLOCK = 16, 64
_RESIDENT_BYTES = 88 * 1024  # of shared memory, which every GPU from sm_80 on has
_BINARY_LOGARITHM = ("LogSigmoid", "Softplus")


class Packed:
    """An MLP as the kernel reads it.

    Widths are padded to a power of two up to 64, and to blocks of 64 from there on. The weights are kept block after
    block, each ``[in, out]``, those of an output block one after another; the biases as w_time, b_1, ..., b_L.

    Args:
        layers: (weight ``[out, in]``, bias ``[out]`` or None) of each layer; the last input of the first is the time.
        activations: the one after each layer but the last.
        dtype: of the packed weights.

    Raises:
        ValueError: for an activation that the kernel does not have.
    """

    def __init__(
        self, layers: Sequence[tuple[Tensor, Tensor | None]], activations: Sequence[str], dtype: torch.dtype
    ) -> None:
        for name in activations:
            if not has_activation(name):
                raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
        self.activations, self.dtype = tuple(activations), dtype
        self.dim = layers[-1][0].shape[0]
        self.layers: tuple[tuple[int, int, int, int], ...] = ()  # first block, offset of the bias, blocks out, width
        self.blocks: tuple[tuple[int, int, int], ...] = ()  # offset, rows, columns
        self._sources: list[Tensor] = []
        self._places: list[tuple[int, tuple[int, int]]] = []  # of each source: its offset, and the shape of its block
        self._size = 0
        factors: list[tuple[float, int]] = []
        vectors: list[tuple[Tensor | None, float, int]] = []
        binary = [False, *(name in _BINARY_LOGARITHM for name in activations), False]
        for number, (weight, bias) in enumerate(layers):
            after = math.log2(math.e) if binary[number + 1] else 1.0
            before = math.log(2) if binary[number] else 1.0
            matrix = weight.detach().T
            count, width = _blocks(matrix.shape[1])
            if number == 0:
                vectors.append((matrix[-1], after, count * width))
                matrix = matrix[:-1]
            self.layers += ((len(self.blocks), sum(size for _, _, size in vectors), count, width),)
            vectors.append((None if bias is None else bias.detach(), after, count * width))
            height = _blocks(len(matrix))[1]
            for columns in matrix.split(width, dim=1):
                for block in columns.split(height):
                    self.blocks += ((self._size, height, width),)
                    self._place(block, (height, width))
                    factors.append((before * after, height * width))
        self._weights_end = self._size
        for vector, factor, size in vectors:
            self._place(None if vector is None else vector[None], (1, size))
            factors.append((factor, size))
        each = [torch.full((size,), factor, dtype=torch.float32) for factor, size in factors]
        self._factor = torch.cat(each).to(layers[0][0].device)
        self.nbytes = self._weights_end * dtype.itemsize

    def _place(self, source: Tensor | None, shape: tuple[int, int]) -> None:
        if source is not None:
            self._sources.append(source)
            self._places.append((self._size, shape))
        self._size += math.prod(shape)

    def read(self) -> tuple[Tensor, Tensor]:
        """Weights and biases as the parameters are now, in few launches, and in memory that nobody else has."""
        buffer = torch.zeros_like(self._factor)
        targets = [
            buffer[offset : offset + rows * columns].view(rows, columns)[: source.shape[0], : source.shape[1]]
            for source, (offset, (rows, columns)) in zip(self._sources, self._places, strict=True)
        ]
        torch._foreach_copy_(targets, self._sources)
        buffer *= self._factor
        return buffer[: self._weights_end].to(self.dtype), buffer[self._weights_end :].clone()


def has_activation(name: str) -> bool:
    """Whether the kernel has an activation."""
    return name in ACTIVATIONS


def _blocks(size: int) -> tuple[int, int]:
    """How many blocks a width is cut into, and their width."""
    width = min(_BLOCK, max(_MIN_WIDTH, triton.next_power_of_2(size)))
    return triton.cdiv(size, width), width


@triton.jit
def _exp2(x, FAST: tl.constexpr):
    return special(x, "ex2.approx.ftz.f32 $0, $1;") if FAST else tl.exp2(x)


@triton.jit
def _log2(x, FAST: tl.constexpr):
    return special(x, "lg2.approx.ftz.f32 $0, $1;") if FAST else tl.log2(x)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(tl.minimum(-x, 87.0)))  # which never overflows


@triton.jit
def _tanh(x):
    power = tl.exp(-2.0 * tl.abs(x))  # never overflows
    magnitude = (1.0 - power) / (1.0 + power)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def activate(x, NAME: tl.constexpr, FAST: tl.constexpr):
    """The activation; LogSigmoid and Softplus in units of ln 2 (see above)."""
    if NAME == "LogSigmoid":
        return tl.minimum(x, 0.0) - _log2(1.0 + _exp2(-tl.abs(x), FAST), FAST)
    elif NAME == "Softplus":
        return tl.maximum(x, 0.0) + _log2(1.0 + _exp2(-tl.abs(x), FAST), FAST)
    elif NAME == "SiLU":
        return x * _sigmoid(x)
    elif NAME == "ReLU":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "Tanh":
        return _tanh(x)
    elif NAME == "GELU":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "GELU_tanh":
        return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(NAME == "Identity", "an activation that is not one of ACTIVATIONS")
        return x


@triton.jit
def _product(h, w, total, PRECISION: tl.constexpr, FAST: tl.constexpr):
    """``total + h w``, in fp32."""
    tl.static_assert(PRECISION == "fp32" or PRECISION == "tf32" or PRECISION == "bf16", "not one of PRECISIONS")
    if PRECISION == "bf16":
        if FAST:
            return tl.dot(h.to(tl.bfloat16), w, total)
        else:  # the interpreter's bf16 arithmetic is wrong: round to it, and multiply in fp32
            return tl.dot(h.to(tl.bfloat16).to(tl.float32), w.to(tl.float32), total, input_precision="ieee")
    elif not FAST:
        return tl.dot(h, w, total, input_precision="ieee")
    elif PRECISION == "tf32":
        return tl.dot(h, w, total, input_precision="tf32")
    else:
        # Three products of the leading 11 bits of both and of what remains; the product of the two remainders, some
        # 2^-22 of the whole, is left out.
        h_high = _leading(h)
        w_high = _leading(w)
        total = tl.dot(h - h_high, w_high, total, input_precision="tf32")
        total = tl.dot(h_high, w - w_high, total, input_precision="tf32")
        return tl.dot(h_high, w_high, total, input_precision="tf32")


@triton.jit
def _leading(x):
    # Rounded, not cut off: a remainder is half as large, and of either sign.
    return ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def _load_block(weights_ptr, OFFSET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.load(weights_ptr + OFFSET + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _load_weights(weights_ptr, BLOCKS: tl.constexpr):
    weights = ()
    for i in tl.static_range(len(BLOCKS)):
        block = _load_block(weights_ptr, BLOCKS[i][0], BLOCKS[i][1], BLOCKS[i][2])
        weights = weights + (block,)  # noqa: RUF005
    return weights


@triton.jit
def _block(weights, weights_ptr, NUMBER: tl.constexpr, BLOCKS: tl.constexpr, RESIDENT: tl.constexpr):
    if RESIDENT:
        return weights[NUMBER]
    else:
        tl.debug_barrier()  # keeps the compiler from loading many blocks at once, for which there is no room
        return _load_block(weights_ptr, BLOCKS[NUMBER][0], BLOCKS[NUMBER][1], BLOCKS[NUMBER][2])


@triton.jit
def _layer(
    h,
    time,
    weights,
    weights_ptr,
    biases_ptr,
    FIRST: tl.constexpr,
    BIAS: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """The blocks of ``h W + b``: COUNT of them, each WIDTH wide, of the blocks of weights from FIRST on."""
    out = ()
    for j in tl.static_range(COUNT):
        column = j * WIDTH + tl.arange(0, WIDTH)
        bias = tl.load(biases_ptr + BIAS + column)
        if FIRST == 0:
            bias += time * tl.load(biases_ptr + column)
        total = tl.zeros([h[0].shape[0], WIDTH], tl.float32) + bias[None, :]
        for i in tl.static_range(len(h)):
            w = _block(weights, weights_ptr, FIRST + j * len(h) + i, BLOCKS, RESIDENT)
            total = _product(h[i], w, total, PRECISION, FAST)
        out = out + (total,)  # noqa: RUF005
    return out


@triton.jit
def _activate_all(h, NAMES: tl.constexpr, NUMBER: tl.constexpr, FAST: tl.constexpr):
    NAME: tl.constexpr = NAMES[NUMBER]
    out = ()
    for i in tl.static_range(len(h)):
        out = out + (activate(h[i], NAME, FAST),)  # noqa: RUF005
    return out


@triton.jit
def _network(
    x,
    time,
    weights,
    weights_ptr,
    biases_ptr,
    LAYERS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ACTIVATIONS: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    h = (x,)
    for number in tl.static_range(len(LAYERS)):
        h = _layer(
            *(h, time, weights, weights_ptr, biases_ptr),
            *(LAYERS[number][0], LAYERS[number][1], LAYERS[number][2], LAYERS[number][3]),
            *(BLOCKS, RESIDENT, PRECISION, FAST),
        )
        if number < len(LAYERS) - 1:
            h = _activate_all(h, ACTIVATIONS, number, FAST)
    return h[0]


@triton.jit
def _noise(seed, offset, row, column, dim, M: tl.constexpr, P: tl.constexpr, D: tl.constexpr, FAST: tl.constexpr):
    """The normals of a draw ``[M, D]``; zero beyond ``dim``."""
    counter = (offset + draw_offset(row, STREAM_SAMPLING))[:, None] + tl.arange(0, P)[None, :]
    z = normal(seed[:, None], counter, FAST)
    if 4 * P < D:  # a tile of a product is wider than the few elements of a sample
        z = tl.reshape(tl.broadcast_to(z[:, None, :], (M, D // (4 * P), 4 * P)), (M, D))
    return tl.where(column < dim, z, 0.0)


@triton.jit
def _store(ptr, x, sample, column, batch, dim):
    tl.store(ptr + sample[:, None] * dim + column, x, mask=(sample < batch)[:, None] & (column < dim))


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
    PRECISION: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    USES_DATA: tl.constexpr,
    FAST: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    column = tl.arange(0, D)[None, :]
    seed, first = load_keys(keys_ptr, sample, sample < batch)
    zero = tl.zeros([], tl.int64)
    if x_init_ptr is not None:
        mask = (sample < batch)[:, None] & (column < dim)
        x = tl.load(x_init_ptr + sample[:, None] * dim + column, mask=mask, other=0.0)
    else:
        x = _noise(seed, first, zero, column, dim, M, P, D, FAST)
    if states_ptr is not None:
        _store(states_ptr, x, sample, column, batch, dim)
    history = tl.zeros([M, D], tl.float32)
    weights = _load_weights(weights_ptr, BLOCKS) if RESIDENT else ()
    for index in range(rows):
        row = zero + index  # the interpreter counts in plain ints
        k_ptr = table_ptr + row * 8
        # The stride is 0, which the compiler cannot know: kept from row to row, the biases would take so many registers
        # that others spill.
        nothing = row * stride
        if PRECISION != "fp32":  # which has no register left for wider loads
            nothing = tl.multiple_of(nothing, 16)
        f = _network(
            *(x, tl.load(k_ptr), weights, weights_ptr + nothing, biases_ptr + nothing),
            *(LAYERS, BLOCKS, ACTIVATIONS, RESIDENT, PRECISION, FAST),
        )
        x_next = tl.load(k_ptr + 1) * x + tl.load(k_ptr + 2) * f
        x_next += 0.0 * (x + f)  # what is not finite stays so to the end, whatever clips or activations make of it
        if HAS_HISTORY:
            x_next += tl.load(k_ptr + 3) * history
        if USES_DATA or HAS_HISTORY:
            history = tl.load(k_ptr + 6) * x + tl.load(k_ptr + 7) * f
            if clip is not None:
                history = tl.clamp(history, -clip, clip)
            x_next += tl.load(k_ptr + 5) * history
        if HAS_NOISE:
            x_next += tl.load(k_ptr + 4) * _noise(seed, first, row + 1, column, dim, M, P, D, FAST)
        x = x_next
        if states_ptr is not None and (row + 1) % every == 0:
            _store(states_ptr + (row + 1) // every * batch * dim, x, sample, column, batch, dim)
    _store(out_ptr, x, tl.program_id(0).to(tl.int64) * M + tl.arange(0, M), column, batch, dim)


def constants(packed: Packed, precision: str) -> dict[str, object]:
    """What the kernel knows of an MLP when it is compiled."""
    copies = 2 if precision == "fp32" else 1  # the leading bits, and those that follow
    return {
        "P": triton.next_power_of_2(triton.cdiv(packed.dim, 4)),
        "D": _blocks(packed.dim)[1],
        "LAYERS": packed.layers,
        "BLOCKS": packed.blocks,
        "ACTIVATIONS": packed.activations,
        "RESIDENT": copies * packed.nbytes <= _RESIDENT_BYTES,
        "PRECISION": precision,
    }


def launch_config(batch: int, packed: Packed, precision: str, processors: int, capability: int) -> dict[str, int]:
    """Few samples are cut into low tiles of one warp, for their latency; many into tiles as high as a group's product.

    So are those of wide networks, whose layers do not fit the registers of one warp.

    Args:
        processors: how many multiprocessors the GPU has.
        capability: 10 times the compute capability.
    """
    wide = max(count for _, _, count, _ in packed.layers) > 1 or packed.dim > _MIN_WIDTH
    if batch <= 16 * processors and not wide:
        return {"M": 16, "num_warps": 1}
    if capability < 90 and precision == "fp32" and not wide:  # in larger tiles a few registers spill
        return {"M": 32, "num_warps": 2}
    # From sm_100 on a product's accumulator is in tensor memory: more warps share the rest of a tile.
    return {"M": 64, "num_warps": 8 if packed.dim > _MIN_WIDTH or capability >= 100 else 4}


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
    x_init: Tensor | None = None,
    clip: float | None = None,
    has_noise: bool = True,
    has_history: bool = False,
    uses_data: bool = False,
    precision: str = "fp32",
    every: int = 1,
    states: Tensor | None = None,
    progress: Callable[[int], object] | None = None,
    out: Tensor,
) -> None:
    """Writes the samples to ``out`` fp32 ``[B, d]``, and every ``every``-th state to ``states`` where given.

    Args:
        table: fp32 ``[K, 8]`` on the device, as for `solver_step`.
        keys: int64 ``[B, 2]``.
        x_init: fp32 ``[B, d]`` instead of a draw from the prior.
        has_noise, has_history, uses_data: whether d, c, e are not all zero in the table.
        states: fp32 ``[K // every + 1, B, d]``, from the initial state on.
        progress: called with the number of rows, once all of them are launched.

    Raises:
        ValueError: for another number of data than the network's, or an unknown precision.
    """
    batch, dim = out.shape
    if dim != packed.dim:
        raise ValueError(f"out must be [B, {packed.dim}], as the network's output is, got {list(out.shape)}")
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
                HAS_NOISE=has_noise,
                HAS_HISTORY=has_history,
                USES_DATA=uses_data,
                FAST=fast_math(out),
                **config,
                **constants(packed, precision),
            )
    if progress is not None:
        progress(len(table))
