"""The kernel of a convolution with pooling against float64, within the rounding of its products and sums."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from convolution_cases import (
    NAN,
    Case,
    Recorder,
    activation,
    assert_fits,
    assert_rounded,
    assert_within,
    on_meta,
    pool,
)

kernel = pytest.importorskip("fastsde.kernels.pooled_convolution")
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def device(triton_device: torch.device) -> torch.device:
    return triton_device


HALF, BRAIN = torch.float16, torch.bfloat16
CASES = [
    Case((1, 1, 1, 1), 1),
    Case((7, 17, 1, 1), 3, BRAIN, before=1),
    Case((2, 63, 5, 4), 17, fp32="tf32", before=8),
    Case((3, 32, 4, 6), 16, BRAIN, before=16),
    Case((2, 17, 1, 9), 40, HALF, before=3, after=2),
    Case((5, 2, 7, 5), 3, after=1),  # several tiles
    Case((5, 2, 7, 5), 3, before=1, film=True),
    Case((7, 17, 1, 1), 34, BRAIN, film=True),
    Case((2, 63, 5, 4), 17, fp32="tf32", film=True),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            Case((1, 16, 6, 1), 300, before=300),
            Case((1, 300, 2, 3), 40, fp32="tf32"),
            Case((5, 32, 14, 14), 64, BRAIN, before=64),
            Case((3, 64, 7, 7), 128, before=128),
            Case((70, 1, 2, 1), 1),
            Case((2, 130, 9, 5), 130, HALF),
            Case((3, 32, 5, 6), 130, BRAIN, before=2, film=True),
            Case((70, 1, 2, 1), 1, film=True),
        )
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_convolution_bias_activation_and_pool_and_touches_nothing_else(
    device: torch.device, case: Case, tile: str
) -> None:
    inputs = case.inputs(device)
    whole, out, written = case.output(device)
    pool_whole, pooled = case.pooled(device)
    kernel.pooled_convolution(**inputs, out=out, pooled=pooled, first=case.before, precision=case.precision)
    assert_within(written, *activation(*case.truth(inputs), out, case.precision))
    assert_rounded(written, case.precision)
    assert torch.equal(pooled, pool(written))
    for part, all_around in ((written, whole), (pooled, pool_whole)):
        part.fill_(NAN)
        assert all_around.isnan().all()


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by NumPy, in the interpreter
def test_what_is_not_finite_reaches_its_neighbours_and_no_others(device: torch.device, value: float, tile: str) -> None:
    case = Case((2, 3, 5, 7), 4)
    inputs = case.inputs(device)
    inputs["x"][0, 1, 0, 6] = inputs["x"][1, 2, 2, 3] = value
    out, pooled = case.output(device)[1], case.pooled(device)[1]
    kernel.pooled_convolution(**inputs, out=out, pooled=pooled, precision=case.precision)
    exact = F.logsigmoid(case.truth(inputs)[0])
    assert not exact.isfinite().all()
    torch.testing.assert_close(out.double(), exact, atol=1e-4, rtol=0, equal_nan=True)
    torch.testing.assert_close(pooled, pool(out), atol=0, rtol=0, equal_nan=True)


def test_pixels_beyond_the_image_are_smaller_than_any_in_the_pool(device: torch.device, tile: str) -> None:
    case = Case((2, 1, 3, 1), 2)
    inputs = case.inputs(device) | {"bias": torch.full((2,), -1e30, device=device)}
    out, pooled = case.output(device)[1], case.pooled(device)[1]
    kernel.pooled_convolution(**inputs, out=out, pooled=pooled, precision=case.precision)
    assert (pooled < -9e29).all()


def test_no_images_have_no_result(device: torch.device) -> None:
    case = Case((0, 3, 4, 4), 2)
    given = {"out": case.output(device)[1], "pooled": case.pooled(device)[1], "precision": case.precision}
    kernel.pooled_convolution(**case.inputs(device), **given)


@pytest.mark.parametrize("channels", [(1, 1), (17, 63), (32, 64), (256, 256), (300, 1000)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (28, 28)], ids=str)
def test_programs_cover_any_batch_with_two_tiles(
    size: tuple[int, int], channels: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, tiles, (inner, outer) = Recorder(), set(), channels
    monkeypatch.setattr(kernel, "pooled_convolution_kernel", launch)
    half = (size[0] + 1) // 2, (size[1] + 1) // 2
    for batch in (1, 2, 3, 60, 1000, 2**29 // (size[0] * size[1])):
        x, weight, bias = on_meta(batch, inner, *size), on_meta(outer, 3, 3, inner), on_meta(outer)
        to = {"out": on_meta(batch, outer, *size), "pooled": on_meta(batch, outer, *half), "precision": "narrow"}
        kernel.pooled_convolution(x, weight, bias, **to)
        tiles.add(tuple(launch.tile.values()))
        programs, blocks = launch.grid
        pixels, inside = 4 * batch * half[0] * half[1], launch.tile["PIXELS"]
        assert (programs - 1) * inside < pixels <= programs * inside
        assert (blocks - 1) * launch.tile["N"] < outer <= blocks * launch.tile["N"]
        assert programs * inside <= 2**31  # the last pixel is less
        assert blocks < 2**16
        assert inside % 4 == 0  # a window does not cross tiles
        assert min(launch.tile["N"], launch.tile["K"]) >= 16  # tensor cores
    assert len(tiles) <= 2


@pytest.mark.parametrize("pixels", [1, 10_000, 10**7])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_into_shared_memory(itemsize: int, pixels: int) -> None:
    for out, channels in product((1, 32, 64, 1000), (1, 64, 1000)):
        assert_fits(kernel.launch_config(pixels, out, channels, itemsize), 1, itemsize)
