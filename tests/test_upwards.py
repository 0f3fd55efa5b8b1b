"""Solvers of the probability flow run upwards as well, from data to noise; those with noise refuse to."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from test_gaussian_solutions import exact_network, marginal, moments
from torch import Tensor

import fastsde
from fastsde import EDM, VESDE, VPSDE, RectifiedFlow, solvers
from fastsde.sde import PROCESSES, Process
from fastsde.solvers import REGISTRY
from fastsde.solvers.times import spaced
from fastsde.vocabulary import SPACINGS

QUIET = [name for name, kind in REGISTRY.items() if not kind.variants[0].noise]
NOISY = [name for name, kind in REGISTRY.items() if kind.variants[0].noise]


def ends(sde: Process) -> tuple[float, float]:
    """Returns times between which everything is finite: alpha may be 0 at t_max."""
    return 0.02 * sde.t_max, 0.5 * sde.t_max


@pytest.mark.slow
@pytest.mark.parametrize("name", QUIET)
@pytest.mark.parametrize("sde", [kind() for kind in PROCESSES.values()], ids=str)
def test_a_solver_converges_upwards_with_its_order(sde: Process, name: str) -> None:
    (start, end), order = ends(sde), min(REGISTRY[name].variants[0].order, 2)  # the first rows may be of first order
    target = math.sqrt(marginal(sde, end)[1])
    errors = []
    for steps in (400, 800, 1600):
        table = solvers.build(name, sde, steps, t_start=start, t_end=end, prediction="v", spacing="log_snr")
        assert len(table) == steps
        errors.append(abs(math.sqrt(moments(table, sde, "v", marginal(sde, start))[1]) - target))
    for coarse, fine in pairwise(errors):
        assert fine < 1e-12 * target or math.log2(coarse / fine) > order - 0.3
    assert errors[-1] < 5e-3 * target


def test_rk4_has_order_4_whatever_its_last_interval_takes_but_an_euler_step() -> None:
    sde, (start, end) = VPSDE(), ends(VPSDE())
    for rest, order in ((0, 4), (3, 4), (2, 3), (1, 2)):  # the last interval's local order
        errors = []
        for steps in (80, 160, 320):
            table = solvers.build("rk4", sde, steps + rest, t_start=start, t_end=end, prediction="eps")
            errors.append(abs(moments(table, sde, "eps", marginal(sde, start))[1] - marginal(sde, end)[1]))
        slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
        assert all(slope > order - 0.3 for slope in slopes), (rest, slopes)


def test_rk4_is_the_classical_method() -> None:
    sde = VPSDE(0.3, 9.0)
    table = solvers.build("rk4", sde, 8, t_start=0.2, t_end=0.6)
    x = y = torch.linspace(-1, 1, 63, dtype=torch.float64)

    def score(x: Tensor, t: float) -> Tensor:
        return torch.sin(3 * x) - t

    def velocity(x: Tensor, t: float) -> Tensor:
        return -sde.beta(t) / 2 * (x + score(x, t))

    h = 0.2
    for t in (0.2, 0.4):
        k1 = velocity(y, t)
        k2 = velocity(y + h / 2 * k1, t + h / 2)
        k3 = velocity(y + h / 2 * k2, t + h / 2)
        k4 = velocity(y + h * k3, t + h)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    slots = [x, 0 * x, 0 * x]
    for row in range(8):
        f = score(slots[0], float(table.time[row]))
        slots = list(fastsde.reference.solver_step(slots, f, table, row))
    torch.testing.assert_close(slots[0], y, rtol=0, atol=1e-14)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_rk4_needs_no_velocity_at_t_zero(prediction: str) -> None:
    message = r"takes a number of steps that 4 does not divide.*got steps=8, take 7 or 9"
    with pytest.raises(ValueError, match=message):
        solvers.build("rk4", VPSDE(), 8, prediction=prediction)
    times = torch.linspace(1, 0, 3)
    assert [len(solvers.build("rk4", VPSDE(), steps, prediction=prediction)) for steps in (5, 6, 7)] == [5, 6, 7]
    assert len(solvers.rk4(VPSDE(), times, prediction)) == 7
    assert len(solvers.rk4(VPSDE(), times)) == 8
    with pytest.raises(ValueError, match="has no velocity at t = 0"):
        solvers.rk4(VPSDE(), times, prediction, final_rows=4)
    with pytest.raises(ValueError, match=r"final_rows must be in \[1, 5\), got 5"):
        solvers.rk4(VPSDE(), times, prediction, final_rows=5)


@pytest.mark.parametrize("name", ["heun", "rk4"])
def test_rectified_flow_runs_from_clean_data_to_pure_noise(name: str) -> None:
    sde = RectifiedFlow()
    table = solvers.build(name, sde, 16, t_start=0.0, t_end=1.0, prediction="flow")
    mean, variance = moments(table, sde, "flow", marginal(sde, 0.0))
    assert abs(mean) < 0.1
    assert abs(variance - 1) < 0.05
    w, _ = exact_network(sde, "flow", torch.tensor([1.0], dtype=torch.float64))
    assert w.isfinite().all()


@pytest.mark.parametrize("name", NOISY)
def test_solvers_with_noise_refuse(name: str) -> None:
    with pytest.raises(ValueError, match="only a solver without noise may run upwards"):
        solvers.build(name, VPSDE(), 4, t_start=0.1, t_end=1.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("edm_stochastic", {"s_churn": 1.0}),
        ("ddim", {"eta": 0.1}),
        ("dpm_solver_pp_2m", {"stochastic": True}),
        ("dpm_solver_pp_3m", {"stochastic": True}),
    ],
)
def test_options_that_draw_noise_refuse(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="only a solver without noise may run upwards"):
        solvers.build(name, VPSDE(), 4, t_start=0.1, t_end=1.0, solver_options=options)
    assert not solvers.build("euler_ancestral", VPSDE(), 4, t_start=0.1, t_end=1.0, eta=0.0).d.any()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), EDM()], ids=str)
def test_times_upwards_are_those_downwards_reversed(sde: Process, spacing: str) -> None:
    low = 0.1 * sde.t_max
    up = spaced(spacing, sde, 9, low, sde.t_max)
    assert torch.equal(up, spaced(spacing, sde, 9, sde.t_max, low).flip(0))
    assert (up.diff() > 0).all()


def test_denoising_is_for_runs_down_to_the_data() -> None:
    with pytest.raises(ValueError, match=r"denoise is for runs down to the data, got t_start=0\.1 and t_end=1"):
        solvers.build("heun", VPSDE(), 4, t_start=0.1, t_end=1.0, denoise=True)


@pytest.mark.parametrize("backend", ["reference", "eager", "persistent", "auto"])
@pytest.mark.parametrize("name", QUIET)
def test_every_backend_runs_upwards(name: str, backend: str) -> None:
    model = fastsde.models.MLP(shape=(2,), hidden=(16,))
    x = torch.linspace(-1, 1, 14).reshape(7, 2)
    options = {"solver": name, "steps": 8, "t_start": 0.1, "t_end": 0.5, "prediction": "eps"}
    exact = fastsde.sample(model.double(), (7, 2), x_init=x.double(), backend="reference", **options)
    got = fastsde.sample(model.float(), (7, 2), x_init=x, backend=backend, **options)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)
