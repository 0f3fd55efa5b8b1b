"""The kernel of the U-Net's first convolution against float64, within the rounding of its products and sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolution_cases import (
    EPS,
    NAN,
    ROUNDING,
    Case,
    activation,
    assert_rounded,
    assert_within,
    modulated,
    pool,
    vector,
)
from torch import Tensor

kernel = pytest.importorskip("fastsde.kernels.stem_convolution")
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def device(triton_device: torch.device) -> torch.device:
    return triton_device


CASES = [
    Case((1, 1, 1, 1), 1),
    Case((2, 1, 6, 7), 32, before=32),
    Case((3, 3, 7, 4), 17, before=3, after=2),
    Case((2, 2, 1, 9), 63, after=1),
    Case((1, 4, 5, 2), 300, before=8),
    Case((3, 2, 3, 6), 33, before=3, film=True),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            Case((70, 1, 2, 1), 3),
            Case((70, 1, 2, 1), 3, film=True),
            Case((3, 1, 9, 8), 32, before=32, film=True),
            Case((3, 1, 28, 28), 32, before=32),
            Case((2, 3, 9, 16), 128, before=128),
        )
    ),
]


def _inputs(case: Case, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    batch, _, height, width = case.shape
    time = {
        "t": vector(torch.rand(batch, generator=generator), device, case.dtype),
        "plane": torch.randn(height, width, case.out, generator=generator).to(device),
    }
    return case.inputs(device) | time


def _truth(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the argument of the log sigmoid in float64, and the error allowed for it."""
    x, weight, bias, t, plane = (inputs[name].double() for name in ("x", "weight", "bias", "t", "plane"))
    weight = weight.permute(0, 3, 1, 2)
    time = t[:, None, None, None] * plane.permute(2, 0, 1)
    v = F.conv2d(x, weight, bias, padding=1) + time
    size = F.conv2d(x.abs(), weight.abs(), bias.abs(), padding=1) + time.abs()
    error = (9 * x.shape[1] + 2) * EPS * size  # a rounding of each sum, and of each product, which is a term
    return modulated(v, error, inputs.get("film"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "fp32"), [*((dtype, "tf32x3") for dtype in ROUNDING), (torch.float32, "tf32")], ids=str
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_convolution_time_activation_and_pool_and_touches_nothing_else(
    device: torch.device, case: Case, dtype: torch.dtype, fp32: str
) -> None:
    case = replace(case, dtype=dtype, fp32=fp32)
    inputs = _inputs(case, device)
    whole, out, written = case.output(device)
    pool_whole, pooled = case.pooled(device)
    kernel.stem_convolution(**inputs, out=out, pooled=pooled, first=case.before, precision=case.precision)
    assert_within(written, *activation(*_truth(inputs), out, case.precision))
    assert_rounded(written, case.precision)
    assert torch.equal(pooled, pool(written))
    for part, all_around in ((written, whole), (pooled, pool_whole)):
        part.fill_(NAN)
        assert all_around.isnan().all()


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by NumPy, in the interpreter
def test_what_is_not_finite_reaches_its_neighbours_and_no_others(device: torch.device, value: float) -> None:
    case = Case((2, 2, 5, 7), 4)
    inputs = _inputs(case, device)
    inputs["x"][0, 1, 0, 6] = inputs["x"][1, 0, 2, 3] = value
    out, pooled = case.output(device)[1], case.pooled(device)[1]
    kernel.stem_convolution(**inputs, out=out, pooled=pooled, precision=case.precision)
    exact = F.logsigmoid(_truth(inputs)[0])
    assert not exact.isfinite().all()
    torch.testing.assert_close(out.double(), exact, atol=1e-4, rtol=0, equal_nan=True)
    torch.testing.assert_close(pooled, pool(out), atol=0, rtol=0, equal_nan=True)


def test_no_images_have_no_result(device: torch.device) -> None:
    case = Case((0, 1, 4, 4), 2)
    given = {"out": case.output(device)[1], "pooled": case.pooled(device)[1], "precision": case.precision}
    kernel.stem_convolution(**_inputs(case, device), **given)


@pytest.mark.parametrize("size", [(1, 1, 1), (28, 28, 32), (7, 5, 63), (2, 2, 256), (4, 4, 1000)], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 1000, 10**6])
def test_programs_cover_a_batch_and_depend_on_the_image_alone(batch: int, size: tuple[int, int, int]) -> None:
    height, width, channels = size
    constants, (windows, blocks) = kernel.launch_config(batch, *size)
    assert constants == kernel.launch_config(1, *size)[0]
    count = batch * -(-height // 2) * -(-width // 2)
    assert (windows - 1) * constants["WINDOWS"] < count <= windows * constants["WINDOWS"]
    assert (blocks - 1) * constants["C"] < channels <= blocks * constants["C"]
    assert windows < 2**31
    assert blocks < 2**16
