"""Pi-GDM, DPS and classifier guidance against closed forms and algorithms written plainly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gaussian_laws import Law, network, prior, row_of
from torch import Tensor

from fastsde import DPS, EDM, VPSDE, ClassifierGuidance, PiGDM, RectifiedFlow, Sampler, noise, reference, solvers
from fastsde.inverse.pigdm import conjugate_gradient
from fastsde.sde import Process

SDE = VPSDE()
H = torch.tensor([[1.0, 0.5, 0.0], [0.0, -0.3, 2.0]]).double()
Y = torch.tensor([0.7, -1.2]).double()


def operator(x: Tensor) -> Tensor:
    return x @ H.T.to(x)


def isotropic(s: float) -> Law:
    return Law(torch.zeros(3).double(), s**2 * torch.eye(3).double())


def exact(model: Any, **options: Any) -> Sampler:
    return Sampler(model, (3,), backend="reference", dtype=torch.float64, **options)


# Pi-GDM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["score", "eps", "v", "x0", "flow"])
@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_pigdm_is_the_posterior_for_gaussian_data(prediction: str, noise_std: float) -> None:
    law = isotropic(0.8)
    posterior = law.given(H, Y, noise_std)
    options = {"prediction": prediction, "steps": 12, "solver": "ddim", "t_end": 0.01}
    _, states = exact(network(law, SDE, prediction), **options)(
        4, trajectory=1, measurement=PiGDM(operator, Y, noise_std, data_std=0.8)
    )
    _, expected = exact(network(posterior, SDE, prediction), **options)(4, trajectory=1)
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_pigdm_draws_from_the_posterior_to_the_discretisation() -> None:
    law = isotropic(1.0)
    posterior = law.given(H, Y, 0.3)
    sampler = exact(network(posterior, SDE), steps=999)  # whose rows are Pi-GDM's, by the test above
    state = prior(3)
    for row in range(999):
        state = row_of(sampler.table, row, posterior, state, SDE)
    torch.testing.assert_close(state.mean, posterior.mean, rtol=0, atol=5e-3)
    torch.testing.assert_close(state.cov, posterior.cov, rtol=0, atol=5e-3)


@pytest.mark.parametrize("sde", [EDM(sigma_max=20.0), RectifiedFlow()], ids=lambda sde: sde.name)
def test_pigdm_on_other_processes(sde: Process) -> None:
    law = isotropic(1.0)
    prediction = "v" if isinstance(sde, RectifiedFlow) else "x0"  # the former starts at alpha = 0
    posterior = law.given(H, Y, 0.3)
    options = {"sde": sde, "prediction": prediction, "steps": 40, "solver": "ddim"}
    x = exact(network(law, sde, prediction), **options)(4, measurement=PiGDM(operator, Y, 0.3, tolerance=0))
    expected = exact(network(posterior, sde, prediction), **options)(4)
    # Nothing is added in the row at alpha = 0, which lasts for 1 / 40 of the time, and whose D is wrong by up to 0.7.
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-10 if isinstance(sde, EDM) else 0.7 / 40)


def test_pigdm_linearises_an_operator() -> None:
    """One row of x0-prediction, whose correction is sigma^2 / alpha times that of the score, by a written Jacobian."""
    law = isotropic(1.0)
    sampler = exact(network(law, SDE, "x0"), prediction="x0", steps=3, solver="ddim")
    y = torch.tensor([0.2]).double()
    _, states = sampler(2, trajectory=1, measurement=PiGDM(lambda x: x.prod(dim=1, keepdim=True).tanh(), y, 0.1))
    k, x = sampler.table.row(0), states[0]
    alpha, sigma = float(SDE.alpha(k.time)), float(SDE.sigma(k.time))
    slope = alpha / (alpha**2 + sigma**2)  # data = slope x for unit variance
    for i in range(2):
        data = slope * x[i]
        jacobian = (1 - data.prod().tanh() ** 2) * data.prod() / data
        r2 = sigma**2 / (alpha**2 + sigma**2)
        gain = (y - data.prod().tanh()) / (r2 * jacobian @ jacobian + 0.01)
        f = data + sigma**2 / alpha * slope * jacobian * gain
        torch.testing.assert_close(states[1][i], k.A[0][0] * x[i] + k.b[0] * f, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("jacobian", "moved"), [(0.5, 0.9 * 0.5 * 2**0.5), (30.0, 9.0), (-1.0, 0.0)])
def test_pigdm_moves_the_data_prediction_neither_far_past_y_nor_away(jacobian: float, moved: float) -> None:
    """One row from x = 0 at alpha^2 = sigma^2 = r^2 = 1/2 with D = jacobian x and y = 0.9, measured directly.

    The term jacobian y / r^2 moves D by sigma^2 / alpha times that, sqrt(2) jacobian y, unless this is limited.
    """
    t = float(solvers.times.time_of(SDE, torch.ones(1).double()))
    options = {"prediction": "x0", "solver": "ddim", "steps": 1, "t_start": t, "t_end": t / 2}
    sampler = Sampler(lambda x, t: jacobian * x, (1,), backend="reference", dtype=torch.float64, **options)
    measurement = PiGDM(lambda x: x, torch.tensor([0.9], dtype=torch.float64))
    x = sampler(1, x_init=torch.zeros(1, 1), measurement=measurement)
    assert float(x) == pytest.approx(sampler.table.row(0).b[0] * moved, rel=1e-9)


def test_conjugate_gradients_solve_each_sample_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(5, 6, 6, generator=generator).double()
    factors[2] *= 1e3
    factors[3, :, 3:] = 0  # singular
    matrices = factors @ factors.mT
    b = (matrices @ torch.randn(5, 6, 1, generator=generator).double())[..., 0]
    b[4] = 0

    def solve(part: slice) -> Tensor:
        return conjugate_gradient(lambda u: (matrices[part] @ u[..., None])[..., 0], b[part], 100, 0.0)[0]

    u = solve(slice(None))
    torch.testing.assert_close((matrices @ u[..., None])[..., 0] / b.norm(), b / b.norm(), rtol=0, atol=1e-12)
    assert torch.equal(u[4], torch.zeros(6).double())
    for i in range(5):
        torch.testing.assert_close(solve(slice(i, i + 1))[0], u[i], rtol=1e-10, atol=1e-12)


# DPS ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddpm", "euler_maruyama"])
def test_dps_takes_the_steps_of_algorithm_1(solver: str) -> None:
    """Each step of Chung et al. 2023, algorithm 1, written with the gradients of a linear operator.

    zeta_i = zeta' / |y - A(x_0)|, and scale is 2 zeta', for which zeta_i grad |.|^2 = scale grad |.|.
    """
    model, scale, keys = network(isotropic(0.8), SDE), 0.2, noise.sample_keys(0, 4)
    sampler = exact(model, solver=solver, steps=15)
    _, states = sampler(4, trajectory=1, measurement=DPS(operator, Y, scale))
    for row, x in enumerate(states[:-1]):
        t = float(sampler.table.time[row])
        alpha, sigma = float(SDE.alpha(t)), float(SDE.sigma(t))
        score = model(x, torch.full((4,), t, dtype=torch.float64))
        residual = Y - (x + sigma**2 * score) / alpha @ H.T
        jacobian = (torch.eye(3).double() + sigma**2 * isotropic(0.8).at(SDE, t)[0]) / alpha
        gradient = -2 * residual @ H @ jacobian  # of the squared norm
        ahead = reference.solver_step((x,), score, sampler.table, row, keys=keys)[0]
        expected = ahead - (scale / 2 / residual.norm(dim=1, keepdim=True)) * gradient
        torch.testing.assert_close(states[row + 1], expected, rtol=0, atol=1e-12)


def test_dps_takes_the_same_steps_on_every_process() -> None:
    """On EDM's process at sigma = sigma_vp / alpha_vp, x is that of the variance-preserving one over alpha_vp."""
    law, times = isotropic(1.0), torch.tensor([0.9, 0.5, 0.2, 0.05]).double()
    ratios = SDE.sigma(times) / SDE.alpha(times)
    x, alpha, edm = torch.tensor([[0.3, -1.0, 0.8]]).double(), SDE.alpha(times), EDM(sigma_max=200.0)
    ends = []
    for sde, points, start in ((SDE, times, x), (edm, ratios, x / alpha[0])):
        sampler = exact(
            network(law, sde, "eps"), sde=sde, prediction="eps", solver="ddim", steps=1,
            t_start=float(points[0]), t_end=float(points[1]),
        )  # fmt: skip
        ends.append(sampler(1, x_init=start, measurement=DPS(operator, Y, 0.5)))
    torch.testing.assert_close(ends[1] * alpha[1], ends[0], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_bias_of_dps() -> None:
    """y is met up to about half the scale; what is not measured goes too far, from 0.8 to 0.94, and spreads too little.

    The step along y has the length of the scale however small the misfit is, and pulls the rest along by the
    correlation at that time, which is stronger in x_t's estimate of the data than in the data.
    """
    law = Law(torch.zeros(2).double(), torch.tensor([[1.0, 0.8], [0.8, 1.0]]).double())
    y, one = torch.tensor([1.0]), torch.eye(2).double()[:1]
    posterior = law.given(one, y.double(), 0.0)  # mean (1, 0.8), variance (0, 0.36)
    sampler = Sampler(network(law, SDE), (2,), steps=500)
    x = sampler(4000, measurement=DPS(lambda x: x[:, :1], y, 0.1)).double()
    assert float(x[:, 0].mean()) == pytest.approx(1.0, abs=0.01)
    assert 0.04 < float(x[:, 0].std()) < 0.07
    error = 0.6 / 4000**0.5  # of the mean of the other
    assert float(x[:, 1].mean() - posterior.mean[1]) == pytest.approx(0.145, abs=4 * error)
    assert 0.28 < float(x[:, 1].var()) < 0.34 < float(posterior.cov[1, 1])


def test_dps_without_misfit_stands_still() -> None:
    sampler = exact(network(isotropic(1.0), SDE), steps=3)
    x = sampler(2, measurement=DPS(lambda x: 0 * x[:, :1], torch.zeros(1)))
    assert torch.equal(x, sampler(2))


# Classifier guidance ------------------------------------------------------------------------------------------------


def test_classifier_guidance_by_the_exact_likelihood_gives_the_posterior() -> None:
    law = isotropic(0.8)
    posterior = law.given(H, Y, 0.3)

    def log_prob(x: Tensor, t: Tensor) -> Tensor:
        """log N(y; H E[x_0 | x_t], H cov[x_0 | x_t] H^T + 0.09)"""
        alpha, sigma = float(SDE.alpha(float(t[0]))), float(SDE.sigma(float(t[0])))
        total = (alpha * 0.8) ** 2 + sigma**2
        cov = (0.8 * sigma) ** 2 / total * H @ H.T + 0.09 * torch.eye(2).double()
        rest = Y - alpha * 0.64 / total * x @ H.T
        return -0.5 * (rest @ torch.linalg.inv(cov) * rest).sum(dim=1)

    for prediction in ("score", "v"):
        options = {"prediction": prediction, "steps": 12}
        guided = exact(network(law, SDE, prediction), guidance=ClassifierGuidance(log_prob), **options)
        expected = exact(network(posterior, SDE, prediction), **options)(4)
        torch.testing.assert_close(guided(4), expected, rtol=0, atol=1e-10)


def test_the_scale_multiplies_the_gradient() -> None:
    tilt = torch.tensor([1.0, -2.0, 0.5])
    guidance = ClassifierGuidance(lambda x, t: (x @ tilt.to(x)) * (1 - t), scale=3.0)
    x = exact(lambda x, t: -x, guidance=guidance, steps=7)(3)
    expected = exact(lambda x, t: -x + 3 * tilt.to(x) * (1 - t[:, None]), steps=7)(3)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)


def test_classifier_guidance_and_a_measurement_add_up() -> None:
    tilt, law = torch.tensor([0.4, 0.0, -0.2]), isotropic(0.8)
    guidance = ClassifierGuidance(lambda x, t: x @ tilt.to(x))
    x = exact(network(law, SDE), guidance=guidance, steps=7)(3, measurement=PiGDM(operator, Y, 0.3, 0.8))
    posterior = network(law.given(H, Y, 0.3), SDE)
    expected = exact(lambda x, t: posterior(x, t) + tilt.to(x), steps=7)(3)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-10)
    assert math.isfinite(float(x.sum()))
