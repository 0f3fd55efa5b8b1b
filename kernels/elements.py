"""Elementwise functions of a network on a tile of samples, for kernels that keep it on the chip (`mlp_sampler`).

LogSigmoid and Softplus are computed as min(x, 0) - log2(1 + 2^-|x|): the product before is multiplied by log2(e), and
the product after by ln 2 (`program_blocks`). On a GPU that takes two special functions, which have the lowest
throughput of all instructions: 16 a clock per multiprocessor. For throughput in tf32 and bf16 three of four logarithms
are polynomials (`_log2_1p`), so that both kinds of work take about as long. Exponentials of two packed bf16 or fp16
numbers gain nothing: from sm_80 to sm_100 they compile to two instructions of that unit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import special

# The activations that `function` computes, by their names in fastsde/models/activations.py, and the other functions.
ACTIVATIONS = (
    *("LogSigmoid", "Softplus", "SiLU", "ReLU", "LeakyReLU", "ELU", "Tanh", "Sigmoid", "GELU", "GELU_tanh", "Mish"),
    *("Sin", "Identity"),
)
FUNCTIONS = (*ACTIVATIONS, "affine", "clamp", "exp", "sqrt", "rsqrt", "reciprocal", "abs", "cos", "erf")


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
    if PRECISION != "fp32" and not TRANSPOSED and x.shape[1] > 1:
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
def _sine(x, QUARTERS: tl.constexpr, FAST: tl.constexpr):
    """Computes sin(x + QUARTERS pi / 2) to a few 1e-7, for |x| up to 2^24.

    The compiler's own sine keeps a table in local memory, for larger numbers. Their neighbours in fp32 are at least two
    apart; here they give any number from -1 to 1.
    """
    if not FAST:  # no fused multiply-add
        return tl.cos(x) if QUARTERS == 1 else tl.sin(x)
    whole = tl.floor(x * 0.636619772 + 0.5)
    # A quarter turn in three parts (Cody & Waite 1980), and once more, since ``whole`` may be off by one.
    r = tl.fma(whole, -5.39030253e-15, tl.fma(whole, -3.13916473e-7, tl.fma(whole, -1.57079601, x)))
    more = tl.floor(r * 0.636619772 + 0.5)
    r = tl.fma(more, -1.57079633, r)
    r = tl.clamp(r, -0.7854, 0.7854, propagate_nan=tl.PropagateNan.ALL)
    quadrant = whole.to(tl.int32) + more.to(tl.int32) + QUARTERS
    square = r * r
    sine = r + r * square * (-1.66666546e-1 + square * (8.33216087e-3 - 1.95152959e-4 * square))
    cosine = 4.16666457e-2 + square * (-1.38873163e-3 + 2.44331571e-5 * square)
    cosine = 1.0 + square * (-0.5 + square * cosine)
    value = tl.where(quadrant % 2 == 0, sine, cosine)
    return tl.where((quadrant & 2) == 0, value, -value)


@triton.jit
def _exponential_less_one(x):
    """Computes e^x - 1 of x <= 0."""
    return tl.exp(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)) - 1.0


@triton.jit
def function(
    x,
    NAME: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """Computes a function of parameters P and Q; LogSigmoid and Softplus are in units of ln 2 (see above)."""
    if NAME == "LogSigmoid":
        return tl.minimum(x, 0.0) - _softplus2(x, TRANSPOSED, PRECISION, FAST)
    elif NAME == "Softplus":
        return tl.maximum(x, 0.0) + _softplus2(x, TRANSPOSED, PRECISION, FAST)
    elif NAME == "SiLU":
        return x * _sigmoid(x)
    elif NAME == "ReLU":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "LeakyReLU":
        return tl.where(x > 0, x, P * x)
    elif NAME == "ELU":
        return tl.where(x > 0, x, P * _exponential_less_one(x))
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
        return _sine(x, 0, FAST)
    elif NAME == "cos":
        return _sine(x, 1, FAST)
    elif NAME == "affine":
        return P * x + Q
    elif NAME == "clamp":
        return tl.clamp(x, P, Q, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "exp":
        return tl.exp(x)
    elif NAME == "sqrt":
        return tl.sqrt_rn(x)
    elif NAME == "rsqrt":
        return tl.rsqrt(x)
    elif NAME == "reciprocal":
        return 1.0 / x
    elif NAME == "abs":
        return tl.abs(x)
    elif NAME == "erf":
        return tl.erf(x)
    else:
        tl.static_assert(NAME == "Identity", "a function that is not one of FUNCTIONS")
        return x


@triton.jit
def combined(a, b, NAME: tl.constexpr):
    """Adds, subtracts, multiplies or divides."""
    if NAME == "add":
        return a + b
    elif NAME == "subtract":
        return a - b
    elif NAME == "multiply":
        return a * b
    else:
        tl.static_assert(NAME == "divide", "not one of four operations")
        return a / b
