"""The kernel of the U-Net's last convolution, which adds products, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from convolution_cases import EPS, NAN, ROUNDING, assert_within, rounded, vector
from torch import Tensor

kernel = pytest.importorskip("fastsde.kernels.head_convolution")
pytestmark = pytest.mark.usefixtures("poisoned")

# Batch, channels, height and width: single pixels, edges on all sides, several programs.
SHAPES = [
    *((1, 1, 1, 1), (3, 4, 1, 4), (2, 3, 7, 5), (3, 1, 13, 16)),
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((5, 1, 28, 28), (300, 2, 2, 1))),
]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns products and an output of NaN, which lie between others that are NaN, and the biases."""
    batch, channels, height, width = shape
    products = torch.full((9 * channels + 2, batch, height, width), NAN, device=device)
    products[1:-1] = torch.randn(9 * channels, batch, height, width)
    around = torch.full((batch + 2, *shape[1:]), NAN, device=device, dtype=dtype)
    return products[1:-1], vector(torch.randn(channels), device, dtype), around


def _sum(products: Tensor, bias: Tensor) -> Tensor:
    """Returns the sum over taps of the products of the pixel that each tap reaches."""
    height, width = products.shape[2:]
    padded = F.pad(products.double(), (1, 1, 1, 1)).unflatten(0, (-1, 3, 3))
    taps = [padded[:, i, j, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return (torch.stack(taps).sum(0) + bias.double()[:, None, None, None]).transpose(0, 1)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_sum_and_touches_nothing_else(
    triton_device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    products, bias, around = _inputs(shape, dtype, triton_device)
    kernel.head_convolution(products, bias, around[1:-1])
    assert around[[0, -1]].isnan().all()
    expected, error = _sum(products, bias), 9 * EPS * _sum(products.abs(), bias.abs())
    assert_within(around[1:-1], expected, rounded(expected, error, around))


def test_padding_reads_no_neighbour(triton_device: torch.device) -> None:
    # NaN in the first and last image would spread to the one in between if a tap reached across.
    products, bias, around = _inputs((3, 2, 3, 3), torch.float32, triton_device)
    products[:, 0::2] = NAN
    kernel.head_convolution(products, bias, around[1:-1])
    assert around[1].isnan().all()
    assert around[3].isnan().all()
    assert not around[2].isnan().any()


def test_no_images_have_no_result(triton_device: torch.device) -> None:
    products, bias, around = _inputs((0, 1, 3, 3), torch.float32, triton_device)
    kernel.head_convolution(products, bias, around[1:-1])
