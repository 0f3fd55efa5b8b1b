"""The noise contract inside a kernel: integers are exact, normals to 4e-6."""

from __future__ import annotations

import math

import pytest
import torch
from interpreted import jit
from torch import Tensor

from fastsde import noise

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
philox = pytest.importorskip("fastsde.kernels.philox")
tile = pytest.importorskip("fastsde.kernels.tile")


@pytest.fixture
def device(triton_device: torch.device) -> torch.device:
    return triton_device


BLOCKS = 8
LAST_STEP = 2**28 - 1
# (seed, offset): zeros, all bits, a carry from the low word of a counter to the high one, a wrap at 2^64, sign bits.
KEYS = (
    (0, 0),
    (2**64 - 1, 2**64 - 1),
    (5, 2**32 - 3),
    (2**32, 2**64 - 2**32 - 3),
    (2**63, 2**63 - 4),
    (2**32 - 1, 2**64 - 5),
)


@jit(do_not_specialize=["step"])
def _draw_kernel(
    keys_ptr,
    words_ptr,
    normal_ptr,
    uniform_ptr,
    step: tl.int64,
    STREAM: tl.constexpr,  # noqa: N803
    S: tl.constexpr,  # noqa: N803
    P: tl.constexpr,  # noqa: N803
    FAST: tl.constexpr,  # noqa: N803
):
    sample = tl.arange(0, S)
    seed = tl.load(keys_ptr + 2 * sample)
    first = tl.load(keys_ptr + 2 * sample + 1) + philox.draw_offset(step, STREAM)
    tl.store(uniform_ptr + sample, philox.uniform(seed, first))
    counter = first[:, None] + tl.arange(0, P)[None, :]
    block = sample[:, None] * P + tl.arange(0, P)[None, :]
    w0, w1, w2, w3 = philox.philox(seed[:, None], counter)
    tl.store(words_ptr + 4 * block, w0.to(tl.int64))
    tl.store(words_ptr + 4 * block + 1, w1.to(tl.int64))
    tl.store(words_ptr + 4 * block + 2, w2.to(tl.int64))
    tl.store(words_ptr + 4 * block + 3, w3.to(tl.int64))
    element = sample[:, None] * (4 * P) + tl.arange(0, 4 * P)[None, :]
    tl.store(normal_ptr + element, philox.normal(seed[:, None], counter, FAST))


@jit()
def _pair_kernel(radius_ptr, angle_ptr, even_ptr, odd_ptr, N: tl.constexpr, FAST: tl.constexpr):  # noqa: N803
    i = tl.arange(0, N)
    radius, angle = tl.load(radius_ptr + i).to(tl.uint32), tl.load(angle_ptr + i).to(tl.uint32)
    if FAST:
        even, odd = philox._pair_fast(radius, angle)
    else:
        even, odd = philox._pair_portable(radius, angle)
    tl.store(even_ptr + i, even)
    tl.store(odd_ptr + i, odd)


def _int64(pairs: tuple[tuple[int, int], ...]) -> Tensor:
    return torch.tensor([[noise.int64_bits("key", word) for word in pair] for pair in pairs])


@pytest.mark.parametrize("stream", [0, 1, 2, 3, 15])
@pytest.mark.parametrize("step", [0, 1, 16, LAST_STEP])
def test_a_draw_is_that_of_the_contract(device: torch.device, step: int, stream: int) -> None:
    low, high = -(2**63), 2**63 - 1
    keys = torch.cat([_int64(KEYS), torch.randint(low, high, (16 - len(KEYS), 2))]).to(device)
    words = torch.full((len(keys), 4 * BLOCKS), -1, device=device)
    normals = torch.full(words.shape, torch.nan, device=device)
    uniforms = torch.full((len(keys),), torch.nan, device=device)
    arguments = {"STREAM": stream, "S": len(keys), "P": BLOCKS, "FAST": tile.fast_math(keys)}
    _draw_kernel[(1,)](keys, words, normals, uniforms, step, **arguments)
    keys = keys.cpu()
    assert torch.equal(words.cpu(), noise.bits(keys, step, (4 * BLOCKS,), stream))
    assert torch.equal(uniforms.cpu(), noise.uniform(keys, step, (), stream))
    expected = noise.normal(keys, step, (4 * BLOCKS,), stream)
    torch.testing.assert_close(normals.cpu(), expected, rtol=0, atol=4e-6)


def _box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """The contract in float64, from the fp32 u and v that it fixes."""
    u, v = (word.float().mul(2.0**-32).add(2.0**-33).double() for word in (radius, angle))
    r = (-2 * u.log()).sqrt()
    return r * (2 * math.pi * v).cos(), r * (2 * math.pi * v).sin()


def test_box_muller_holds_at_extreme_words(device: torch.device) -> None:
    # u is smallest for word 0, exactly 1 for the largest; for 1 - u from 2^-24 to 2^-6 a logarithm loses digits.
    near_one = [2**32 - 2**k + shift for k in range(27) for shift in (-1, 0, 1) if 2**32 - 2**k + shift < 2**32]
    quarters = [k * 2**29 + shift for k in range(8) for shift in (-129, -1, 0, 1, 129) if k * 2**29 + shift >= 0]
    extreme = torch.tensor([*range(64), 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, *near_one])
    radius, angle = torch.cartesian_prod(extreme, torch.tensor([0, 1, 2**32 - 1, *quarters])).unbind(1)
    n = triton.next_power_of_2(len(radius))
    # The rest are random words, which cover every exponent of u.
    fill = torch.randint(0, 2**32, (2, n - len(radius)))
    fill[0, ::2] = 2**32 - 1 - (fill[0, ::2] >> torch.randint(0, 32, fill[0, ::2].shape))
    radius, angle = torch.cat([radius, fill[0]]), torch.cat([angle, fill[1]])
    even, odd = (torch.full((n,), torch.nan, device=device) for _ in range(2))
    _pair_kernel[(1,)](radius.to(device), angle.to(device), even, odd, N=n, FAST=tile.fast_math(even))
    for ours, theirs in zip((even, odd), _box_muller(radius, angle), strict=True):
        error = (ours.cpu().double() - theirs).abs()
        worst = int(error.nan_to_num(nan=math.inf).argmax())
        assert error[worst] <= 4e-6, (radius[worst], angle[worst], ours[worst], theirs[worst])
