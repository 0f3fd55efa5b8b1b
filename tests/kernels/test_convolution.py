"""The convolution kernel against float64, within the rounding of its products and sums."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from convolution_cases import (
    EPS,
    NAN,
    PRODUCT,
    ROUNDING,
    Case,
    Recorder,
    activation,
    assert_fits,
    assert_rounded,
    assert_within,
    images,
    on_meta,
    sum_error,
)
from torch import Tensor

kernel = pytest.importorskip("fastsde.kernels.convolution")
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def device(triton_device: torch.device) -> torch.device:
    return triton_device


HALF, BRAIN = torch.float16, torch.bfloat16
CASES = [
    Case((1, 1, 1, 1), 1),
    Case((1, 16, 1, 1), 32, size=(1, 1)),
    Case((2, 16, 1, 1), 16, HALF, size=(2, 2), after=16),
    Case((2, 3, 3, 5), 63, after=1),
    Case((3, 32, 4, 6), 16, BRAIN, before=16),
    Case((2, 17, 1, 9), 40, HALF, before=3, after=2),
    Case((1, 300, 2, 3), 40, fp32="tf32"),
    Case((1, 70, 3, 3), 300, BRAIN),
    Case((2, 17, 2, 3), 3, size=(4, 6), fp32="tf32", after=3),
    Case((2, 63, 3, 2), 17, BRAIN, size=(6, 3), after=17),
    Case((1, 32, 4, 4), 16, size=(7, 8), after=16),
    Case((3, 3, 2, 4), 63, HALF, size=(3, 7)),
    Case((5, 2, 4, 5), 3, before=2),  # several tiles
    Case((7, 3, 1, 14), 2, BRAIN, size=(2, 27)),
    Case((1, 1, 1, 1), 1, film=True),
    Case((4, 3, 3, 5), 63, after=1, film=True),
    Case((5, 17, 2, 3), 33, BRAIN, size=(3, 6), before=3, film=True),
    Case((3, 16, 4, 3), 18, size=(8, 5), fp32="tf32", film=True),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            Case((2, 128, 7, 7), 64, BRAIN, size=(14, 14), after=64),
            Case((3, 64, 4, 4), 64, fp32="tf32", size=(7, 7), after=64),
            Case((2, 64, 12, 9), 32, HALF),
            Case((1, 300, 5, 1), 300, size=(9, 2)),
            Case((150, 1, 2, 1), 1),
            Case((1, 1, 9, 31), 2, BRAIN, size=(18, 61)),
            Case((3, 32, 4, 6), 16, BRAIN, before=16, film=True),
            Case((150, 1, 2, 1), 1, film=True),
            Case((3, 40, 3, 1), 70, size=(5, 2), film=True),
        )
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_convolution_bias_and_activation_and_touches_nothing_else(
    device: torch.device, case: Case, tile: str
) -> None:
    inputs = case.inputs(device)
    whole, out, written = case.output(device)
    given = {"first": case.before, "transposed": case.size is not None, "precision": case.precision}
    kernel.convolution(**inputs, out=out, **given)
    assert_within(written, *activation(*case.truth(inputs), out, case.precision))
    assert_rounded(written, case.precision)
    written.fill_(NAN)
    assert whole.isnan().all()


HEADS = [
    (Case((1, 1, 1, 1), 1), 1),
    (Case((2, 17, 3, 5), 20, fp32="tf32"), 2),
    (Case((3, 32, 4, 6), 32, BRAIN), 1),
    (Case((1, 3, 2, 3), 63, HALF), 4),
    (Case((5, 2, 4, 5), 64), 3),
    (Case((3, 2, 3, 5), 33, film=True), 2),
    *(
        pytest.param(*head, marks=pytest.mark.slow)
        for head in (
            (Case((2, 64, 12, 9), 32), 1),
            (Case((2, 64, 9, 12), 64, BRAIN), 4),
            (Case((3, 32, 9, 12), 64, BRAIN, film=True), 3),
        )
    ),
]


@pytest.mark.parametrize(("case", "channels"), HEADS, ids=str)
def test_products_with_the_last_layer_take_the_place_of_the_output(
    device: torch.device, case: Case, channels: int, tile: str
) -> None:
    inputs = case.inputs(device)
    head = images(case.factor(torch.randn(9 * channels, case.out, 1, 1)), device, case.dtype)[..., 0, 0]
    batch, _, height, width = case.shape
    whole = torch.full((9 * channels + 2, batch, height, width), NAN, device=device)
    products = whole[1:-1]
    kernel.convolution(**inputs, out=None, head=head, products=products, precision=case.precision)
    a, error = activation(*case.truth(inputs), inputs["x"], case.precision)
    wide = head.double()
    expected, size = (torch.einsum("pc, bchw -> pbhw", *each) for each in ((wide, a), (wide.abs(), a.abs() + error)))
    bound = torch.einsum("pc, bchw -> pbhw", wide.abs(), error)
    assert_within(products, expected, bound + sum_error(case.out, head, case.precision) * size)
    products.fill_(NAN)
    assert whole.isnan().all()


@pytest.mark.parametrize("precision", PRODUCT)
@pytest.mark.parametrize("size", [None, (1, 1)], ids=["plain", "transposed"])
def test_single_products_are_as_exact_as_the_precision(
    device: torch.device, precision: str, size: tuple[int, int] | None
) -> None:
    # Large negative products, which the log sigmoid keeps.
    case = Case((40, 1, 1, 1), 16, fp32=precision, size=size)
    inputs = case.inputs(device)
    inputs["x"].copy_(case.factor(-64 * (1 + torch.rand(case.shape))))
    inputs["weight"].copy_(case.factor(1 + torch.rand(16, 3, 3, 1)))
    _, out, _ = case.output(device)
    kernel.convolution(**inputs, out=out, precision=precision, transposed=size is not None)
    v, _ = case.truth(inputs)
    product = PRODUCT[precision] if out.is_cuda else EPS
    assert_within(out, *activation(v, (product + EPS) * v.abs(), out, precision))


def _of_one(v: Tensor, precision: str = "tf32x3", dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the kernel's log sigmoid of v, one image of one pixel for each, through a weight of one."""
    x = v.reshape(-1, 1, 1, 1).to(dtype)
    weight, bias = torch.zeros(1, 3, 3, 1, device=v.device, dtype=dtype), torch.zeros(1, device=v.device, dtype=dtype)
    weight[:, 1, 1] = 1
    out = torch.empty_like(x)
    kernel.convolution(x, weight, bias, out, precision=precision if dtype == torch.float32 else "narrow")
    return out.flatten()


def test_the_log_sigmoid_is_accurate_everywhere(device: torch.device) -> None:
    ends = [0.0, -0.0, 1e-30, -1e-30, 4.85, 4.86, 80.0, -80.0, 500.0, -500.0, 3e38, -3e38]
    v = torch.cat((torch.linspace(-30, 30, 1501), torch.linspace(-1e-3, 1e-3, 51), torch.tensor(ends))).to(device)
    if device.type == "cuda":  # 22 bits, two parts of 11, which tf32x3 keeps
        v = v.view(torch.int32).bitwise_and(~3).view(torch.float32)
    exact, ours = F.logsigmoid(v.double()), _of_one(v)
    error, u = (ours.double() - exact).abs(), torch.exp(-v.double().abs())
    assert (error <= 4e-7 + EPS * v.abs()).all()
    # Large v: the result is small, with the same relative accuracy.
    small = (u < 2.0**-7) & (v > 0)
    bound = (5e-7 + 2.0**-23.4 * v) * exact.abs() + 2.0**-126
    assert (error <= bound)[small].all()


@pytest.mark.parametrize("precision", PRODUCT)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by NumPy, in the interpreter
def test_infinity_and_nan_pass_through(device: torch.device, precision: str) -> None:
    inf = float("inf")
    v = torch.tensor([inf, -inf, NAN, 1.0], device=device)
    for dtype in ROUNDING:
        ours = _of_one(v, precision, dtype).float()
        torch.testing.assert_close(ours, F.logsigmoid(v), atol=2.0**-8, rtol=0.0, equal_nan=True)


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("size", [None, (10, 13)], ids=["plain", "transposed"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by NumPy, in the interpreter
def test_what_is_not_finite_reaches_its_neighbours_and_no_others(
    device: torch.device, size: tuple[int, int] | None, value: float, tile: str
) -> None:
    case = Case((2, 3, 5, 7), 4, size=size)
    inputs = case.inputs(device)
    inputs["x"][0, 1, 0, 6] = inputs["x"][1, 2, 2, 3] = inputs["x"][1, 0, 4, 0] = value
    _, out, _ = case.output(device)
    kernel.convolution(**inputs, out=out, transposed=size is not None, precision=case.precision)
    exact = F.logsigmoid(case.truth(inputs)[0])
    assert not exact.isfinite().all()
    torch.testing.assert_close(out.double(), exact, atol=1e-4, rtol=0, equal_nan=True)


@pytest.mark.parametrize("size", [None, (8, 8)], ids=["plain", "transposed"])
def test_no_images_have_no_result(device: torch.device, size: tuple[int, int] | None) -> None:
    case = Case((0, 3, 4, 4), 2, size=size)
    given = {"transposed": size is not None, "precision": case.precision}
    kernel.convolution(**case.inputs(device), out=case.output(device)[1], **given)


@pytest.mark.parametrize("kind", ["plain", "transposed", "head"])
@pytest.mark.parametrize("channels", [(1, 1), (17, 63), (32, 64), (64, 32), (256, 256), (300, 1000)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (28, 28)], ids=str)
def test_programs_cover_any_batch_with_few_tiles(
    size: tuple[int, int], channels: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, tiles = Recorder(), set()
    monkeypatch.setattr(kernel, "convolution_kernel", launch)
    inner, outer = channels[0], min(channels[1], kernel.MAX_HEAD_CHANNELS) if kind == "head" else channels[1]
    for batch in (1, 2, 3, 30, 60, 1000, 2**29 // (size[0] * size[1])):
        scale = 2 if kind == "transposed" else 1
        x, weight = on_meta(batch, inner, *size), on_meta(outer, 3, 3, inner)
        if kind == "head":
            given = {"out": None, "head": on_meta(9, outer), "products": on_meta(9, batch, *size)}
        else:
            given = {"out": on_meta(batch, outer, scale * size[0], scale * size[1])}
        given |= {"transposed": kind == "transposed", "precision": "narrow"}
        kernel.convolution(x, weight, on_meta(outer), **given)
        tiles.add(tuple(launch.tile.values()))
        programs, blocks, kinds = launch.grid
        pixels, inside = batch * size[0] * size[1], launch.tile["PIXELS"] - 2  # the first and last serve the others
        assert (programs - 1) * inside < pixels <= programs * inside
        assert programs * launch.tile["PIXELS"] < 2**31
        assert (blocks - 1) * launch.tile["N"] < outer <= blocks * launch.tile["N"]
        assert blocks < 2**16
        assert blocks == 1 or kind != "head"
        assert kinds == (2 if kind == "transposed" else 1)
        assert min(launch.tile["N"], launch.tile["K"]) >= 16  # tensor cores
    assert len(tiles) <= (3 if outer == 32 else 2)


@pytest.mark.parametrize("pixels", [1, 10_000, 10**7])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_into_shared_memory(itemsize: int, pixels: int) -> None:
    for out, channels, kinds in product((1, 32, 64, 1000), (1, 64, 1000), (1, 2)):
        for whole in (False, True) if out <= kernel.MAX_HEAD_CHANNELS else (False,):
            assert_fits(kernel.launch_config(pixels, out, channels, itemsize, kinds, whole), 3, itemsize)
