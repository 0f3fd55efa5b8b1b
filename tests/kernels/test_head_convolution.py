"""The kernel of the U-Net's last convolution, against float64, within the rounding of its sums."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

kernel = pytest.importorskip("fastsde.kernels.head_convolution")
pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 2.0**-24
# Rounding of the result to its dtype. The interpreter truncates to bf16, while hardware rounds.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TRUNCATION = ROUNDING | {torch.bfloat16: 2.0**-7}
# Batch, channels, height and width: single pixels, edges on all sides, several programs, several blocks of channels.
SHAPES = [
    *((1, 1, 1, 1), (3, 5, 1, 4), (2, 32, 7, 5), (2, 130, 3, 6)),
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((5, 8, 28, 28), (1, 64, 9, 1))),
]


def _channels_last(values: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    filled = torch.empty(values.shape, device=device, dtype=dtype, memory_format=torch.channels_last)
    return filled.copy_(values)


def _inputs(
    shape: tuple[int, ...], out: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y, weight, bias and an output of NaN, which lies between two samples that must stay NaN."""
    batch, channels, height, width = shape
    y, weight = (_channels_last(torch.randn(each), device, dtype) for each in (shape, (out, channels, 3, 3)))
    around = torch.full((batch + 2, out, height, width), torch.nan, device=device, dtype=dtype)
    return y, weight, torch.randn(out).to(device, dtype), around


def _bound(y: Tensor, weight: Tensor, bias: Tensor, expected: Tensor) -> Tensor:
    """Returns an error bound: each lane adds nine products per 64 channels; then at most 64 lanes and the bias."""
    depth = 9 * -(-y.shape[1] // 64) + 64 + 2
    sums = depth * EPS * F.conv2d(y.double().abs(), weight.double().abs(), bias.double().abs(), padding=1)
    rounding = (ROUNDING if y.is_cuda else TRUNCATION)[y.dtype]
    return sums + rounding * (expected.abs() + sums) + (2.0**-25 if y.dtype == torch.float16 else 0)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("out", [1, 4, *(pytest.param(out, marks=pytest.mark.slow) for out in (2, 3))])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_convolution_and_touches_nothing_else(
    triton_device: torch.device, shape: tuple[int, ...], out: int, dtype: torch.dtype
) -> None:
    y, weight, bias, around = _inputs(shape, out, dtype, triton_device)
    kernel.head_convolution(y, weight, bias, around[1:-1])
    assert around[[0, -1]].isnan().all()
    expected = F.conv2d(y.double(), weight.double(), bias.double(), padding=1)
    excess = (around[1:-1].double() - expected).abs() - _bound(y, weight, bias, expected)
    assert (excess <= 0).all(), f"{excess.nan_to_num(nan=torch.inf).max():.3g} beyond the bound"


def test_padding_reads_no_neighbour(triton_device: torch.device) -> None:
    # NaN in the first and last image would spread to the one in between if a tap reached across.
    y, weight, bias, around = _inputs((3, 4, 3, 3), 1, torch.float32, triton_device)
    y[0::2] = torch.nan
    kernel.head_convolution(y, weight, bias, around[1:-1])
    assert around[1].isnan().all()
    assert around[3].isnan().all()
    assert not around[2].isnan().any()


def test_no_images_have_no_result(triton_device: torch.device) -> None:
    y, weight, bias, _ = _inputs((0, 4, 3, 3), 1, torch.float32, triton_device)
    kernel.head_convolution(y, weight, bias, torch.empty(0, 1, 3, 3, device=triton_device))


@pytest.mark.parametrize(("channels", "batch"), [(1, 1), (32, 20), (200, 10_000)])
def test_programs_cover_the_batch(channels: int, batch: int) -> None:
    constants, (programs,) = kernel.launch_config(batch, 28, 28, channels)
    assert (programs - 1) * constants["PIXELS"] < batch * 784 <= programs * constants["PIXELS"]
    assert constants == kernel.launch_config(1, 28, 28, channels)[0]
