"""Keys of samples (the twin of ``fastsde.noise.sample_keys``): the words of block ``first + i`` under the seed.

The result is contiguous int64 ``[n, 2]``, the bits of ``(w0 | w1 << 32, w2 | w3 << 32)``. It is exact, since all
arithmetic is on integers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .philox import philox
from .tile import WARPS, on_device

BLOCK = 128  # one key per thread, stored as 128 bits


@triton.jit
def _pair(low, high):
    """Packs two uint32 words into one int64."""
    return (low.to(tl.uint64) | high.to(tl.uint64) << 32).to(tl.int64, bitcast=True)


@triton.jit(do_not_specialize=["seed", "first", "n"])
def sample_keys_kernel(out_ptr, seed: tl.int64, first: tl.int64, n: tl.int64, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # Added to a tensor: the interpreter keeps an int from 2^31 to 2^32 in 32 bits, which `philox` cannot shift by 32.
    w0, w1, w2, w3 = philox(tl.zeros_like(sample) + seed, first + sample)
    keys = tl.join(_pair(w0, w1), _pair(w2, w3))
    tl.store(out_ptr + 2 * sample[:, None] + tl.arange(0, 2)[None, :], keys, mask=(sample < n)[:, None])


def sample_keys(seed: int, first: int, out: Tensor) -> None:
    """Writes the keys of samples ``first``, ``first + 1``, ... to ``out``, int64 ``[n, 2]``.

    Args:
        seed, first: uint64 values, passed as the int64 with the same bits.
    """
    n = len(out)
    if not n:
        return
    with on_device(out):
        sample_keys_kernel[(triton.cdiv(n, BLOCK),)](out, seed, first, n, BLOCK=BLOCK, num_warps=WARPS)
