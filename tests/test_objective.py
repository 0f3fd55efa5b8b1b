"""Coefficients of every process, prediction, weighting and preconditioning, against their definitions in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastsde import EDM, VPSDE, noise, reference
from fastsde.objective import Coefficients, Objective
from fastsde.sde import PROCESSES, Process, RectifiedFlow
from fastsde.vocabulary import PREDICTIONS, WEIGHTINGS

FLOAT64 = torch.float64
T = torch.tensor([1e-4, 1e-3, 0.03, 0.2, 0.5, 0.9, 0.99], dtype=FLOAT64)
GRID = torch.arange(4 * 3, dtype=FLOAT64).reshape(4, 3)
# For each prediction and weighting the loss, and the sum of its gradient times the noise, as computed by
# `fastsde.reference` when it implemented each objective separately.
RECORDED = {
    ("score", "sigma2"): (1.00483353990802, 0.946256480763707),
    ("score", "likelihood"): (1105.15508557472, 23.2186305987471),
    ("score", "target"): (10632.2558965515, 72.1546919442843),
    ("eps", "sigma2"): (1.27595656923137, -1.56469454640881),
    ("eps", "likelihood"): (2636.98806581055, -2512.46287300908),
    ("eps", "target"): (1.27595656923137, -1.56469454640881),
    ("x0", "sigma2"): (16132.1145156051, -22016.9731408021),
    ("x0", "likelihood"): (162610562.888837, -222527583.799054),
    ("x0", "target"): (1.05165179783434, -0.0475652683368863),
    ("v", "sigma2"): (0.635248985586869, -0.683199622203741),
    ("v", "likelihood"): (2623.61982652925, -2493.92889833552),
    ("v", "target"): (1.00341154911043, -0.767839424971358),
}


SDES = [*(kind() for kind in PROCESSES.values()), VPSDE(0.0, 3.0)]


def _before_the_end(sde: Process, *given: Any) -> Objective:
    """Returns an objective that stops before t_max, where rectified flow has alpha = 0 and no score."""
    return Objective(sde, *given, t_max=0.99 * sde.t_max)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sde", SDES, ids=str)
def test_the_loss_is_the_weighted_error_of_the_score(sde: Process, prediction: str, weighting: str) -> None:
    k = _before_the_end(sde, prediction, weighting).coefficients(T, FLOAT64)
    alpha, sigma, g = sde.alpha(T), sde.sigma(T), sde.diffusion(T)
    assert torch.equal(torch.stack(k[:3]), torch.stack([T, alpha, sigma]))
    f, x_0, z = (torch.randn(len(T), dtype=FLOAT64) for _ in range(3))
    x_t = alpha * x_0 + sigma * z
    # The score that an output corresponds to, and the ideal output.
    score, target = {
        "score": (f, -z / sigma),
        "eps": (-f / sigma, z),
        "x0": ((alpha * f - x_t) / sigma**2, x_0),
        "v": (-(sigma * x_t + alpha * f) / (alpha**2 + sigma**2) / sigma, alpha * z - sigma * x_0),
        "flow": (-(x_t + alpha * f) / (alpha + sigma) / sigma, z - x_0),
    }[prediction]
    weight = {"sigma2": sigma**2, "likelihood": g**2, "target": None}[weighting]
    expected = (f - target) ** 2 if weight is None else weight * (score + z / sigma) ** 2
    residual = k.w_f * f + k.w_x * x_0 + k.w_z * z
    # The definition subtracts scores of order 1 / sigma^2, and the difference is of order 1 / sigma.
    torch.testing.assert_close(residual**2, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize(("prediction", "weighting"), RECORDED)
def test_values_are_those_recorded(prediction: str, weighting: str) -> None:
    t = torch.tensor([1e-4, 0.03, 0.5, 1.0], dtype=FLOAT64)
    f, x_0, z = (torch.cos(GRID * k + 1) for k in (1.0, 2.0, 3.0))
    f.requires_grad_()
    table = Objective(VPSDE(), prediction, weighting).table(t, FLOAT64)
    loss = reference.dsm_loss(f, x_0, None, 0, table, z=z)
    (grad,) = torch.autograd.grad(loss, f)
    assert (float(loss.detach()), float((grad * z).sum())) == pytest.approx(RECORDED[prediction, weighting], rel=1e-12)
    assert float(reference.perturb(x_0, None, 0, table, z=z).x_in.sum()) == pytest.approx(-0.4052587985037204)


def test_the_forms_of_the_design() -> None:
    alpha, sigma = VPSDE().alpha(T), VPSDE().sigma(T)
    one, zero = torch.ones_like(T), torch.zeros_like(T)
    for prediction, weighting, expected in (
        ("score", "sigma2", (sigma, zero, one)),
        ("eps", "sigma2", (one, zero, -one)),
        ("v", "target", (one, sigma, -alpha)),
        ("flow", "target", (one, one, -one)),
        ("x0", "target", (one, -one, zero)),
    ):
        k = Objective(VPSDE(), prediction, weighting).coefficients(T, FLOAT64)
        assert torch.equal(torch.stack(k[3:]), torch.stack(expected)), prediction


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("sde", SDES, ids=str)
def test_edms_preconditioning_is_table_1_of_its_paper(sde: Process, weighting: str) -> None:
    data = 0.7
    k = _before_the_end(sde, "x0", weighting, "edm", data).coefficients(T, FLOAT64)
    level = sde.sigma(T) / sde.alpha(T)  # the paper's sigma, that of x_t / alpha
    norm = torch.sqrt(level**2 + data**2)
    c_skip, c_out, c_in, c_noise = data**2 / norm**2, level * data / norm, 1 / norm, torch.log(level) / 4
    f, x_0, z = (torch.randn(len(T), dtype=FLOAT64) for _ in range(3))
    y = x_0 + level * z
    torch.testing.assert_close(k.tau, c_noise)
    torch.testing.assert_close(k.u_x * x_0 + k.u_z * z, c_in * y)
    denoised = c_skip * y + c_out * f
    weight = {
        "target": (level**2 + data**2) / (level * data) ** 2,
        "sigma2": 1 / level**2,
        "likelihood": (sde.diffusion(T) / sde.sigma(T) / level) ** 2,
    }[weighting]
    residual = k.w_f * f + k.w_x * x_0 + k.w_z * z
    torch.testing.assert_close(residual**2, weight * (denoised - x_0) ** 2, rtol=1e-7, atol=0)
    if weighting == "target":
        assert torch.equal(k.w_f, torch.ones_like(T))


@pytest.mark.parametrize("prediction", ["score", "eps", "v", "flow"])
def test_nothing_divides_by_a_small_sigma(prediction: str) -> None:
    t = torch.tensor([0.0, 1e-30, 1e-12], dtype=FLOAT64)
    k = Objective(VPSDE(), prediction, "sigma2").coefficients(t, FLOAT64)
    assert torch.stack(k).isfinite().all()
    assert torch.stack(k).abs().max() <= 1
    k = Objective(VPSDE(), "x0", "target", "edm").coefficients(t[1:], FLOAT64)
    assert torch.stack(k[1:]).isfinite().all()


def test_shapes_and_dtypes() -> None:
    objective = Objective(prediction="eps")
    for shape in ((), (5,), (2, 3), (0,)):
        t = torch.rand(shape) * 0.9 + 0.1
        k, table = objective.coefficients(t), objective.table(t)
        assert {each.shape for each in k} == {t.shape}
        assert {each.dtype for each in k} == {torch.float32}
        assert table.shape == (*shape, 6)
        assert table.is_contiguous()
        assert torch.equal(torch.stack(k, -1), table)
    assert objective.table(torch.rand(3), FLOAT64).dtype == FLOAT64
    assert Coefficients._fields == ("tau", "u_x", "u_z", "w_f", "w_x", "w_z")


def test_uniform_times_are_those_of_the_contract() -> None:
    u = noise.uniform(noise.sample_keys(0, 1000), 5, (), noise.STREAM_TRAINING_TIME)
    assert torch.equal(Objective().draw(u), 1e-4 + (1 - 1e-4) * u)
    assert torch.equal(Objective(EDM()).draw(u), 1e-4 + (80.0 - 1e-4) * u)
    t = Objective(t_min=0.2, t_max=0.6).draw(torch.tensor([0.0, 0.5, 1 - 2.0**-24]))
    torch.testing.assert_close(t, torch.tensor([0.2, 0.4, 0.6]))


def test_lognormal_times_have_their_moments_and_bounds() -> None:
    u = (torch.arange(2.0**16) + 0.5) / 2**16
    objective = Objective(EDM(), "x0", "target", "edm", times="lognormal", t_min=1e-6, time_mean=-1.0)
    t = objective.draw(u.float())
    assert t.dtype == torch.float32
    assert (t.diff() >= 0).all()
    logs = t.double().log()
    assert float(logs.mean()) == pytest.approx(-1.0, abs=1e-3)
    assert float(logs.std()) == pytest.approx(1.2, abs=1e-3)
    ends = objective.draw(torch.tensor([0.0, 1 - 2.0**-24]))
    assert ends.isfinite().all()
    assert float(replace(objective, t_max=2.0).draw(u).max()) == 2.0
    assert float(replace(objective, t_min=0.1).draw(u).min()) == pytest.approx(0.1)


def test_every_prediction_has_an_objective() -> None:
    for prediction in PREDICTIONS:
        assert Objective(prediction=prediction).prediction == prediction


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sde": 0.1}, TypeError, r"sde must be a process such as fastsde.VPSDE\(\), got float"),
        ({"prediction": "noise"}, ValueError, "prediction must be one of score, eps, .* got 'noise'"),
        ({"weighting": "snr"}, ValueError, "weighting must be one of sigma2, likelihood, target, got 'snr'"),
        ({"preconditioning": "vp"}, ValueError, "preconditioning must be one of none, edm, got 'vp'"),
        ({"preconditioning": "edm"}, ValueError, "prediction must be 'x0' with preconditioning 'edm', got 'score'"),
        ({"times": "normal"}, ValueError, "times must be one of uniform, lognormal, importance, got 'normal'"),
        ({"sigma_data": 0.0}, ValueError, "sigma_data must be positive and finite, got 0"),
        ({"time_std": -1.0}, ValueError, "time_std must be positive and finite, got -1"),
        ({"time_mean": math.inf}, ValueError, "time_mean must be finite, got inf"),
        ({"t_min": 0.0}, ValueError, r"t_min must be in \(0, 1\), got 0"),
        ({"t_max": 0.5, "t_min": 0.5}, ValueError, r"t_min must be in \(0, 0.5\), got 0.5"),
        ({"t_max": "1"}, TypeError, "t_max must be a number, got str"),
        (
            {"sde": RectifiedFlow(), "weighting": "likelihood"},
            ValueError,
            r"t_max is 1, where the weighting 'likelihood' of score is not finite for RectifiedFlow\(\): choose",
        ),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Objective(**options)
