"""Solvers that start from pure noise, with alpha = 0 (zero terminal SNR) or almost 0."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastsde
from fastsde import VPSDE, StepTable, noise, reference, solvers
from fastsde.models import MLP

MEAN, STD = 0.7, 0.4
Schedule = tuple[Tensor, Tensor, Tensor]

BUILDERS: dict[str, Callable[..., StepTable]] = {
    "ddim eta=1": functools.partial(solvers.ddim, eta=1.0),
    "dpm_solver_pp_2m to the end": functools.partial(solvers.dpm_solver_pp_2m, lower_order_final=False),
    "unipc to the end": functools.partial(solvers.unipc, lower_order_final=False),
}
STOCHASTIC = ["ddim eta=1"]
for _name, _kind in solvers.REGISTRY.items():
    for _variant in _kind.variants if _kind.is_on_schedule else ():
        _title = " ".join((_name, *(f"{key}={value}" for key, value in _variant.options.items())))
        BUILDERS[_title] = functools.partial(_kind.builder, **_variant.options)
        STOCHASTIC += [_title] * _variant.noise
IN_LOG_SNR = ("dpm", "deis")  # their rows weight earlier ones by ratios of steps in log(alpha / sigma)


def rescaled(alpha: Tensor) -> Tensor:
    """Algorithm 1 of Lin et al. (2024), arXiv:2305.08891, for alpha instead of beta: keeps the first, the last is 0."""
    return (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])


def stable_diffusion_alpha() -> Tensor:
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - beta).cumprod(0).sqrt()


def zero_terminal_snr(steps: int) -> Schedule:
    """Returns alpha, sigma and times of the paper's schedule at "trailing" steps, down to clean data."""
    time = torch.linspace(1000, 0, steps + 1, dtype=torch.float64)[:-1].round() - 1
    alpha = torch.cat((rescaled(stable_diffusion_alpha())[time.long()], torch.ones(1, dtype=torch.float64)))
    return alpha, (1 - alpha**2).sqrt(), time


def gaussian(schedule: Schedule, prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the exact prediction for N(MEAN, STD^2) data, which is affine in x."""
    alpha, sigma, time = (each.tolist() for each in schedule)
    levels = dict(zip(time, zip(alpha, sigma, strict=True), strict=False))

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = levels[float(t[0])]
        variance = alpha**2 * STD**2 + sigma**2
        x0 = MEAN + alpha * STD**2 / variance * (x - alpha * MEAN)
        eps = sigma / variance * (x - alpha * MEAN)
        return {"x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[prediction]

    return model


def moments(model: Callable[[Tensor, Tensor], Tensor], table: StepTable) -> tuple[float, float]:
    """Returns the exact mean and standard deviation of the samples of a table and an affine network.

    The response to each normal is measured: one sample has only zeros, and each other sample has a single 1.
    """
    draws = torch.eye(len(table) + 2, len(table) + 1, dtype=torch.float64).flip(0)
    x = reference.sample(
        model,
        (len(draws), 1),
        table,
        noise.sample_keys(0, len(draws)),
        x_init=draws[:, :1],
        noise_function=lambda row, x: draws[:, row + 1 : row + 2],
        dtype=torch.float64,
    )
    return float(x[0]), float((x[1:] - x[0]).square().sum().sqrt())


def test_the_schedule_is_the_papers() -> None:
    alpha = stable_diffusion_alpha()
    assert alpha[-1] == pytest.approx(0.068265, abs=5e-7)  # table 1 of the paper
    assert (alpha[-1] ** 2 / (1 - alpha[-1] ** 2)).item() == pytest.approx(0.004682, abs=5e-7)
    ours, sigma, time = zero_terminal_snr(10)
    assert (ours[0], sigma[0], time[0], time[-1]) == (0, 1, 999, 99)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["v", *(pytest.param(each, marks=pytest.mark.slow) for each in ("x0", "flow"))])
@pytest.mark.parametrize("name", BUILDERS)
def test_exact_predictions_give_the_data_to_first_order(name: str, prediction: str) -> None:
    errors = []
    for steps in (50, 100, 200):
        schedule = zero_terminal_snr(steps)
        mean, std = moments(gaussian(schedule, prediction), BUILDERS[name](*schedule, prediction))
        assert mean == pytest.approx(MEAN, abs=1e-12)  # every exact prediction has this mean
        errors.append(abs(std - STD))
    assert errors[0] < 0.06
    assert errors[1] < max(0.65 * errors[0], 5e-4)
    assert errors[2] < max(0.65 * errors[1], 5e-4)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
@pytest.mark.parametrize("name", [name for name in BUILDERS if not name.startswith("unipc")])  # no limit
def test_the_table_is_the_limit_of_small_alpha(name: str, prediction: str, clip: float | None) -> None:
    alpha, sigma, time = (each[:-1] for each in zero_terminal_snr(8))  # without the clean end
    table = BUILDERS[name](alpha, sigma, time, prediction, clip=clip)
    distances = []
    for small in (1e-8, 1e-150, 1e-300):
        start = torch.cat((torch.tensor([small], dtype=torch.float64), alpha[1:]))
        other = BUILDERS[name](start, sigma, time, prediction, clip=clip)
        distances.append(float((table.packed - other.packed).abs().max()))
    # A multistep row weights the one before it by the ratio of their h, which tends to 0 like 1 / log(alpha).
    assert distances[-1] < (1e-3 if name.startswith(IN_LOG_SNR) else 1e-12)
    assert distances[0] < (0.05 if name.startswith(IN_LOG_SNR) else 1e-6)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "ddim eta=0.6"])
def test_the_first_row_takes_the_prediction_and_noise(name: str) -> None:
    alpha, sigma, time = zero_terminal_snr(10)
    row = BUILDERS[name](alpha, sigma, time, "x0", clip=2.0).row(0)
    stochastic = name in STOCHASTIC
    assert (row.time, row.q) == (999.0, 1.0)
    assert not any((*row.p, *row.A[0][1:]))
    # eps is x if alpha is 0
    x, z = (0.0, float(sigma[1])) if stochastic else (float(sigma[1]), 0.0)
    assert (row.e[0], row.A[0][0], row.d[0]) == pytest.approx((float(alpha[1]), x, z), abs=1e-15)
    assert not (stochastic and row.b[0])


@pytest.mark.parametrize("prediction", ["score", "eps"])
@pytest.mark.parametrize("name", BUILDERS)
def test_predictions_of_noise_alone_have_no_first_row(name: str, prediction: str) -> None:
    expected = f"prediction='{prediction}' does not determine x_0 where alpha is 0: .* prediction='v', 'x0' or 'flow'"
    with pytest.raises(ValueError, match=expected):
        BUILDERS[name](*zero_terminal_snr(5), prediction)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_every_engine_samples_from_pure_noise(backend: str) -> None:
    table = solvers.ddim(*zero_terminal_snr(10), "v", clip=2.0)
    table = replace(table, time=table.time / 1000)
    model = MLP()
    ours = fastsde.sample(model, (6, 2), solver=table, backend=backend)
    theirs = fastsde.sample(model, (6, 2), solver=table, backend="reference")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


# Next to nothing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", solvers.PREDICTIONS)
@pytest.mark.parametrize("name", ["euler_maruyama", "exponential_euler_maruyama", "heun"])
def test_solvers_without_a_data_prediction_need_no_alpha(name: str, prediction: str) -> None:
    sde = VPSDE(beta_max=2000.0)  # alpha(1) is 7e-218, which underflows in fp32
    table = solvers.build(name, sde, 400, prediction=prediction, t_end=0.001)
    if name == "euler_maruyama" and prediction in ("score", "eps"):
        time = torch.linspace(1, 0.001, 401, dtype=torch.float64)
        rate = sde.beta(time[:-1]) * -time.diff()
        torch.testing.assert_close(table.A[:, 0, 0], 1 + rate / 2, rtol=1e-15, atol=0)
        torch.testing.assert_close(table.b[:, 0], rate if prediction == "score" else -rate / sde.sigma(time[:-1]))
        assert table.p[0] == table.q[0] == 0  # no row reads this one's data prediction
        assert table.p[-1] == 1 / sde.alpha(table.time[-1])


def test_a_schedule_next_to_nothing_names_what_it_needs() -> None:
    assert len(solvers.build("ddpm", VPSDE(beta_max=2000.0), 3, prediction="v")) == 3
    with pytest.raises(ValueError, match=r"where alpha is 6\.9"):
        solvers.build("ddpm", VPSDE(beta_max=2000.0), 3, prediction="eps")
    alpha = torch.tensor([1e-320, 1e-310, 0.5, 1.0], dtype=torch.float64)
    table = solvers.dpm_solver_pp_2m(alpha, (1 - alpha**2).sqrt(), [3, 2, 1], "v")
    assert table.time.tolist() == [3, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_points_that_differ_by_a_rounding_make_finite_rows(name: str) -> None:
    step = 2.0**-53
    for k in range(1, 200):
        alpha = torch.tensor([0.3 + 0.003 * k, 0.3 + 0.003 * k + step * (k % 3 + 1)], dtype=torch.float64)
        sigma = torch.tensor([0.5, 0.5], dtype=torch.float64)
        if alpha[0] < alpha[1]:
            assert len(BUILDERS[name](alpha, sigma, [1.0], "v")) == 1  # its columns are finite, or it raises
