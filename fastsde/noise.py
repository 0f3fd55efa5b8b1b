"""The noise contract: every random number is a pure function of (seed, sample, step, element).

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") under a key ``(seed, offset)`` of two
64-bit words, laid out as PyTorch's stateless generator lays it out, so that a sample depends neither on the device nor
on the batch it was drawn in:

- block j of a key: counter words ((offset + j) lo, (offset + j) hi, 0, 0), key words (seed lo, seed hi);
- the key of sample i is ``fold_in((seed, 0), i)``;
- a draw for step k in stream s adds ``((s << 28) | k) << 32`` to the offset; all sums wrap at 2^64;
- element e, the flat index within the sample, is lane ``e % 4`` of block ``e // 4``.

Keys are int64 tensors that hold the bits of uint64 values. Integers are exact everywhere; normals of different
backends agree to 4e-6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .validation import check_int, check_shape

__all__ = [
    "STREAM_DATA_ORDER",
    "STREAM_OTHER",
    "STREAM_SAMPLING",
    "STREAM_TRAINING_NOISE",
    "STREAM_TRAINING_TIME",
    "bits",
    "fold_in",
    "int64_bits",
    "normal",
    "sample_keys",
    "signs",
    "uniform",
]

STREAM_SAMPLING = 0
"""Sampling: step 0 is the draw from the prior, step k + 1 the noise of row k."""
STREAM_TRAINING_NOISE = 1
"""The noise of training; the step is the iteration."""
STREAM_TRAINING_TIME = 2
"""The times of training."""
STREAM_DATA_ORDER = 3
"""The positions in the data."""
STREAM_OTHER = 4
"""Anything else, such as dropped conditions, known values and drawn labels."""

_MASK32 = 0xFFFFFFFF
_ROUNDS = 10
# Multipliers and Weyl increments of Philox4x32 (Salmon et al. 2011, table 2 and section 3.3).
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85

_STEP_BITS, _STREAM_BITS = 28, 4


def int64_bits(name: str, value: object) -> int:
    """Returns the int64 with the bits of a value, which must be a uint64.

    Args:
        name: of the argument, for the error's message.
        value: an int in [0, 2^64).

    Raises:
        TypeError, ValueError: for anything else.
    """
    bits = check_int(name, value, 0, 2**64)
    return bits - 2**64 if bits >= 2**63 else bits  # torch.compile cannot take the remainder of a symbolic int


def _philox(seed: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the four Philox4x32-10 words, int64 tensors in [0, 2^32), of each 64-bit ``counter`` under ``seed``.

    ``seed`` and ``counter`` are int64 tensors that broadcast. Products of two 32-bit words wrap at 2^64 in int64 just
    as they do in uint64, so only the right shift needs a mask.
    """
    key_0, key_1 = seed & _MASK32, seed >> 32 & _MASK32
    word_0, word_1 = counter & _MASK32, counter >> 32 & _MASK32
    word_2, word_3 = torch.zeros_like(word_0), torch.zeros_like(word_0)
    for _ in range(_ROUNDS):
        product_0, product_1 = word_0 * _MULTIPLIER_0, word_2 * _MULTIPLIER_1
        word_0 = (product_1 >> 32).bitwise_and_(_MASK32).bitwise_xor_(word_1).bitwise_xor_(key_0)
        word_2 = (product_0 >> 32).bitwise_and_(_MASK32).bitwise_xor_(word_3).bitwise_xor_(key_1)
        word_1, word_3 = product_1.bitwise_and_(_MASK32), product_0.bitwise_and_(_MASK32)
        key_0, key_1 = key_0 + _WEYL_0 & _MASK32, key_1 + _WEYL_1 & _MASK32
    return word_0, word_1, word_2, word_3


def fold_in(key: Tensor | tuple[int, int], data: Tensor | int) -> Tensor:
    """Derives a new key: the words of block ``data`` of ``key``, as ``(w0 | w1 << 32, w2 | w3 << 32)``.

    Args:
        key: int64 ``[..., 2]``, or a pair of ints (seed, offset) in [0, 2^64).
        data: an int in [0, 2^64), or an int64 tensor that broadcasts over the batch of ``key``.

    Returns:
        int64 ``[..., 2]``.
    """
    if not isinstance(key, Tensor):
        if not isinstance(key, tuple) or len(key) != 2:
            raise TypeError(f"key must be a tensor or a pair (seed, offset), got {key!r}")
        seed, offset = key
        device = data.device if isinstance(data, Tensor) else "cpu"
        key = torch.tensor([int64_bits("seed", seed), int64_bits("offset", offset)], device=device)
    elif key.dtype != torch.int64 or key.ndim < 1 or key.shape[-1] != 2:
        raise ValueError(f"key must be int64 [..., 2] (the bits of uint64 values), got {key.dtype} {list(key.shape)}")
    if isinstance(data, Tensor) and data.dtype != torch.int64:
        raise TypeError(f"data must be an int or int64, got {data.dtype}")
    if not isinstance(data, Tensor):
        data = torch.tensor(int64_bits("data", data), device=key.device)
    word_0, word_1, word_2, word_3 = _philox(key[..., 0], key[..., 1] + data)
    return torch.stack((word_0 | word_1 << 32, word_2 | word_3 << 32), dim=-1)


def sample_keys(seed: int, n: int, first_sample: int = 0, *, device: torch.device | str = "cpu") -> Tensor:
    """Returns the keys of samples ``first_sample`` to ``first_sample + n - 1``: int64 ``[n, 2]``.

    Args:
        seed: an int in [0, 2^64).
        n: the number of samples, at least 0.
        first_sample: the global index of the first sample, in [0, 2^64).
        device: where the keys are created.
    """
    indices = torch.arange(check_int("n", n, 0), device=device) + int64_bits("first_sample", first_sample)
    return fold_in((seed, 0), indices)


def _check_keys(keys: Tensor) -> None:
    if not isinstance(keys, Tensor):
        raise TypeError(f"keys must be a tensor, got {type(keys).__name__}")
    if keys.dtype != torch.int64:
        raise TypeError(f"keys must be int64 (the bits of uint64 values), got {keys.dtype}")
    if keys.ndim != 2 or keys.shape[1] != 2:
        raise ValueError(f"keys must have shape [n, 2], got {list(keys.shape)}")


def _draw_offset(step: int | Tensor, stream: int, device: torch.device) -> int | Tensor:
    """Returns what a draw adds to the offset of its key: an int, or ``[R, 1, 1]`` for a tensor of R steps."""
    check_int("stream", stream, 0, 2**_STREAM_BITS)
    if isinstance(step, Tensor):
        if step.ndim != 1 or step.dtype != torch.int64:
            raise ValueError(f"step must be an int or an int64 tensor [R], got {step.dtype} {list(step.shape)}")
        return ((step.to(device) | stream << _STEP_BITS) << 32)[:, None, None]
    signed = stream - (1 << _STREAM_BITS) if stream >> (_STREAM_BITS - 1) else stream
    return ((signed << _STEP_BITS) + check_int("step", step, 0, 2**_STEP_BITS)) * (1 << 32)


def _blocks(keys: Tensor, step: int | Tensor, shape: Sequence[int], stream: int) -> tuple[Tensor, ...]:
    """Returns the four words of every block of a draw, each ``[n, blocks]``, or ``[R, n, blocks]`` for R steps."""
    _check_keys(keys)
    check_shape("shape", shape)
    block = torch.arange(-(-math.prod(shape) // 4), device=keys.device)
    counter = keys[:, 1, None] + block + _draw_offset(step, stream, keys.device)
    return _philox(keys[:, 0, None], counter)


def _elements(lanes: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Returns the elements of a draw from its four lanes ``[..., blocks]``: ``[..., *shape]``."""
    flat = torch.stack(tuple(lanes), dim=-1).flatten(-2)
    return flat[..., : math.prod(shape)].reshape(*flat.shape[:-1], *shape)


def bits(keys: Tensor, step: int | Tensor, shape: Sequence[int], stream: int = STREAM_SAMPLING) -> Tensor:
    """Draws raw 32-bit words, as int64 values in [0, 2^32).

    Arguments and shape are those of `normal`.
    """
    return _elements(_blocks(keys, step, shape, stream), shape)


def uniform(keys: Tensor, step: int | Tensor, shape: Sequence[int], stream: int = STREAM_SAMPLING) -> Tensor:
    """Draws fp32 uniforms on [0, 1), multiples of 2^-24.

    Arguments and shape are those of `normal`.
    """
    return (bits(keys, step, shape, stream) & 0xFFFFFF).float() * 2.0**-24


def signs(keys: Tensor, step: int | Tensor, shape: Sequence[int], stream: int = STREAM_SAMPLING) -> Tensor:
    """Draws fp32 signs, -1 or 1 (Rademacher), by the lowest bit of each word.

    Arguments and shape are those of `normal`.
    """
    return 1.0 - 2.0 * (bits(keys, step, shape, stream) & 1).float()


def normal(keys: Tensor, step: int | Tensor, shape: Sequence[int], stream: int = STREAM_SAMPLING) -> Tensor:
    """Draws fp32 standard normals by the Box-Muller transform.

    Args:
        keys: int64 ``[n, 2]``, one key per sample.
        step: the step in [0, 2^28), or an int64 tensor of R steps (not range-checked, to avoid a synchronisation).
        shape: the shape of one sample.
        stream: in [0, 16); 0 sampling, 1 training noise, 2 training time, 3 data order, 4 anything else.

    Returns:
        ``[n, *shape]``, or ``[R, n, *shape]`` for R steps, on the device of ``keys``.
    """
    words = _blocks(keys, step, shape, stream)
    lanes: list[Tensor] = []
    for radius_word, angle_word in (words[:2], words[2:]):
        # u and v are fp32 by contract: rounding them differently moves a normal near r = 0 by more than 4e-6.
        u = radius_word.float().mul_(2.0**-32).add_(2.0**-33)
        v = angle_word.float().mul_(2.0**-32).add_(2.0**-33)
        # The transform itself is rounded once, from float64: other implementations are compared with this value.
        radius = u.double().log_().mul_(-2.0).sqrt_()
        angle = v.double().mul_(2.0 * math.pi)
        lanes += [(radius * torch.cos(angle)).float(), (radius * torch.sin(angle)).float()]
    return _elements(lanes, shape)
