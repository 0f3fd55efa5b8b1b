"""Activations on tiles of both forms, and the error of the polynomial logarithm."""

from __future__ import annotations

import math

import pytest
import torch
from interpreted import jit
from torch import Tensor

from fastsde.models.activations import ACTIVATIONS

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
elements = pytest.importorskip("fastsde.kernels.elements")
tile = pytest.importorskip("fastsde.kernels.tile")

# The relative error of log2(1 + u) in `elements._log2_1p`; in fp32 a few roundings.
LOGARITHM = {"fp32": 0.0, "tf32": 5.7e-5, "bf16": 3.94e-4}


@jit()
def _activate_kernel(
    x_ptr,
    out_ptr,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    NAME: tl.constexpr,  # noqa: N803
    P: tl.constexpr,  # noqa: N803
    TRANSPOSED: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
    FAST: tl.constexpr,  # noqa: N803
):
    offset = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + offset, elements.function(tl.load(x_ptr + offset), NAME, P, 0.0, TRANSPOSED, PRECISION, FAST))


def _activate(x: Tensor, name: str, transposed: bool, precision: str) -> Tensor:
    out = torch.full_like(x, torch.nan)
    _activate_kernel[(1,)](
        x, out, *x.shape, name, {"LeakyReLU": 0.01, "ELU": 1.0}.get(name, 0.0), transposed, precision, tile.fast_math(x)
    )
    return out


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("precision", LOGARITHM)
@pytest.mark.parametrize("transposed", [False, True])
def test_activations_of_a_tile(triton_device: torch.device, name: str, precision: str, transposed: bool) -> None:
    assert name in elements.ACTIVATIONS
    # Every value occurs in every part of the tile, since only some parts use the polynomial.
    x = torch.linspace(-30, 30, 16 * 64, device=triton_device)[torch.randperm(16 * 64)].reshape(16, 64)
    binary = name in ("LogSigmoid", "Softplus")
    exact = ACTIVATIONS[name].build()(x.double() * math.log(2) if binary else x.double())
    exact = exact / math.log(2) if binary else exact
    error = (_activate(x, name, transposed, precision).double() - exact).abs()
    relative = 0.0 if transposed or not binary else LOGARITHM[precision]
    logarithm = torch.log2(1 + torch.exp2(-x.double().abs()))
    # Besides the polynomial: roundings to fp32 and special functions, each 2^-22 of numbers up to |x| and of order 1.
    assert (error <= relative * logarithm + 2**-22 * (2 + x.abs())).all()


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_the_polynomial_takes_three_of_four_logarithms(triton_device: torch.device, precision: str) -> None:
    x = torch.full((16, 32), -0.3, device=triton_device)
    special, balanced = (_activate(x, "LogSigmoid", transposed, precision) for transposed in (True, False))
    changed = (special != balanced).sum(dim=1)
    assert changed.tolist() == [24] * 16


@pytest.mark.parametrize("precision", LOGARITHM)
def test_what_is_not_finite_stays_so_and_far_from_zero_nothing_breaks(
    triton_device: torch.device, precision: str
) -> None:
    x = torch.zeros(16, 16, device=triton_device)
    x[:, 0::4], x[:, 1::4], x[:, 2::4], x[:, 3::4] = math.nan, math.inf, -math.inf, -1e30
    for transposed in (False, True):
        out = _activate(x, "LogSigmoid", transposed, precision)
        assert out[:, 0::4].isnan().all()
        assert (out[:, 1::4] == 0).all()
        assert (out[:, 2::4] == -math.inf).all()
        assert (out[:, 3::4] == -1e30).all()
