"""What only the eager engine has: noise drawn for several rows at once, and a finite check that need not wait."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastsde
from fastsde import VPSDE, NonFiniteError, solvers
from fastsde.engines.eager import FiniteCheck

ROWS = [{"time": 1.0 - row / 4} for row in range(4)]


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["the network returned", "the state became"])
def test_the_first_bad_row_is_reported(what: str, dtype: torch.dtype, deferred: bool, bad: float) -> None:
    check = FiniteCheck(ROWS, torch.device("cpu"), deferred)

    def rows() -> None:
        for row in range(4):
            f, x = torch.randn(3, 2, dtype=dtype), torch.randn(3, 2)
            value = f if what == "the network returned" else x
            value[1, 1] = bad if row >= 2 else torch.finfo(value.dtype).max
            check("the network returned", f, row)
            check("the state became", x, row)
        check.finish()

    with pytest.raises(NonFiniteError, match=rf"{what} NaN or infinity in row 2, at time 0\.5"):
        rows()


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("shape", [(3, 2), (0, 2), (2, 0)])
def test_finite_rows_pass(deferred: bool, shape: tuple[int, ...]) -> None:
    check = FiniteCheck(ROWS, torch.device("cpu"), deferred)
    for row in range(4):
        check("the network returned", torch.randn(shape), row)
    check.finish()


@pytest.mark.parametrize("n", [1, 5000])  # all rows drawn at once, and row by row
@pytest.mark.parametrize("noisy", ["1111111", "0000000", "0110100", "1000001"])
def test_noise_comes_in_its_own_row_whatever_the_rows_around_it(n: int, noisy: str) -> None:
    table = solvers.euler_maruyama(VPSDE(), torch.linspace(1, 0, 8))
    table = replace(table, d=table.d * torch.tensor([float(bit) for bit in noisy], dtype=torch.float64))
    eager, reference = (
        fastsde.sample(lambda x, t: -x, (n, 3), solver=table, backend=backend) for backend in ("eager", "reference")
    )
    # The state stays below 10 and each of the 7 rows rounds it a few times.
    torch.testing.assert_close(eager, reference, rtol=0, atol=7 * 4 * 10 * 2**-24)
