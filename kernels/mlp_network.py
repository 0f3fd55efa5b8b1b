"""An MLP on a tile of samples, for kernels that keep it on the chip (`mlp_sampler`).

A layer is one matrix product for each block of its weights (`mlp_packing`). The tile comes in two forms:

- ``[samples, units]``, for throughput: the activations of one layer are the left operand of the next product, which
  tensor cores take from registers. In fp32 and tf32 the units are taken in the order 0 2 4 6 1 3 5 7 within each group
  of eight, on both sides of a product: a thread's results are then its operands of the next product, with no exchange.
- ``TRANSPOSED``, ``[units, samples]``, for latency: the weights are the left operand, whose 64 rows fill the tensor
  cores with as few as 8 samples, and the work of a row is spread over four warps.

LogSigmoid and Softplus are computed as min(x, 0) - log2(1 + 2^-|x|): the packing multiplies the layer before by log2(e)
and the layer after by ln 2. On a GPU that takes two special functions, which have the lowest throughput of all
instructions: 16 a clock per multiprocessor. For throughput in tf32 and bf16 three of four logarithms are polynomials
(`_log2_1p`), so that both kinds of work take about as long. Exponentials of two packed bf16 or fp16 numbers gain
nothing: from sm_80 to sm_100 they compile to two instructions of that unit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import special

# The activations that `activate` implements, by their names in fastsde/models/activations.py.
ACTIVATIONS = (
    *("LogSigmoid", "Softplus", "SiLU", "ReLU", "LeakyReLU", "ELU", "Tanh", "Sigmoid", "GELU", "GELU_tanh", "Mish"),
    *("Sin", "Identity"),
)
BINARY_LOGARITHM = ("LogSigmoid", "Softplus")


@triton.jit
def _exp2_minus_abs(x, FAST: tl.constexpr):
    """Computes 2^-|x|; the special-function unit applies the absolute value and the sign by itself."""
    if FAST:
        return special(x, "{ .reg .f32 m; abs.f32 m, $1; neg.f32 m, m; ex2.approx.ftz.f32 $0, m; }")
    else:
        return tl.exp2(-tl.abs(x))


@triton.jit
def _log2_1p(u, PRECISION: tl.constexpr):
    """Computes log2(1 + u) for u in [0, 1] as u times a polynomial that is minimax in the relative error.

    The error is 5.7e-5 for tf32 and 3.9e-4 for bf16, a ninth and a tenth of the error of rounding the result for the
    next product. fp32 keeps the special functions: the three products of a layer take longer than they do.
    """
    if PRECISION == "bf16":
        q = 0.3664806092435519 - 0.1072544223 * u
        return u * (1.4421280943300316 + (q * u - 0.701747258699283) * u)
    else:
        tl.static_assert(PRECISION == "tf32", "no polynomial is as good as fp32")
        q = 0.4418988306344527 + (0.0596515470698109 * u - 0.2271194489777643) * u
        return u * (1.4426132082633483 + (q * u - 0.7169874149351245) * u)


@triton.jit
def _log2_1p_special(u, FAST: tl.constexpr):
    return special(1.0 + u, "lg2.approx.ftz.f32 $0, $1;") if FAST else tl.log2(1.0 + u)


@triton.jit
def _softplus2(x, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr):
    """Computes log2(1 + 2^-|x|)."""
    u = _exp2_minus_abs(x, FAST)
    if PRECISION != "fp32" and not TRANSPOSED:
        # Of 16 units a thread has four: the odd one in the second half takes the special function, the others do not.
        M: tl.constexpr = x.shape[0]
        W: tl.constexpr = x.shape[1]
        even, odd = tl.split(tl.reshape(u, (M, W // 2, 2)))
        low, high = tl.split(tl.permute(tl.reshape(odd, (M, W // 16, 2, 4)), (0, 1, 3, 2)))
        odd = tl.join(_log2_1p(low, PRECISION), _log2_1p_special(high, FAST))
        odd = tl.reshape(tl.permute(odd, (0, 1, 3, 2)), (M, W // 2))
        return tl.reshape(tl.join(_log2_1p(even, PRECISION), odd), (M, W))
    else:
        return _log2_1p_special(u, FAST)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(tl.minimum(-x, 87.0)))  # never overflows


@triton.jit
def _tanh(x):
    power = tl.exp(-2.0 * tl.abs(x))  # never overflows
    magnitude = (1.0 - power) / (1.0 + power)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def _tanh_softplus(x):
    """Computes tanh ln(1 + e^x) = n / (n + 2) with n = e^x (e^x + 2), or both terms divided by e^2x."""
    u = tl.exp(-tl.abs(x))  # never overflows
    n = tl.where(x < 0, u * (u + 2.0), 1.0 + 2.0 * u)
    return n / (n + tl.where(x < 0, 2.0, 2.0 * u * u))


@triton.jit
def activate(x, NAME: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr):
    """Applies an activation; LogSigmoid and Softplus are in units of ln 2 (see above)."""
    if NAME == "LogSigmoid":
        return tl.minimum(x, 0.0) - _softplus2(x, TRANSPOSED, PRECISION, FAST)
    elif NAME == "Softplus":
        return tl.maximum(x, 0.0) + _softplus2(x, TRANSPOSED, PRECISION, FAST)
    elif NAME == "SiLU":
        return x * _sigmoid(x)
    elif NAME == "ReLU":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "LeakyReLU":
        return tl.where(x > 0, x, 0.01 * x)
    elif NAME == "ELU":
        return tl.where(x > 0, x, tl.exp(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)) - 1.0)
    elif NAME == "Tanh":
        return _tanh(x)
    elif NAME == "Sigmoid":
        return _sigmoid(x)
    elif NAME == "GELU":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "GELU_tanh":
        return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "Mish":
        return x * _tanh_softplus(x)
    elif NAME == "Sin":
        return tl.sin(x)
    else:
        tl.static_assert(NAME == "Identity", "an activation that is not one of ACTIVATIONS")
        return x


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
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """Returns the COUNT blocks of ``h W + b``, each WIDTH wide, with the blocks of weights from FIRST on."""
    out = ()
    for j in tl.static_range(COUNT):
        unit = j * WIDTH + tl.arange(0, WIDTH)
        bias = tl.load(biases_ptr + BIAS + unit)
        if FIRST == 0:
            bias += time * tl.load(biases_ptr + unit)
        total = per_unit(bias, TRANSPOSED)
        if TRANSPOSED:
            total = tl.broadcast_to(total, (WIDTH, h[0].shape[1]))
        else:
            total = tl.broadcast_to(total, (h[0].shape[0], WIDTH))
        for i in tl.static_range(len(h)):
            w = _block(weights, weights_ptr, FIRST + j * len(h) + i, BLOCKS, RESIDENT, TRANSPOSED)
            total = _product(h[i], w, total, TRANSPOSED, PRECISION, FAST)
        out = out + (total,)  # noqa: RUF005
    return out


@triton.jit
def _activate_all(
    h, NAMES: tl.constexpr, NUMBER: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr
):
    NAME: tl.constexpr = NAMES[NUMBER]
    out = ()
    for i in tl.static_range(len(h)):
        out = out + (activate(h[i], NAME, TRANSPOSED, PRECISION, FAST),)  # noqa: RUF005
    return out


@triton.jit
def network(
    x,
    time,
    weights,
    weights_ptr,
    biases_ptr,
    LAYERS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ACTIVATIONS: tl.constexpr,
    RESIDENT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """Returns the MLP's output for a tile and a time; if RESIDENT, ``weights`` come from `load_weights`."""
    h = (x,)
    for number in tl.static_range(len(LAYERS)):
        h = _layer(
            *(h, time, weights, weights_ptr, biases_ptr),
            *(LAYERS[number][0], LAYERS[number][1], LAYERS[number][2], LAYERS[number][3]),
            *(BLOCKS, RESIDENT, TRANSPOSED, PRECISION, FAST),
        )
        if number < len(LAYERS) - 1:
            h = _activate_all(h, ACTIVATIONS, number, TRANSPOSED, PRECISION, FAST)
    return h[0]
