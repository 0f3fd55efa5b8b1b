"""A network on a tile of samples, for kernels that keep it on the chip (`mlp_sampler`).

The network is a list of instructions (`program_blocks`), unrolled at compile time. Each makes a register: a block of
units, or one unit per sample. A linear layer is one matrix product for each block of its weights. The tile comes in two
forms:

- ``[samples, units]``, for throughput: the activations of one layer are the left operand of the next product, which
  tensor cores take from registers. In fp32 and tf32 the units are taken in the order 0 2 4 6 1 3 5 7 within each group
  of eight, on both sides of a product: a thread's results are then its operands of the next product, with no exchange.
- ``TRANSPOSED``, ``[units, samples]``, for latency: the weights are the left operand, whose 64 rows fill the tensor
  cores with as few as 8 samples, and the work of a row is spread over four warps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import combined, function

OPERANDS = ("none", "register", "constant", "row")  # the kinds of operands, by their numbers


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr, FAST: tl.constexpr):
    """Returns ``total + a b``, in fp32."""
    tl.static_assert(PRECISION == "fp32" or PRECISION == "tf32" or PRECISION == "bf16", "not one of PRECISIONS")
    if PRECISION == "bf16":
        if FAST:
            return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
        else:  # the interpreter's bf16 arithmetic is wrong: round to bf16, and multiply in fp32
            a, b = a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32)
            return tl.dot(a, b, total, input_precision="ieee")
    elif not FAST:
        return tl.dot(a, b, total, input_precision="ieee")
    elif PRECISION == "tf32":
        return tl.dot(a, b, total, input_precision="tf32")
    else:
        # Three products of the leading 11 bits and the remainders; the product of both remainders, some 2^-22 of the
        # whole, is left out.
        a_high = _leading(a)
        b_high = _leading(b)
        total = tl.dot(a - a_high, b_high, total, input_precision="tf32")
        total = tl.dot(a_high, b - b_high, total, input_precision="tf32")
        return tl.dot(a_high, b_high, total, input_precision="tf32")


@triton.jit
def _leading(x):
    # Rounded, not truncated: the remainder is half as large, and of either sign.
    return ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def _product(h, w, total, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr):
    """Returns ``total + h w``, or ``total + w h`` for transposed tiles."""
    if TRANSPOSED:
        return _dot(w, h, total, PRECISION, FAST)
    elif PRECISION == "bf16":
        return _dot(h, w, total, PRECISION, FAST)
    else:  # reorders the units within each group of eight (see above)
        h = tl.permute(tl.reshape(h, (h.shape[0], h.shape[1] // 8, 4, 2)), (0, 1, 3, 2))
        w = tl.permute(tl.reshape(w, (w.shape[0] // 8, 4, 2, w.shape[1])), (0, 2, 1, 3))
        h = tl.reshape(h, (total.shape[0], h.shape[1] * 8))
        w = tl.reshape(w, (w.shape[0] * 8, total.shape[1]))
        return _dot(h, w, total, PRECISION, FAST)


@triton.jit
def per_sample(values, TRANSPOSED: tl.constexpr):
    """Makes values ``[samples]`` broadcast over a tile."""
    return values[None, :] if TRANSPOSED else values[:, None]


@triton.jit
def per_unit(values, TRANSPOSED: tl.constexpr):
    """Makes values ``[units]`` broadcast over a tile."""
    return values[:, None] if TRANSPOSED else values[None, :]


@triton.jit
def _load_block(
    weights_ptr, OFFSET: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Loads a block of weights as ``[inputs, outputs]``, or transposed."""
    inputs = per_sample(tl.arange(0, INPUTS), TRANSPOSED)
    outputs = per_unit(tl.arange(0, OUTPUTS), TRANSPOSED)
    return tl.load(weights_ptr + OFFSET + outputs * INPUTS + inputs)


@triton.jit
def load_weights(weights_ptr, BLOCKS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Loads all blocks, to keep them on the chip."""
    weights = ()
    for i in tl.static_range(len(BLOCKS)):
        block = _load_block(weights_ptr, BLOCKS[i][0], BLOCKS[i][1], BLOCKS[i][2], TRANSPOSED)
        weights = weights + (block,)  # noqa: RUF005
    return weights


@triton.jit
def _block(
    weights, weights_ptr, NUMBER: tl.constexpr, BLOCKS: tl.constexpr, RESIDENT: tl.constexpr, TRANSPOSED: tl.constexpr
):
    if RESIDENT:
        return weights[NUMBER]
    else:
        tl.debug_barrier()  # keeps the compiler from loading more blocks at once than fit
        return _load_block(weights_ptr, BLOCKS[NUMBER][0], BLOCKS[NUMBER][1], BLOCKS[NUMBER][2], TRANSPOSED)


@triton.jit
def _units(WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr):
    return per_unit(tl.arange(0, WIDTH), TRANSPOSED)


@triton.jit
def _tile(x, values, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Broadcasts values to a tile of WIDTH units, of the samples of x."""
    if TRANSPOSED:
        return tl.broadcast_to(values, (WIDTH, x.shape[1]))
    else:
        return tl.broadcast_to(values, (x.shape[0], WIDTH))


@triton.jit
def _operand(
    registers,
    constants_ptr,
    row_ptr,
    KIND: tl.constexpr,
    NUMBER: tl.constexpr,
    WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Returns an operand of one of `OPERANDS`."""
    if KIND == 0:
        return tl.zeros((1, 1), tl.float32)
    elif KIND == 1:
        return registers[NUMBER]
    else:
        ptr = (row_ptr if KIND == 3 else constants_ptr) + NUMBER
        return per_unit(tl.load(ptr + tl.arange(0, WIDTH)), TRANSPOSED)


@triton.jit
def _linear(
    registers,
    total,
    weights,
    weights_ptr,
    CODE: tl.constexpr,
    NUMBER: tl.constexpr,
    BLOCKS: tl.constexpr,
    RESIDENT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """Adds the products of registers with blocks of weights to ``total``."""
    for i in tl.static_range(4, len(CODE[NUMBER]), 2):
        w = _block(weights, weights_ptr, CODE[NUMBER][i + 1], BLOCKS, RESIDENT, TRANSPOSED)
        total = _product(registers[CODE[NUMBER][i]], w, total, TRANSPOSED, PRECISION, FAST)
    return total


@triton.jit
def _sum_of_units(x, FIRST: tl.constexpr, END: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Returns the sum of units FIRST to END - 1 of a register."""
    WIDTH: tl.constexpr = x.shape[0 if TRANSPOSED else 1]
    if WIDTH == 1:
        return x
    else:
        if END - FIRST < WIDTH:
            unit = _units(WIDTH, TRANSPOSED)
            x = tl.where((unit >= FIRST) & (unit < END), x, 0.0)
        return tl.sum(x, 0 if TRANSPOSED else 1, keep_dims=True)


@triton.jit
def _mean(registers, CODE: tl.constexpr, NUMBER: tl.constexpr, TRANSPOSED: tl.constexpr):
    total = None
    for i in tl.static_range(2, len(CODE[NUMBER]), 3):
        x = registers[CODE[NUMBER][i]]
        x = x * x if CODE[NUMBER][1] else x
        part = _sum_of_units(x, CODE[NUMBER][i + 1], CODE[NUMBER][i + 2], TRANSPOSED)
        total = part if total is None else total + part
    return total * CODE[NUMBER][0]


@triton.jit
def _gather(registers, constants_ptr, CODE: tl.constexpr, NUMBER: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Returns a block of units of several registers."""
    WIDTH: tl.constexpr = CODE[NUMBER][0]
    found = _tile(registers[0], tl.zeros((1, 1), tl.float32), WIDTH, TRANSPOSED)
    for i in tl.static_range(1, len(CODE[NUMBER]), 2):
        x = registers[CODE[NUMBER][i]]
        number = tl.load(constants_ptr + CODE[NUMBER][i + 1] + _units(WIDTH, TRANSPOSED)).to(tl.int32)
        if x.shape[0 if TRANSPOSED else 1] > 1:
            index = _tile(x, tl.maximum(number, 0), WIDTH, TRANSPOSED)
            x = tl.gather(x, index, 0 if TRANSPOSED else 1)
        found = tl.where(number >= 0, x, found)
    return found


@triton.jit
def _instruction(
    registers,
    row_ptr,
    given_ptr,
    exists,
    weights,
    weights_ptr,
    constants_ptr,
    NAMES: tl.constexpr,
    CODE: tl.constexpr,
    NUMBER: tl.constexpr,
    BLOCKS: tl.constexpr,
    RESIDENT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """Returns the register that an instruction makes."""
    # All numbers of an instruction are in one tuple, without tuples or names in it, which Triton 3.6 does not take.
    NAME: tl.constexpr = NAMES[NUMBER]
    FIRST: tl.constexpr = CODE[NUMBER][0]
    SECOND: tl.constexpr = CODE[NUMBER][1]
    if NAME == "linear" or NAME == "fill":
        total = _operand(registers, constants_ptr, row_ptr, SECOND, CODE[NUMBER][2], CODE[NUMBER][3], TRANSPOSED)
        total = _tile(registers[0], total, FIRST, TRANSPOSED)
        of = (registers, total, weights, weights_ptr)
        return _linear(*of, CODE, NUMBER, BLOCKS, RESIDENT, TRANSPOSED, PRECISION, FAST)
    elif NAME == "add" or NAME == "subtract" or NAME == "multiply" or NAME == "divide":
        b = _operand(registers, constants_ptr, row_ptr, SECOND, CODE[NUMBER][2], CODE[NUMBER][3], TRANSPOSED)
        return combined(registers[FIRST], b, NAME)
    elif NAME == "given":
        unit = _units(CODE[NUMBER][2], TRANSPOSED)
        return tl.load(given_ptr + FIRST + unit, mask=exists & (unit < SECOND), other=0.0)
    elif NAME == "gather":
        return _gather(registers, constants_ptr, CODE, NUMBER, TRANSPOSED)
    elif NAME == "mean":
        return _mean(registers, CODE, NUMBER, TRANSPOSED)
    elif NAME == "mask":
        x = registers[FIRST]
        return tl.where(_units(x.shape[0 if TRANSPOSED else 1], TRANSPOSED) < SECOND, x, 0.0)
    elif NAME == "unit":
        return _sum_of_units(registers[FIRST], SECOND, SECOND + 1, TRANSPOSED)
    else:
        return function(registers[FIRST], NAME, SECOND, CODE[NUMBER][2], TRANSPOSED, PRECISION, FAST)


@triton.jit
def network(
    x,
    row_ptr,
    given_ptr,
    exists,
    weights,
    weights_ptr,
    constants_ptr,
    NAMES: tl.constexpr,
    CODE: tl.constexpr,
    RESULT: tl.constexpr,
    BLOCKS: tl.constexpr,
    RESIDENT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """Returns the network's output for a tile in a row; if RESIDENT, ``weights`` come from `load_weights`.

    Args:
        row_ptr: the row's numbers.
        given_ptr: what each sample of the tile is given, or None.
        exists: which samples of the tile exist.
    """
    registers = (x,)
    for i in tl.static_range(len(CODE)):
        register = _instruction(
            *(registers, row_ptr, given_ptr, exists, weights, weights_ptr, constants_ptr),
            *(NAMES, CODE, i, BLOCKS, RESIDENT, TRANSPOSED, PRECISION, FAST),
        )
        registers = registers + (register,)  # noqa: RUF005
    return registers[RESULT]
