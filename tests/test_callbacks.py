"""Changes that a callback makes to the state affect the next rows, the kept states and the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tables import network, random_table, states_near
from torch import Tensor

import fastsde
from fastsde import NonFiniteError, Sampler, ops
from fastsde.models import MLP, UNet


def pull(x: Tensor, t: Tensor) -> Tensor:
    return -x * (1 + t.reshape(-1, *[1] * (x.ndim - 1)) / 4)


def in_place(row: int, time: float, x: Tensor) -> None:
    x.clamp_(-0.5, 0.5)


def returned(row: int, time: float, x: Tensor) -> Tensor:
    return x.clamp(-0.5, 0.5)


def loop(model: Any, table: fastsde.StepTable, x: Tensor, keys: Tensor) -> list[Tensor]:
    """Returns the states of a loop that clamps after each row."""
    states, rest = [x], [torch.zeros_like(x)] * (table.slots - 1)
    for row in range(len(table)):
        f = model(x, torch.full((len(x),), float(table.time[row])))
        x, *rest = fastsde.reference.solver_step((x, *rest), f, table, row, keys=keys)
        x = x.clamp(-0.5, 0.5)
        states.append(x)
    return states


@pytest.mark.parametrize("plain", [False, True], ids=["kernels", "plain PyTorch"])
@pytest.mark.parametrize("backend", ["reference", "eager", "auto"])
@pytest.mark.parametrize("callback", [in_place, returned])
@pytest.mark.parametrize("solver", ["euler_maruyama", "dpm_solver_pp_2m"])
def test_the_state_goes_on_as_the_callback_leaves_it(
    monkeypatch: pytest.MonkeyPatch, solver: str, callback: Any, backend: str, plain: bool
) -> None:
    if plain:
        monkeypatch.setattr(ops, "has_kernels", lambda device: False)
    for model, shape in ((pull, (2,)), (MLP(3), (3,)), (UNet(1, 8, (16, 16)), (1, 8, 8))):
        sampler = Sampler(model, shape, solver=solver, steps=6, backend=backend, max_batch=3)
        x, states = sampler(5, seed=2, callback=callback, trajectory=1)
        assert torch.equal(states[-1], x)
        assert float(x.abs().max()) <= 0.5
        with torch.no_grad():
            keys = fastsde.noise.sample_keys(2, 5)
            expected = loop(model, sampler.table, fastsde.noise.normal(keys, 0, shape), keys)
        # D = (x + sigma^2 f) / alpha, of which alpha is 1 / 150 at first: its rounding, a few 2^-24, is 150 times that.
        torch.testing.assert_close(states, torch.stack(expected), rtol=0, atol=150 * 16 * 2**-24)


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True], ids=["kernels", "plain PyTorch"])
@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("callback", [in_place, returned])
def test_the_network_is_called_with_what_the_callback_leaves(
    monkeypatch: pytest.MonkeyPatch, callback: Any, backend: str, plain: bool
) -> None:
    """Also if its input combines several slots, and if other slots have taken over slot 0."""
    if plain:
        monkeypatch.setattr(ops, "has_kernels", lambda device: False)
    tables = [random_table(slots, 7, seed=seed) for slots in (3, 8) for seed in range(12)]
    tables = [table for table in tables if table.terms().has_input]
    assert len(tables) > 5
    for table in tables:
        options = {"solver": table, "seed": 2, "backend": backend, "trajectory": 1, "callback": callback}
        x, states = fastsde.sample(network, (5, 3), **options)
        expected = states_near(table, fastsde.noise.sample_keys(2, 5), (3,), edit=lambda x: x.clamp(-0.5, 0.5))
        for ours, near in zip(states, expected, strict=True):
            near.check(ours)
        assert torch.equal(x, states[-1])


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_what_a_callback_returns_is_taken_as_it_is_then(backend: str) -> None:
    own = torch.zeros(4, 2, dtype=torch.float64)

    def callback(row: int, time: float, x: Tensor) -> Tensor:
        own.fill_(row)
        return own

    x, states = fastsde.sample(pull, (4, 2), steps=4, backend=backend, callback=callback, trajectory=1)
    assert x.dtype == torch.float32
    assert torch.equal(states[1:, 0, 0], torch.arange(4.0))  # not the tensor's last value
    own.fill_(9)
    assert torch.equal(x, torch.full((4, 2), 3.0))


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (torch.zeros(3, 2), ValueError, r"result of callback in row 1 must have shape \[4, 2\], got \[3, 2\]"),
        (torch.zeros(4, 2).int(), TypeError, r"result of callback in row 1 must be floating-point, got torch.int32"),
        (torch.full((4, 2), torch.nan), ValueError, r"result of callback in row 1 must be finite, got 8 values"),
        (3.0, TypeError, r"result of callback in row 1 must be a tensor, got float"),
        (torch.zeros(4, 2, device="meta"), ValueError, r"result of callback in row 1 must be on cpu, got meta"),
    ],
)
def test_what_is_no_state_is_refused(result: Any, error: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(error, match=message):
        fastsde.sample(
            pull, (4, 2), steps=4, backend=backend, callback=lambda row, time, x: result if row == 1 else None
        )


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_what_a_callback_writes_must_be_finite(backend: str) -> None:
    def spoil(row: int, time: float, x: Tensor) -> None:
        if row == 1:
            x.fill_(torch.nan)

    with pytest.raises(NonFiniteError, match="NaN or infinity in row 2"):
        fastsde.sample(pull, (4, 2), steps=4, backend=backend, callback=spoil)
