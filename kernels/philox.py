"""The noise contract on a tile: Philox4x32-10 and the Box-Muller transform (the twin of ``fastsde/noise.py``).

One Philox call gives the four words of a block, and four normals. A tile of blocks ``[S, P]`` becomes a tile of
elements ``[S, 4 P]`` whose last axis runs through the lanes of each block, so that a thread holds four neighbouring
elements and reads and writes 128 bits at once.

``FAST`` chooses the arithmetic of the transform: the special-function unit of an NVIDIA GPU (inline PTX), or portable
functions for the interpreter and other targets. Both agree with the reference to 4e-6.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)
_ROUNDS = tl.constexpr(10)

LN_2 = tl.constexpr(math.log(2))
TWO_PI = tl.constexpr(2 * math.pi)

STREAM_SAMPLING = tl.constexpr(0)
STREAM_TRAINING_NOISE = tl.constexpr(1)
STREAM_TRAINING_TIME = tl.constexpr(2)
STREAM_DATA_ORDER = tl.constexpr(3)


@triton.jit
def _round(w0, w1, w2, w3, k0, k1):
    p0 = w0.to(tl.uint64) * _MULTIPLIER_0
    p1 = w2.to(tl.uint64) * _MULTIPLIER_1
    w0 = (p1 >> 32).to(tl.uint32) ^ w1 ^ k0
    w2 = (p0 >> 32).to(tl.uint32) ^ w3 ^ k1
    return w0, p1.to(tl.uint32), w2, p0.to(tl.uint32)


@triton.jit
def philox(seed, counter):
    """Returns the four uint32 words of block ``counter`` (int64) under ``seed`` (int64); the two broadcast."""
    k0 = seed.to(tl.uint32)
    k1 = (seed.to(tl.uint64, bitcast=True) >> 32).to(tl.uint32)
    w0 = counter.to(tl.uint32)
    w1 = (counter.to(tl.uint64, bitcast=True) >> 32).to(tl.uint32)
    w2 = w0 * 0
    w3 = w2
    for _ in tl.static_range(_ROUNDS):
        w0, w1, w2, w3 = _round(w0, w1, w2, w3, k0, k1)
        k0 += _WEYL_0
        k1 += _WEYL_1
    return w0, w1, w2, w3


@triton.jit
def draw_offset(step, STREAM: tl.constexpr):
    """Returns what the draw of a step in a stream adds to the offset of a key."""
    return (step.to(tl.int64) + (STREAM << 28)) << 32


@triton.jit
def special(x, INSTRUCTION: tl.constexpr):
    return tl.inline_asm_elementwise(INSTRUCTION, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _pair_fast(radius_word, angle_word):
    u = radius_word.to(tl.float32) * 2.0**-32 + 2.0**-33
    # Near u = 1 the absolute error of the hardware's logarithm exceeds -ln u; the series in m is exact there.
    m = 1.0 - u
    square = tl.where(m < 2.0**-7, m * (2.0 + m), special(u, "lg2.approx.ftz.f32 $0, $1;") * (-2.0 * LN_2))
    r = special(square, "sqrt.approx.ftz.f32 $0, $1;")
    # The angle minus pi lies in [-pi, pi], where the hardware is most accurate; sine and cosine change sign.
    v = angle_word.to(tl.float32) * 2.0**-32 + 2.0**-33
    angle = (v - 0.5) * TWO_PI
    return -r * special(angle, "cos.approx.ftz.f32 $0, $1;"), -r * special(angle, "sin.approx.ftz.f32 $0, $1;")


@triton.jit
def _pair_portable(radius_word, angle_word):
    u = radius_word.to(tl.float32) * 2.0**-32 + 2.0**-33
    v = angle_word.to(tl.float32) * 2.0**-32 + 2.0**-33
    r = tl.sqrt(-2.0 * tl.log(u))
    angle = v * TWO_PI
    return r * tl.cos(angle), r * tl.sin(angle)


@triton.jit
def normal(seed, counter, FAST: tl.constexpr):
    """Draws the normals ``[S, 4 P]`` of blocks ``[S, P]``, with the lanes of a block next to each other."""
    w0, w1, w2, w3 = philox(seed, counter)
    if FAST:
        n0, n1 = _pair_fast(w0, w1)
        n2, n3 = _pair_fast(w2, w3)
    else:
        n0, n1 = _pair_portable(w0, w1)
        n2, n3 = _pair_portable(w2, w3)
    lanes = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    return tl.reshape(lanes, (counter.shape[0], counter.shape[1] * 4))


@triton.jit
def uniform(seed, counter):
    """Draws the first fp32 uniform of each block: multiples of 2^-24 on [0, 1)."""
    w0, _, _, _ = philox(seed, counter)
    return (w0 & 0xFFFFFF).to(tl.float32) * 2.0**-24


@triton.jit
def load_keys(keys_ptr, sample, exists):
    """Loads the seeds and offsets of samples from their keys, int64 ``[B, 2]``."""
    seed = tl.load(keys_ptr + 2 * sample, mask=exists, other=0)
    return seed, tl.load(keys_ptr + 2 * sample + 1, mask=exists, other=0)


@triton.jit
def tile_normal(keys_ptr, sample, exists, start, step, STREAM: tl.constexpr, P: tl.constexpr, FAST: tl.constexpr):
    """Draws the normals ``[S, 4 P]`` of a tile, from block ``start`` of each sample on."""
    seed, offset = load_keys(keys_ptr, sample, exists)
    first = offset + draw_offset(step, STREAM) + start
    return normal(seed[:, None], first[:, None] + tl.arange(0, P)[None, :], FAST)
