"""The noise contract: exact integers against an independent Philox; normals and uniforms checked in three ways."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsde import noise

SHAPES = [(), (0,), (1,), (3,), (4,), (5, 0, 2), (63,), (1000,), (3, 5, 7), (2**16 + 17,)]
BOUNDARY_OFFSETS = [0, 1, 2**31, 2**32 - 2, 2**63 - 2, 2**63, 2**64 - 1]

# Examples are fixed, so that every run of the suite has the same result.
contract = settings(max_examples=60, deadline=None, derandomize=True, database=None)
uint64 = st.integers(0, 2**64 - 1)


def signed(value):
    """Returns the int64 with the bits of ``value`` mod 2^64."""
    return int(np.uint64(value % 2**64).astype(np.int64))


def keys_of(*pairs):
    """Returns int64 keys from (seed, offset) pairs of any size."""
    return torch.tensor([[signed(seed), signed(offset)] for seed, offset in pairs]).reshape(-1, 2)


def unsigned(key):
    """Returns a key tensor ``[2]`` as a pair of ints in [0, 2^64)."""
    return tuple(int(word) % 2**64 for word in key)


def philox4x32_10(counter, key):
    """Computes Philox4x32-10 on Python ints, written from Salmon et al. 2011: the oracle of this file."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def oracle_block(seed, counter):
    counter %= 2**64
    return philox4x32_10((counter % 2**32, counter >> 32, 0, 0), (seed % 2**32, seed >> 32))


def oracle_fold_in(key, data):
    w0, w1, w2, w3 = oracle_block(key[0], key[1] + data)
    return w0 | w1 << 32, w2 | w3 << 32


def oracle_words(key, step, count, stream=0):
    offset = key[1] + (((stream << 28) | step) << 32)
    return [oracle_block(key[0], offset + e // 4)[e % 4] for e in range(count)]


# The oracle and the published values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_oracle_reproduces_random123_known_answers(counter, key, expected):
    assert philox4x32_10(counter, key) == expected


def test_bits_reproduce_the_random123_known_answer_that_the_contract_can_express():
    # The other two known answers need upper counter words, which the contract fixes at 0; they check the oracle.
    words = noise.bits(keys_of((0, 0)), 0, (4,))
    assert words.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


def test_fold_in_check_value():
    assert unsigned(noise.fold_in((5, 3), 7)) == (8577652901371288392, 16897885218225170953)


@pytest.mark.parametrize(
    ("sample", "step", "expected"),
    [
        (0, 0, [0.061111, 0.278528, 1.07155, -0.384063, -0.706985, -0.260079]),
        (3, 1, [-1.43479, -1.968736, 0.687393, -0.509065, -0.083482, -0.968692]),
    ],
)
def test_normal_check_values(sample, step, expected):
    drawn = noise.normal(noise.sample_keys(0, 1, sample), step, (6,))[0].tolist()
    assert drawn == pytest.approx(expected, rel=0, abs=5e-7 + 4e-6)  # printed to six decimals; libm may differ by 4e-6


def test_uniform_check_values():
    drawn = noise.uniform(noise.sample_keys(7, 1, 11), 5, (4,), stream=2)[0].tolist()
    expected = [0.18639708, 0.38450921, 0.96823055, 0.83025849]
    assert drawn == pytest.approx(expected, rel=0, abs=5e-9)  # printed to eight decimals


# Exact integers --------------------------------------------------------------------------------------------------


@contract
@given(seed=uint64, offset=uint64, data=uint64)
def test_fold_in_equals_the_oracle(seed, offset, data):
    expected = oracle_fold_in((seed, offset), data)
    assert unsigned(noise.fold_in((seed, offset), data)) == expected
    assert unsigned(noise.fold_in(keys_of((seed, offset))[0], torch.tensor(signed(data)))) == expected


@contract
@given(
    seed=uint64,
    offset=uint64,
    step=st.integers(0, 2**28 - 1),
    stream=st.integers(0, 15),
    count=st.integers(0, 23),
)
def test_bits_equal_the_oracle(seed, offset, step, stream, count):
    drawn = noise.bits(keys_of((seed, offset)), step, (count,), stream)
    assert drawn[0].tolist() == oracle_words((seed, offset), step, count, stream)


@contract
@given(seed=uint64, first=uint64, n=st.integers(0, 5))
def test_sample_keys_equal_the_oracle(seed, first, n):
    keys = noise.sample_keys(seed, n, first)
    assert keys.shape == (n, 2)
    assert [unsigned(key) for key in keys] == [oracle_fold_in((seed, 0), (first + i) % 2**64) for i in range(n)]


@pytest.mark.parametrize("offset", BOUNDARY_OFFSETS)
@pytest.mark.parametrize(("step", "stream"), [(0, 0), (2**28 - 1, 15), (1, 8)])
def test_offsets_wrap_at_two_to_the_64(offset, step, stream):
    # 24 elements cross every boundary above: of int32, uint32, int64 and uint64.
    drawn = noise.bits(keys_of((12345, offset)), step, (24,), stream)
    assert drawn[0].tolist() == oracle_words((12345, offset), step, 24, stream)


def test_block_sums_wrap_to_offset_zero():
    wrapped = noise.bits(keys_of((9, 2**64 - 2)), 0, (16,))[0]
    assert torch.equal(wrapped[8:], noise.bits(keys_of((9, 0)), 0, (8,))[0])


@pytest.mark.parametrize("seed", [2**63 - 1, 2**63, 2**64 - 1])
def test_seeds_of_63_bits_and_more(seed):
    keys = noise.sample_keys(seed, 3)
    assert keys.dtype == torch.int64
    assert [unsigned(key) for key in keys] == [oracle_fold_in((seed, 0), i) for i in range(3)]
    assert noise.bits(keys_of((seed, 0)), 0, (5,))[0].tolist() == oracle_words((seed, 0), 0, 5)


@pytest.mark.parametrize("first", [2**63 - 2, 2**64 - 2])
def test_sample_indices_wrap_at_two_to_the_64(first):
    keys = noise.sample_keys(1, 4, first)
    assert [unsigned(key) for key in keys] == [oracle_fold_in((1, 0), (first + i) % 2**64) for i in range(4)]


def test_fold_in_broadcasts_keys_and_data():
    keys, data = keys_of((1, 2), (3, 4), (5, 6)), torch.tensor([[7], [8]])
    folded = noise.fold_in(keys, data)
    assert folded.shape == (2, 3, 2)
    for i, j in np.ndindex(2, 3):
        assert unsigned(folded[i, j]) == oracle_fold_in(unsigned(keys[j]), int(data[i, 0]))


# The transforms --------------------------------------------------------------------------------------------------


def test_uniform_is_the_low_24_bits_of_each_word():
    keys = noise.sample_keys(3, 2)
    expected = (noise.bits(keys, 9, (1001,)).numpy() & 0xFFFFFF) * 2.0**-24
    drawn = noise.uniform(keys, 9, (1001,))
    assert drawn.dtype == torch.float32
    assert np.array_equal(drawn.numpy().astype(np.float64), expected)


def box_muller(radius_word, angle_word):
    """Returns both lanes of a transform: u and v rounded to fp32 as in the contract, the rest in float64."""
    u, v = (
        np.float32(np.float32(np.float32(word) * np.float32(2.0**-32)) + np.float32(2.0**-33))
        for word in (radius_word, angle_word)
    )
    radius, angle = math.sqrt(-2 * math.log(u)), 2 * math.pi * float(v)
    return radius * math.cos(angle), radius * math.sin(angle)


def test_normal_is_box_muller_of_word_pairs():
    keys = noise.sample_keys(11, 3)
    words = noise.bits(keys, 2, (400,)).reshape(-1, 2).tolist()
    expected = np.array([box_muller(*pair) for pair in words]).reshape(3, 400)
    # One rounding to fp32 (half an ulp, 2^-24 relative); 1e-14 is the float64 error of r cos and r sin.
    np.testing.assert_allclose(noise.normal(keys, 2, (400,)).double().numpy(), expected, rtol=2**-24, atol=1e-14)


@pytest.mark.parametrize(("radius_word", "largest"), [(0, math.sqrt(66 * math.log(2))), (0xFFFFFFFF, 0.0)])
@pytest.mark.parametrize("angle_word", [0, 2**30, 2**31, 0xFFFFFFFF])
def test_normal_is_finite_for_the_extreme_words(monkeypatch, radius_word, largest, angle_word):
    # u is 2^-33 for word 0, so r stays finite, and rounds to 1 for the last word, so r is 0 and not NaN.
    words = [torch.tensor([[word]]) for word in (radius_word, angle_word) * 2]
    monkeypatch.setattr(noise, "_philox", lambda seed, counter: words)
    drawn = noise.normal(keys_of((0, 0)), 0, (4,))[0]
    assert torch.isfinite(drawn).all()
    assert float(drawn[:2].square().sum().sqrt()) == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("draw", [noise.bits, noise.uniform, noise.normal])
def test_draws_have_any_shape_and_count_elements_flat(draw, shape):
    keys, count = noise.sample_keys(4, 2), math.prod(shape)
    drawn = draw(keys, 3, shape)
    assert drawn.shape == (2, *shape)
    assert torch.equal(drawn.reshape(2, count), draw(keys, 3, (count,)))


@pytest.mark.parametrize("n", [0, 1])
def test_draws_of_no_sample_and_of_one(n):
    assert noise.normal(noise.sample_keys(0, n), 0, (3, 5)).shape == (n, 3, 5)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 63, 1000])
@pytest.mark.parametrize("draw", [noise.bits, noise.uniform, noise.normal])
def test_a_shorter_draw_is_a_prefix_of_a_longer_one(draw, count):
    keys = noise.sample_keys(8, 3)
    longer = draw(keys, 1, (2**16 + 17,))
    assert torch.equal(draw(keys, 1, (count,)), longer[:, :count])


@pytest.mark.parametrize("draw", [noise.bits, noise.uniform, noise.normal])
@pytest.mark.parametrize("stream", [0, 3, 15])
def test_steps_as_a_tensor_equal_each_single_step(draw, stream):
    keys, steps = noise.sample_keys(2, 3), [0, 1, 7, 2**28 - 1, 5, 5]
    drawn = draw(keys, torch.tensor(steps), (2, 3), stream)
    assert drawn.shape == (6, 3, 2, 3)
    for row, step in enumerate(steps):
        assert torch.equal(drawn[row], draw(keys, step, (2, 3), stream))


def test_no_steps_give_an_empty_draw():
    assert noise.normal(noise.sample_keys(0, 2), torch.zeros(0, dtype=torch.int64), (3,)).shape == (0, 2, 3)


@contract
@given(seed=uint64, n=st.integers(1, 6), data=st.data(), step=st.integers(0, 1000))
def test_sample_i_of_a_batch_equals_the_sample_drawn_alone(seed, n, data, step):
    i = data.draw(st.integers(0, n - 1))
    alone = noise.normal(noise.sample_keys(seed, 1, first_sample=i), step, (7,))
    assert torch.equal(noise.normal(noise.sample_keys(seed, n), step, (7,))[i], alone[0])


def test_streams_steps_and_samples_share_no_block():
    # 16 streams x 3 steps x 20 samples x 10 blocks: if any two draws overlapped, some 128-bit block would repeat.
    # Two of 9600 blocks collide by chance with probability 1e-31.
    keys, steps = noise.sample_keys(0, 20), torch.tensor([0, 1, 2])
    blocks = torch.cat([noise.bits(keys, steps, (40,), stream).reshape(-1, 4) for stream in range(16)])
    assert len(blocks) == 9600
    assert len(torch.unique(blocks, dim=0)) == len(blocks)


def test_streams_are_uncorrelated():
    count = 40_000
    keys = noise.sample_keys(1, 1)
    drawn = torch.cat([noise.normal(keys, 0, (count,), stream) for stream in range(4)]).double()
    correlation = torch.corrcoef(drawn) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(count)  # five standard errors of a correlation; the seed is fixed


def test_named_streams_are_those_of_the_contract():
    streams = (noise.STREAM_SAMPLING, noise.STREAM_TRAINING_NOISE, noise.STREAM_TRAINING_TIME, noise.STREAM_DATA_ORDER)
    assert streams == (0, 1, 2, 3)
    keys = noise.sample_keys(0, 2)
    assert torch.equal(noise.normal(keys, 4, (5,)), noise.normal(keys, 4, (5,), noise.STREAM_SAMPLING))


@pytest.mark.parametrize("layout", ["one sample", "many samples", "many steps"])
@pytest.mark.parametrize(("draw", "law"), [(noise.normal, "norm"), (noise.uniform, "uniform")])
def test_draws_follow_their_law(draw, law, layout):
    drawn = {
        "one sample": lambda: draw(noise.sample_keys(0, 1), 0, (2**17,)),
        "many samples": lambda: draw(noise.sample_keys(0, 2**15), 0, (4,)),
        "many steps": lambda: draw(noise.sample_keys(0, 1), torch.arange(2**15), (4,)),
    }[layout]()
    # 2^17 points detect a deviation of 0.005 in the distribution function; the seed is fixed, and so is the result.
    assert scipy.stats.kstest(drawn.flatten().double().numpy(), law).pvalue > 1e-3


def test_normal_lanes_are_uncorrelated_with_their_neighbours():
    drawn = noise.normal(noise.sample_keys(0, 10_000), 0, (8,)).double()
    for values in (drawn, drawn.square()):
        correlation = torch.corrcoef(values.T) - torch.eye(8)
        assert correlation.abs().max() < 5 / math.sqrt(10_000)  # five standard errors


# PyTorch's own stateless generator -------------------------------------------------------------------------------


@pytest.fixture
def torch_random():
    return pytest.importorskip("torch.func._random", reason="PyTorch's stateless generator came with torch 2.13")


TORCH_KEYS = [(0, 0), (5, 3), (2**63, 2**32 - 1), (2**64 - 1, 2**63 - 1), (17, 2**64 - 2)]


def test_fold_in_equals_torch(torch_random):
    keys = keys_of(*TORCH_KEYS)
    for data in (0, 7, 2**63 - 1, 2**63, 2**64 - 1):
        theirs = torch_random.fold_in(keys.view(torch.uint64), data).view(torch.int64)
        assert torch.equal(noise.fold_in(keys, torch.tensor(signed(data))), theirs)


@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (63,), (5, 3, 7), (2**16 + 17,)], ids=str)
@pytest.mark.parametrize(("step", "stream"), [(0, 0), (1, 0), (12345, 1), (2**28 - 1, 15)])
def test_draws_equal_torch(torch_random, shape, step, stream):
    keys = keys_of(*TORCH_KEYS)
    shifted = keys + torch.tensor([0, signed(((stream << 28) | step) << 32)])
    theirs = shifted.view(torch.uint64)[:, None]  # torch expects one more key axis than the output has
    count = math.prod(shape)
    uniform = torch_random.uniform(theirs, (len(keys), count)).reshape(-1, *shape)
    assert torch.equal(noise.uniform(keys, step, shape, stream), uniform)
    normal = torch_random.normal(theirs, (len(keys), count)).reshape(-1, *shape)
    # The contract's bound for two backends: torch transforms in fp32.
    torch.testing.assert_close(noise.normal(keys, step, shape, stream), normal, rtol=0, atol=4e-6)


# Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: noise.sample_keys(-1, 2), ValueError, r"seed must be in \[0, 2\^64\), got -1"),
        (lambda: noise.sample_keys(2**64, 2), ValueError, r"seed must be in"),
        (lambda: noise.sample_keys(1.5, 2), TypeError, "seed must be an int, got float"),
        (lambda: noise.sample_keys(True, 2), TypeError, "seed must be an int, got bool"),
        (lambda: noise.sample_keys(0, -1), ValueError, "n must be at least 0, got -1"),
        (lambda: noise.sample_keys(0, 2.0), TypeError, "n must be an int, got float"),
        (lambda: noise.sample_keys(0, 2, -1), ValueError, "first_sample must be in"),
        (lambda: noise.sample_keys(0, 2, 2**64), ValueError, "first_sample must be in"),
        (lambda: noise.sample_keys(0, 2, "3"), TypeError, "first_sample must be an int, got str"),
        (lambda: noise.fold_in((0, 2**64), 1), ValueError, "offset must be in"),
        (lambda: noise.fold_in((0, -1), 1), ValueError, "offset must be in"),
        (lambda: noise.fold_in((0, 0), -1), ValueError, "data must be in"),
        (lambda: noise.fold_in((0, 0), 2**64), ValueError, "data must be in"),
        (lambda: noise.fold_in((0, 0), 1.0), TypeError, "data must be an int, got float"),
    ],
)
def test_bad_seeds_and_indices_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("draw", [noise.bits, noise.uniform, noise.normal])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keys": [[0, 0]]}, TypeError, "keys must be a tensor, got list"),
        ({"keys": torch.zeros(2, 2)}, TypeError, "keys must be int64 .*, got torch.float32"),
        ({"keys": torch.zeros(2, dtype=torch.int64)}, ValueError, r"keys must have shape \[n, 2\], got \[2\]"),
        ({"keys": torch.zeros(4, 3, dtype=torch.int64)}, ValueError, r"keys must have shape \[n, 2\], got \[4, 3\]"),
        ({"step": -1}, ValueError, r"step must be in \[0, 2\^28\), got -1"),
        ({"step": 2**28}, ValueError, "step must be in"),
        ({"step": 1.0}, TypeError, "step must be an int, got float"),
        ({"step": True}, TypeError, "step must be an int, got bool"),
        ({"step": torch.tensor(3)}, ValueError, r"step must be .*, got torch.int64 \[\]"),
        ({"step": torch.tensor([3.0])}, ValueError, r"step must be .*, got torch.float32 \[1\]"),
        ({"stream": -1}, ValueError, r"stream must be in \[0, 16\), got -1"),
        ({"stream": 16}, ValueError, "stream must be in"),
    ],
)
def test_bad_arguments_of_a_draw_are_named(draw, arguments, error, message):
    good = {"keys": noise.sample_keys(0, 2), "step": 0, "shape": (3,), "stream": 0}
    with pytest.raises(error, match=message):
        draw(**{**good, **arguments})
