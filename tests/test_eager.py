"""The eager engine: renamed slots, noise drawn for several rows at once, and a finite check that does not wait."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tables import history_table, network, random_table, states_near

import fastsde
from fastsde import VPSDE, NonFiniteError, noise, ops, solvers
from fastsde.engines.eager import FiniteCheck

TIMES = [1.0 - row / 4 for row in range(4)]


@pytest.mark.parametrize("plain", [False, True], ids=["kernels", "plain PyTorch"])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
def test_tables_of_any_number_of_slots(monkeypatch: pytest.MonkeyPatch, slots: int, plain: bool) -> None:
    if plain:
        monkeypatch.setattr(ops, "has_kernels", lambda device: False)
    tables = [random_table(slots, 7, seed=seed, clip=1.5 if seed % 2 else None) for seed in range(6)]
    for seed, table in enumerate((*tables, history_table(slots, 13))):
        x, states = fastsde.sample(network, (5, 3), solver=table, backend="eager", seed=seed, trajectory=1)
        for ours, expected in zip(states, states_near(table, noise.sample_keys(seed, 5), (3,)), strict=True):
            expected.check(ours)
        assert torch.equal(x, states[-1])


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["the network returned", "the state became"])
def test_the_first_bad_row_is_reported(what: str, dtype: torch.dtype, deferred: bool, bad: float) -> None:
    check = FiniteCheck(TIMES, torch.device("cpu"), deferred)

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
    check = FiniteCheck(TIMES, torch.device("cpu"), deferred)
    for row in range(4):
        check("the network returned", torch.randn(shape), row)
    check.finish()


@pytest.mark.parametrize("n", [1, 5000])  # all rows drawn at once, and row by row
@pytest.mark.parametrize("noisy", ["1111111", "0000000", "0110100", "1000001"])
def test_noise_comes_in_its_own_row_whatever_the_rows_around_it(n: int, noisy: str) -> None:
    table = solvers.euler_maruyama(VPSDE(), torch.linspace(1, 0, 8))
    table = replace(table, d=table.d * torch.tensor([[float(bit)] for bit in noisy], dtype=torch.float64))
    eager, reference = (
        fastsde.sample(lambda x, t: -x, (n, 3), solver=table, backend=backend) for backend in ("eager", "reference")
    )
    # The state stays below 10 and each of the 7 rows rounds it a few times.
    torch.testing.assert_close(eager, reference, rtol=0, atol=7 * 4 * 10 * 2**-24)
