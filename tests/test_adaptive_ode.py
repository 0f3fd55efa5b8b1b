"""`fastsde.adaptive.integrate`, on equations whose solutions are known."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Tensor

from fastsde import NonFiniteError
from fastsde.adaptive import StepSizeError, integrate
from fastsde.solvers import AdaptiveODE
from fastsde.solvers.adaptive import ODE_METHODS

RATES = torch.linspace(0.5, 6.0, 5, dtype=torch.float64)
STARTS = torch.tensor([0.0, 1.0, 0.3, 2.0, 1.5], dtype=torch.float64)
ENDS = torch.tensor([1.0, 0.0, 2.0, 2.0, 1.4], dtype=torch.float64)


class Decay:
    """dy/dt = -2 t rate y, with a rate for each sample: y(t) = y(0) exp(-rate t^2). Counts its calls."""

    def __init__(self) -> None:
        self.calls, self.of_samples = 0, torch.zeros(len(RATES), dtype=torch.int64)

    def __call__(self, t: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        assert t.dtype == torch.float64
        assert (samples.diff() > 0).all()
        self.calls += 1
        self.of_samples[samples] += 1
        return (-2 * t * RATES[samples])[:, None].to(y.dtype) * y


def exact(y: Tensor) -> Tensor:
    return y * torch.exp(-RATES * (ENDS**2 - STARTS**2))[:, None]


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([[1.0, -0.5, 2.0]], dtype=dtype).repeat(len(RATES), 1)


@pytest.mark.parametrize("method", ODE_METHODS)
@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-9])
def test_solves_upwards_and_downwards_to_the_tolerance(method: str, rtol: float) -> None:
    y = start()
    found, _ = integrate(Decay(), y, STARTS, ENDS, AdaptiveODE(rtol, 0.0, method))
    # Errors of the steps, each up to rtol, grow with the solution itself, relative to which they are constant.
    assert ((found / exact(y) - 1).abs() < 30 * rtol).all()
    assert torch.equal(found[3], y[3])  # its times are equal
    assert torch.equal(y, start())


def test_errors_fall_and_calls_rise_with_the_tolerance() -> None:
    errors, calls = [], []
    for rtol in (1e-2, 1e-4, 1e-6, 1e-8):
        found, count = integrate(Decay(), start(), STARTS, ENDS, AdaptiveODE(rtol, 0.0))
        errors.append(float((found / exact(start()) - 1).abs().max()))
        calls.append(int(count.sum()))
    assert all(later < earlier / 5 for earlier, later in itertools.pairwise(errors))
    assert calls == sorted(calls)


def test_state_in_fp32_with_times_in_fp32() -> None:
    found, _ = integrate(Decay(), start(torch.float32), STARTS.float(), ENDS.float(), AdaptiveODE(1e-5, 1e-5))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact(start()), rtol=3e-4, atol=3e-4)


def test_calls_are_those_of_each_sample() -> None:
    decay = Decay()
    _, calls = integrate(decay, start(), STARTS, ENDS, AdaptiveODE(1e-6, 1e-6))
    assert torch.equal(calls, decay.of_samples)
    assert calls[3] == 0
    assert calls.max() == decay.calls
    assert len(calls.unique()) > 2


def test_a_sample_does_not_depend_on_the_others() -> None:
    solver = AdaptiveODE(1e-5, 1e-5)
    together, calls = integrate(Decay(), start(), STARTS, ENDS, solver)
    for i in range(len(RATES)):

        def alone(t: Tensor, y: Tensor, samples: Tensor, i: int = i) -> Tensor:
            return Decay()(t, y, samples + i)

        found, count = integrate(alone, start()[i : i + 1], STARTS[i : i + 1], ENDS[i : i + 1], solver)
        torch.testing.assert_close(found[0], together[i], rtol=1e-13, atol=0)
        assert count == calls[i]


def test_no_samples_and_no_elements() -> None:
    empty = torch.empty(0, dtype=torch.float64)
    found, calls = integrate(Decay(), torch.empty(0, 3), empty, empty, AdaptiveODE())
    assert found.shape == (0, 3)
    assert calls.shape == (0,)
    found, _ = integrate(Decay(), torch.empty(5, 0), STARTS, ENDS, AdaptiveODE())
    assert found.shape == (5, 0)


def test_too_many_steps() -> None:
    message = r"2 steps \(max_steps\) were not enough for 4 samples .* t = .* rtol=1e-09 and atol=0"
    with pytest.raises(StepSizeError, match=message):
        integrate(Decay(), start(), STARTS, ENDS, AdaptiveODE(1e-9, 0.0, max_steps=2))


@pytest.mark.slow
def test_steps_that_collapse_before_a_singularity() -> None:
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(StepSizeError, match=r"the steps became too short for 1 samples .* t = 1"):
        integrate(lambda t, y, _: y * y, one[:, None], 0 * one, 2 * one, AdaptiveODE(1e-12, 1e-12))


def test_values_that_are_not_finite() -> None:
    def velocity(t: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return torch.where((samples[:, None] == 2) & (t[:, None] > 0.5), torch.nan, -y)

    with pytest.raises(NonFiniteError, match=r"NaN or infinite in 1 samples \(the first is sample 2\), in a step from"):
        integrate(velocity, start(), STARTS, ENDS, AdaptiveODE(1e-4, 1e-4))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rtol": -1.0}, ValueError, "rtol must be at least 0 and finite, got -1"),
        ({"atol": float("nan")}, ValueError, "atol must be at least 0 and finite, got nan"),
        ({"rtol": 0, "atol": 0}, ValueError, "one of rtol and atol must be above 0"),
        ({"rtol": "small"}, TypeError, "rtol must be a number, got str"),
        ({"method": "rk4"}, ValueError, "method must be one of dopri5, tsit5, got 'rk4'"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdaptiveODE(**options)  # type: ignore[arg-type]


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchode", None)
    with pytest.raises(ImportError, match=r"pip install 'fastsde\[ode\]'"):
        integrate(Decay(), start(), STARTS, ENDS, AdaptiveODE())
