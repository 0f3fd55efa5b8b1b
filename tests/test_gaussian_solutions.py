"""Every process, prediction and solver on N(mean, std^2) data, whose marginals and probability flow are known exactly.

The exact network for such data is affine in x, and so is each row of a table. Mean and variance of the samples follow
from a recursion in closed form, in float64, without drawing any. New processes and solvers are found in their
registries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsde import StepTable, noise, reference, solvers
from fastsde.sde import PROCESSES, CosineVPSDE, Process
from fastsde.solvers import PREDICTIONS, REGISTRY, SOLVERS

CASES = [kind() for kind in PROCESSES.values()] + [CosineVPSDE(t_max=1.0)]
AFFINE = [name for name in SOLVERS if REGISTRY[name].is_affine]
NEED_REVERSE_SDE = [name for name in AFFINE if not REGISTRY[name].is_on_schedule and REGISTRY[name].variants[0].noise]
NEED_ALPHA = ("score", "eps")  # they do not determine x_0 if alpha is 0


def data_of(sde: Process) -> tuple[float, float]:
    """Returns mean and standard deviation of data as large as the noise in the middle of the trajectory."""
    return 0.8 * sde.prior_std, 0.5 * sde.prior_std


def marginal(sde: Process, t: float) -> tuple[float, float]:
    mean, std = data_of(sde)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    return alpha * mean, alpha**2 * std**2 + sigma**2


def exact_network(sde: Process, prediction: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (w, c) such that w x + c is what a network with that prediction would learn, at each time."""
    mean, std = data_of(sde)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    variance = alpha**2 * std**2 + sigma**2
    x0 = (alpha * std**2 / variance, mean - alpha**2 * std**2 / variance * mean)
    eps = (sigma / variance, -sigma / variance * alpha * mean)
    pairs = zip(x0, eps, strict=True)
    if prediction == "score":
        return -1 / variance, alpha * mean / variance
    w, c = {
        "x0": lambda: x0,
        "eps": lambda: eps,
        "v": lambda: [alpha * e - sigma * x for x, e in pairs],
        "flow": lambda: [e - x for x, e in pairs],
    }[prediction]()
    return w, c


def moments(table: StepTable, sde: Process, prediction: str, start: tuple[float, float]) -> tuple[float, float]:
    """Returns mean and variance of the exact network's samples, from those of the initial state."""
    w, c = (each.numpy() for each in exact_network(sde, prediction, table.time))
    n, p, q, keep, b, e, d = (getattr(table, name).numpy() for name in ("n", "p", "q", "A", "b", "e", "d"))
    into_data = p + (q * w)[:, None] * n
    matrices = keep + (b * w[:, None])[:, :, None] * n[:, None] + e[:, :, None] * into_data[:, None]
    shifts = b * c[:, None] + e * (q * c)[:, None]
    mean, covariance = np.zeros(table.slots), np.zeros((table.slots, table.slots))
    mean[0], covariance[0, 0] = start
    for matrix, shift, column in zip(matrices, shifts, d, strict=True):
        mean = matrix @ mean + shift
        covariance = matrix @ covariance @ matrix.T + np.outer(column, column)
    return float(mean[0]), float(covariance[0, 0])


def refusal(sde: Process, prediction: str, solver: str) -> str | None:
    """Returns the error message if a solver cannot start at t_max."""
    if float(sde.alpha(sde.t_max)) > 0:
        return None
    if REGISTRY[solver].needs_alpha:
        return f"t = {sde.t_max:g}, where alpha is 0"
    return r"where alpha is 0" if prediction in NEED_ALPHA else None


def built(solver: str, sde: Process, steps: int, prediction: str, t_end: float) -> StepTable | None:
    """Returns the table, or None if it cannot be built for the expected reason."""
    message = refusal(sde, prediction, solver)
    if message is None:
        return solvers.build(solver, sde, steps, prediction=prediction, t_end=t_end)
    with pytest.raises(ValueError, match=message):
        solvers.build(solver, sde, steps, prediction=prediction, t_end=t_end)
    return None


def check_order(errors: list[float], order: int, scale: float) -> None:
    """Checks that errors fall as fast as they should when the step is halved, unless they are rounding errors."""
    for coarse, fine in itertools.pairwise(errors):
        assert fine < 1e-12 * scale or math.log2(coarse / fine) > order - 0.3


def check_convergence(
    sde: Process, t_start: float, t_end: float, order: int, make: Callable[[int], tuple[float, float]]
) -> None:
    results, (mean, variance) = [make(steps) for steps in (128, 256, 512)], marginal(sde, t_end)
    check_order([abs(math.sqrt(result[1]) - math.sqrt(variance)) for result in results], order, math.sqrt(variance))
    check_order([abs(result[0] - mean) for result in results], order, math.sqrt(variance))


@pytest.mark.slow
@pytest.mark.parametrize("solver", AFFINE)
@pytest.mark.parametrize("sde", CASES, ids=str)
def test_moments_converge_to_the_marginals(sde: Process, solver: str) -> None:
    end, start = 0.2 * sde.t_max, marginal(sde, sde.t_max)

    def result(steps: int) -> tuple[float, float]:
        table = solvers.build(solver, sde, steps, prediction="v", t_end=end)
        return moments(table, sde, "v", start)

    if built(solver, sde, 4, "v", end) is not None:
        order = min(REGISTRY[solver].variants[0].order, 2)  # if the last row is of first order
        check_convergence(sde, sde.t_max, end, order, result)


@pytest.mark.parametrize("solver", NEED_REVERSE_SDE)
@pytest.mark.parametrize("sde", CASES, ids=str)
def test_the_reverse_sde_converges_from_where_it_exists(sde: Process, solver: str) -> None:
    first, end = 0.9 * sde.t_max, 0.2 * sde.t_max

    def result(steps: int) -> tuple[float, float]:
        times = torch.linspace(first, end, steps + 1, dtype=torch.float64)
        return moments(getattr(solvers, solver)(sde, times, "v"), sde, "v", marginal(sde, first))

    check_convergence(sde, first, end, 1, result)


@pytest.mark.slow
@pytest.mark.parametrize("solver", AFFINE)
@pytest.mark.parametrize("sde", CASES, ids=str)
def test_predictions_of_one_network_give_the_same_samples(sde: Process, solver: str) -> None:
    start = marginal(sde, sde.t_max)
    for end in (0.1 * sde.t_max, 0.0):
        tables = {prediction: built(solver, sde, 9, prediction, end) for prediction in PREDICTIONS}
        results = {
            prediction: moments(table, sde, prediction, start)
            for prediction, table in tables.items()
            if table is not None
        }
        expected = next(iter(results.values()), None)
        assert all(result == pytest.approx(expected, rel=1e-9) for result in results.values()), results


@pytest.mark.slow
@pytest.mark.parametrize("solver", AFFINE)
@pytest.mark.parametrize("sde", CASES, ids=str)
def test_the_reference_draws_what_the_recursion_says(sde: Process, solver: str) -> None:
    x_init = sde.prior_std * torch.tensor([[-1.3], [0.0], [0.7]], dtype=torch.float64)
    for prediction in PREDICTIONS:
        table = built(solver, sde, 5, prediction, 0.1 * sde.t_max)
        if table is None:
            continue

        def model(x: Tensor, t: Tensor, prediction: str = prediction) -> Tensor:
            w, c = exact_network(sde, prediction, t[:, None])
            return w * x + c

        x = reference.sample(
            model,
            x_init.shape,
            table,
            noise.sample_keys(0, len(x_init)),
            x_init=x_init,
            noise_function=lambda row, x: torch.zeros_like(x),
            dtype=torch.float64,
        )
        expected = [moments(table, sde, prediction, (float(start), 0.0))[0] for start in x_init]
        torch.testing.assert_close(x[:, 0].tolist(), expected, rtol=1e-9, atol=1e-9 * sde.prior_std)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sde", CASES, ids=str)
def test_heun_corrects_at_the_end_where_there_is_a_velocity(sde: Process, prediction: str) -> None:
    if refusal(sde, prediction, "heun"):
        with pytest.raises(ValueError, match=f"predicts {prediction} has no velocity at t = 1, where alpha is 0"):
            solvers.heun(sde, [sde.t_max, sde.t_max / 2], prediction)
        return
    sigma, sigma_dot = float(sde.sigma(0.0)), float(sde.sigma_dot(0.0))
    exists = sigma > 0 or prediction == "score" or (prediction != "x0" and math.isfinite(sigma_dot))
    assert len(solvers.heun(sde, [sde.t_max, sde.t_max / 2, 0.0], prediction)) == 4 - (not exists)
    if exists:
        assert len(solvers.build("heun", sde, 4, prediction=prediction)) == 4
        return
    with pytest.raises(ValueError, match=r"takes an odd number of steps.*got steps=4, take 3 or 5"):
        solvers.build("heun", sde, 4, prediction=prediction)
    with pytest.raises(ValueError, match=f"predicts {prediction} has no velocity at t = 0, where sigma is 0"):
        solvers.heun(sde, [sde.t_max, 0.0], prediction, euler_final=False)


def test_rectified_flow_is_straight() -> None:
    # Its velocity is the network's output, and an Euler step is a step of DDIM, even from pure noise.
    sde = PROCESSES["rectified_flow"]()
    ddim = solvers.build("ddim", sde, 4, prediction="flow")
    heun = solvers.build("heun", sde, 1, prediction="flow")
    torch.testing.assert_close(ddim.A.flatten(), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(ddim.b.flatten(), torch.full((4,), -0.25, dtype=torch.float64), rtol=0, atol=1e-15)
    assert (heun.A.tolist(), heun.b.tolist()) == ([[[1.0]]], [[-1.0]])


@pytest.mark.parametrize("name", ["edm", "ve"])
def test_ddim_is_the_euler_step_of_edm(name: str) -> None:
    # Karras et al. 2022, algorithm 1: x' = x + (sigma' - sigma) (x - D) / sigma.
    sde = PROCESSES[name]()
    table = solvers.build("ddim", sde, 6, prediction="x0", t_end=0.1 * sde.t_max)
    ends = torch.tensor([0.1 * sde.t_max], dtype=torch.float64)
    sigma = sde.sigma(torch.cat((table.time, ends)))
    step = sigma.diff() / sigma[:-1]
    torch.testing.assert_close(table.A.flatten(), 1 + step, rtol=1e-14, atol=0)
    torch.testing.assert_close(table.b.flatten(), -step, rtol=1e-14, atol=0)
