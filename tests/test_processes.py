"""All processes of the registry: moment equations, derivatives, precision, priors, and how they are saved."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fastsde
from fastsde import VPSDE, CosineVPSDE, checkpoints, noise, solvers, vocabulary
from fastsde.checkpoints import Checkpoint
from fastsde.models import MLP
from fastsde.request import Request
from fastsde.sde import EDM, PROCESSES, VESDE, Process, RectifiedFlow, SubVPSDE, as_time, from_dict, to_dict
from fastsde.training import TrainConfig

DEFAULTS = [kind() for kind in PROCESSES.values()]
OTHERS = [
    CosineVPSDE(0.0, 1.0),
    EDM(0.1, 3.0),
    SubVPSDE(0.0, 5.0),
    VESDE(0.5, 2.0),
    VPSDE(0.0, 9.0),
]
every_process = pytest.mark.parametrize("sde", [*DEFAULTS, *OTHERS], ids=str)


def times(sde: Process, *fractions: float) -> Tensor:
    return sde.t_max * torch.tensor(fractions, dtype=torch.float64)


@dataclass(frozen=True)
class Trigonometric(Process):
    """A user's process with only the required methods: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    name: str = "trigonometric"

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.cos(math.pi / 2 * as_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return torch.sin(math.pi / 2 * as_time(t))

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        return -math.pi / 2 * self.sigma(t)

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        return math.pi / 2 * self.alpha(t)


# Marginals --------------------------------------------------------------------------------------------------------


@every_process
def test_marginals_solve_the_moment_equations(sde: Process) -> None:
    # m' = f m and V' = 2 f V + g^2, from t = 0 on, by the classical Runge-Kutta method.
    steps, end = 1000, 0.8 * sde.t_max
    grid = torch.linspace(0, end, 2 * steps + 1, dtype=torch.float64)
    f, g2 = sde.drift_coefficient(grid).numpy(), sde.squared_diffusion(grid).numpy()
    y, h = np.array([float(sde.alpha(0.0)), float(sde.sigma(0.0)) ** 2]), end / steps

    def rate(i: int, y: np.ndarray) -> np.ndarray:
        return np.array([f[i] * y[0], 2 * f[i] * y[1] + g2[i]])

    for k in range(0, 2 * steps, 2):
        k1 = rate(k, y)
        k2 = rate(k + 1, y + h / 2 * k1)
        k3 = rate(k + 1, y + h / 2 * k2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(k + 2, y + h * k3))
    assert y[0] == pytest.approx(float(sde.alpha(end)), rel=1e-7)
    assert y[1] == pytest.approx(float(sde.sigma(end)) ** 2, rel=1e-7)


@every_process
def test_derivatives_are_those_of_autograd_and_give_drift_and_diffusion(sde: Process) -> None:
    t = times(sde, 1e-4, 0.01, 0.3, 0.7, 0.97).requires_grad_()
    alpha, sigma = sde.alpha(t) + 0 * t, sde.sigma(t) + 0 * t
    (alpha_dot,) = torch.autograd.grad(alpha.sum(), t)
    (sigma_dot,) = torch.autograd.grad(sigma.sum(), t)
    torch.testing.assert_close(sde.alpha_dot(t).detach(), alpha_dot, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(sde.sigma_dot(t).detach(), sigma_dot, rtol=1e-11, atol=1e-14)
    drift, diffusion = sde.drift(torch.full_like(t, 2.0), t).detach(), sde.diffusion(t).detach()
    torch.testing.assert_close(drift, (2 * alpha_dot / alpha).detach(), rtol=1e-11, atol=1e-14)
    expected = Process.squared_diffusion(sde, t).detach()  # 2 sigma (sigma' - f sigma)
    torch.testing.assert_close(diffusion.square(), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("sde", "t", "alpha", "sigma"),
    [
        (SubVPSDE(), 0.5, math.exp(-2.5375 / 2), 1 - math.exp(-2.5375)),  # B = 0.05 + 9.95 / 4
        (VESDE(), 0.5, 1.0, math.sqrt(0.01 * 50)),
        (VESDE(), 0.0, 1.0, 0.01),
        (CosineVPSDE(), 0.5, math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2), None),
        (CosineVPSDE(t_max=1.0), 1.0, 0.0, 1.0),
        (EDM(), 3.0, 1.0, 3.0),
        (RectifiedFlow(), 0.25, 0.75, 0.25),
    ],
    ids=str,
)
def test_marginals_are_the_papers(sde: Process, t: float, alpha: float, sigma: float | None) -> None:
    assert float(sde.alpha(t)) == pytest.approx(alpha, rel=1e-14)
    assert float(sde.sigma(t)) == pytest.approx(math.sqrt(1 - alpha**2) if sigma is None else sigma, rel=1e-14)


@every_process
def test_no_digits_are_lost_in_fp32(sde: Process) -> None:
    t = times(sde, 1e-6, 1e-4, 0.01, 0.3, 0.7, 0.99, 0.9999).float()
    for name in ("alpha", "sigma", "sigma_dot", "drift_coefficient", "squared_diffusion"):
        value, exact = getattr(sde, name)(t), getattr(sde, name)(t.double())
        assert (value.dtype, value.shape) == (torch.float32, t.shape)
        # A rounded angle of pi/2 or exponent of 10 has an error of some ulp, and so do the results.
        torch.testing.assert_close(value.double(), exact, rtol=40 * 2**-24, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert getattr(sde, name)(0.5).dtype == torch.float64


@every_process
def test_signal_to_noise_falls_all_the_way(sde: Process) -> None:
    t = torch.linspace(0, sde.t_max, 200, dtype=torch.float64)
    assert (torch.diff(sde.sigma(t) * sde.alpha(t[0]) / sde.alpha(t).clamp(min=1e-300)) > 0).all()
    assert float(sde.alpha(0.0)) == 1
    assert 0 < sde.t_min < 0.1 * sde.t_max


def test_derivatives_exist_at_zero_where_they_should() -> None:
    assert [math.isfinite(sde.sigma_dot(0.0)) for sde in (VPSDE(), CosineVPSDE())] == [False, False]
    for sde in (VPSDE(0.0, 8.0), CosineVPSDE(s=0.0), SubVPSDE(), EDM(), RectifiedFlow(), VESDE()):
        near = sde.sigma(1e-7 * sde.t_max) - sde.sigma(0.0)
        assert float(sde.sigma_dot(0.0)) == pytest.approx(float(near / (1e-7 * sde.t_max)), rel=1e-5)
    assert math.isinf(RectifiedFlow().drift_coefficient(1.0))
    assert float(RectifiedFlow().alpha_dot(1.0)) == -1


# Exact steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", [*DEFAULTS, *OTHERS, Trigonometric()], ids=str)
def test_exact_steps_are_the_limit_of_small_ones(sde: Process) -> None:
    # Two steps in a row equal one step, and a small one is x' = (1 - f h) x + g^2 h score + g sqrt(h) z: only the exact
    # solution satisfies both.
    for first, last in ((0.97, 0.0), (0.6, 0.1), (0.5, 0.499), (1e-3, 0.0)):
        whole = sde.exact_step(times(sde, first), times(sde, last))
        points = torch.linspace(first, last, 65, dtype=torch.float64) * sde.t_max
        scale, weight, variance = (torch.tensor([each], dtype=torch.float64) for each in (1.0, 0.0, 0.0))
        for a, b, c in zip(*sde.exact_step(points[:-1], points[1:]), strict=True):
            scale, weight, variance = a * scale, a * weight + b, a**2 * variance + c
        for one, many in zip(whole, (scale, weight, variance), strict=True):
            torch.testing.assert_close(one, many, rtol=1e-11, atol=0)
    t, h = times(sde, 0.5), times(sde, 1e-7)
    scale, weight, variance = sde.exact_step(t, t - h)
    rate = sde.squared_diffusion(t) * h
    torch.testing.assert_close(scale - 1, -sde.drift_coefficient(t) * h, rtol=1e-5, atol=1e-15)
    torch.testing.assert_close(weight, rate, rtol=1e-5, atol=0)
    torch.testing.assert_close(variance, rate, rtol=1e-5, atol=0)


@every_process
def test_the_noise_of_an_exact_step_is_a_difference_of_variances(sde: Process) -> None:
    t, after = times(sde, 0.9, 0.5, 0.2), times(sde, 0.5, 0.2, 0.0)
    scale, _, variance = sde.exact_step(t, after)
    torch.testing.assert_close(scale, sde.alpha(after) / sde.alpha(t), rtol=1e-13, atol=0)
    expected = scale.square() * sde.sigma(t).square() - sde.sigma(after).square()
    torch.testing.assert_close(variance, expected, rtol=1e-12, atol=0)


# The prior --------------------------------------------------------------------------------------------------------


@every_process
def test_samples_start_from_the_prior(sde: Process) -> None:
    assert sde.prior_std == pytest.approx(float(sde.sigma(sde.t_max)), rel=0.1)
    drawn = sde.prior_sampling((5, 3), seed=2)
    assert torch.equal(drawn, sde.prior_std * noise.normal(noise.sample_keys(2, 5), 0, (3,)))
    normal = torch.distributions.Normal(0.0, sde.prior_std)
    torch.testing.assert_close(sde.prior_logp(drawn), normal.log_prob(drawn).sum(1), rtol=1e-5, atol=1e-4)
    options = {"sde": sde, "steps": 3, "solver": "ddim", "prediction": "v", "seed": 2, "trajectory": 1}
    _, states = fastsde.sample(lambda x, t: 0 * x, (5, 3), backend="reference", **options)
    assert torch.equal(states[0], drawn)
    table = solvers.build("ddim", sde, 3, prediction="v")  # a table does not know its prior, the argument does
    sampler = fastsde.Sampler(lambda x, t: 0 * x, (3,), sde=sde, solver=table, backend="reference")
    assert torch.equal(sampler(5, seed=2, trajectory=1)[1], states)


@pytest.mark.parametrize("backend", ["auto", "reference", "eager", "persistent"])
def test_every_engine_is_given_the_prior_of_the_process(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def engine(network: object, request: Request) -> Tensor:
        given.append(request.start())
        return torch.zeros(request.shape)

    monkeypatch.setattr("fastsde.plan.Planner.backend", lambda *args: backend)
    monkeypatch.setattr("fastsde.sampler.engines.get", lambda name: engine)
    for sde in (EDM(), VPSDE()):
        fastsde.sample(MLP(), (4, 2), sde=sde, solver="ddim", prediction="v", steps=3, seed=5)
        fastsde.sample(MLP(), (4, 2), sde=sde, solver="ddim", prediction="v", steps=3, x_init=torch.ones(4, 2))
    torch.testing.assert_close(given[0], EDM().prior_sampling((4, 2), seed=5), rtol=1e-5, atol=80 * 4e-6)
    torch.testing.assert_close(given[2], VPSDE().prior_sampling((4, 2), seed=5), rtol=0, atol=4e-6)
    assert torch.equal(given[1], torch.ones(4, 2))  # a state from the user is used as it is
    assert torch.equal(given[3], torch.ones(4, 2))


def test_the_default_process_starts_from_unit_noise() -> None:
    assert (VPSDE().prior_std, VPSDE().t_max) == (1.0, 1.0)
    assert (EDM(sigma_max=30.0).t_max, EDM(sigma_max=30.0).prior_std) == (30.0, 30.0)
    assert (VESDE(sigma_max=30.0).t_max, VESDE(sigma_max=30.0).prior_std) == (1.0, 30.0)


# Names ------------------------------------------------------------------------------------------------------------


def test_every_file_is_a_process() -> None:
    assert tuple(PROCESSES) == vocabulary.PROCESSES
    assert vocabulary.PROCESSES[0] == "vp"
    assert all(kind().name == name for name, kind in PROCESSES.items())
    assert {"vp", "sub_vp", "ve", "cosine_vp", "edm", "rectified_flow"} <= PROCESSES.keys()
    assert all(getattr(fastsde.sde, kind.__name__) is kind for kind in PROCESSES.values())


@every_process
def test_a_process_is_a_value_that_json_holds(sde: Process) -> None:
    written = json.loads(json.dumps(to_dict(sde)))
    assert written["name"] == sde.name
    assert from_dict(written) == sde == copy.deepcopy(sde) == pickle.loads(pickle.dumps(sde))
    assert (hash(from_dict(written)), repr(from_dict(written))) == (hash(sde), repr(sde))
    assert len({*DEFAULTS, *OTHERS}) == len(DEFAULTS) + len(OTHERS)


@every_process
def test_checkpoints_and_runs_name_their_process(sde: Process, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoints.save(path, Checkpoint(MLP(2, (4,)), sde, "flow"))
    loaded = checkpoints.load(path)
    assert (loaded.sde, loaded.prediction) == (sde, "flow")
    config = TrainConfig("swiss-roll", MLP(2, (4,)).config, sde=sde, prediction="flow")
    assert TrainConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
    assert replace(config, sde=VPSDE(0.3, 4.0)) != config


def test_what_has_no_name_is_the_vp_sde() -> None:
    assert from_dict({"beta_min": 0.2, "beta_max": 15.0}) == VPSDE(0.2, 15.0)
    assert checkpoints.load("swiss-roll").sde == VPSDE()


def test_a_process_of_ones_own_samples_but_is_not_saved(tmp_path: Path) -> None:
    sde, data = Trigonometric(), torch.tensor([0.3, -1.2])
    options = {"sde": sde, "solver": "ddpm", "prediction": "x0", "steps": 5, "backend": "reference"}
    x = fastsde.sample(lambda x, t: data.expand_as(x), (4, 2), **options)
    torch.testing.assert_close(x, data.expand(4, 2))
    with pytest.raises(TypeError, match=r"sde must be one of VPSDE, .* to be saved, got Trigonometric"):
        checkpoints.save(tmp_path / "a.safetensors", Checkpoint(MLP(2, (4,)), sde))
    with pytest.raises(TypeError, match="sde must be one of VPSDE"):
        TrainConfig("swiss-roll", MLP(2, (4,)).config, sde=sde)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EDM(sigma_min=0.0), ValueError, "0 < sigma_min < sigma_max, got sigma_min=0.0 and sigma_max=80.0"),
        (lambda: EDM(sigma_max=math.inf), ValueError, "sigma_max must be finite, got inf"),
        (lambda: VESDE(2.0, 1.0), ValueError, "0 < sigma_min < sigma_max, got sigma_min=2.0 and sigma_max=1.0"),
        (lambda: VESDE("0.1"), TypeError, "sigma_min must be a number, got str"),
        (lambda: CosineVPSDE(s=-0.1), ValueError, "s must be at least 0 and finite, got -0.1"),
        (lambda: CosineVPSDE(t_max=1.5), ValueError, r"t_max must be in \(0, 1\], got 1.5"),
        (lambda: SubVPSDE(3.0, 1.0), ValueError, "expected 0 <= beta_min <= beta_max"),
        (lambda: from_dict("edm"), TypeError, "sde must be a dict, got str"),
        (lambda: from_dict({"name": "ou"}), ValueError, "sde must have the name of a process, one of vp, .*got 'ou'"),
        (lambda: from_dict({"name": "edm", "beta_min": 1}), TypeError, "beta_min"),
        (lambda: solvers.build("ddim", "edm", 3), TypeError, r"sde must be a process such as .*VPSDE\(\), got str"),
        (lambda: solvers.heun(EDM, [80, 1]), TypeError, "sde must be a process, got the class EDM: give an instance"),
        (
            lambda: solvers.heun(EDM(), [81, 1]),
            ValueError,
            r"times must decrease strictly within \[0, 80\], got 81 .. 1",
        ),
        (lambda: solvers.build("ddim", EDM(), 3, t_end=80.0), ValueError, r"t_end must be in \[0, 80\), got 80.0"),
        (
            lambda: fastsde.sample("swiss-roll", (3, 2), sde=EDM()),
            ValueError,
            r"sde of the checkpoint is VPSDE\(beta_min=0.1, beta_max=20.0\), got EDM\(",
        ),
        (
            lambda: fastsde.sample(MLP(), (3, 2), sde=RectifiedFlow(), prediction="flow"),
            ValueError,
            r"RectifiedFlow\(\) has no reverse SDE at t = 1, where alpha is 0 .*: pick a solver of",
        ),
    ],
)
def test_what_is_wrong_is_named(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]


@dataclass(frozen=True)
class Trigonometric(Process):
    """alpha = cos(pi t / 2), which rounding keeps from 0 at t = 1."""

    name: str = field(default="trigonometric", init=False)

    def alpha(self, t):
        return torch.cos(as_time(t) * math.pi / 2)

    def alpha_dot(self, t):
        return -math.pi / 2 * torch.sin(as_time(t) * math.pi / 2)

    def sigma(self, t):
        return torch.sin(as_time(t) * math.pi / 2)

    def sigma_dot(self, t):
        return math.pi / 2 * torch.cos(as_time(t) * math.pi / 2)


def test_an_alpha_that_only_rounding_keeps_from_zero_is_zero() -> None:
    for solver, prediction in (("euler_maruyama", "v"), ("exponential_euler_maruyama", "v"), ("ddim", "eps")):
        with pytest.raises(ValueError, match="alpha is"):
            solvers.build(solver, Trigonometric(), 51, prediction=prediction)
    table = solvers.build("ddim", Trigonometric(), 51, prediction="v")
    assert repr(table) == "StepTable(rows=51, slots=1, time=1 .. 0.0196078)"
