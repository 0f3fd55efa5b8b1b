"""Predictor-corrector sampling, and Langevin rows of a table, whose steps are sized by norms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsde
from fastsde import VESDE, VPSDE, RectifiedFlow, Sampler, StepTable, noise, ops, reference, solvers
from fastsde.sde import Process, match_dims

FLOAT64 = torch.float64
MEAN, STD = 0.7, 0.5


def linspace(intervals: int, end: float = 0.05) -> Tensor:
    return torch.linspace(1, end, intervals + 1, dtype=FLOAT64)


def gaussian_score(sde: Process, mean: float = MEAN, std: float = STD) -> Any:
    def score(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (match_dims(each, x) for each in (sde.alpha(t), sde.sigma(t)))
        return -(x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    return score


def tanh_score(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(2 * x) + match_dims(t, x) - x


# The algorithm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrector_steps", [1, 2])
@pytest.mark.parametrize(("sde", "end"), [(VPSDE(), 0.05), (VPSDE(), 0.0), (VESDE(), 0.0)], ids=str)
def test_samples_are_those_of_algorithm_1(sde: Process, end: float, corrector_steps: int) -> None:
    """Algorithm 1 with the correctors of algorithms 4 and 5 of arXiv:2011.13456, and Euler-Maruyama as predictor."""
    r, n, times = 0.2, 5, linspace(6, end)
    row, keys = 0, noise.sample_keys(3, n)

    def draw() -> Tensor:
        nonlocal row
        row += 1
        return noise.normal(keys, row, (2, 3)).double()

    x = sde.prior_std * noise.normal(keys, 0, (2, 3)).double()
    lower = [*times[2:], torch.tensor(0.0, dtype=FLOAT64)]
    for t, after, below in zip(times[:-1], times[1:], lower, strict=True):
        h, rate = t - after, sde.squared_diffusion(t)
        score = tanh_score(x, t.expand(n))
        x = x - (sde.drift_coefficient(t) * x - rate * score) * h + (rate * h).sqrt() * draw()
        for _ in range(corrector_steps if sde.sigma(after) > 0 else 0):
            z, g = draw(), tanh_score(x, after.expand(n))
            alpha_i = (sde.alpha(after) / sde.alpha(below)) ** 2
            norms = [math.sqrt(float(zi.square().sum() / gi.square().sum())) for zi, gi in zip(z, g, strict=True)]
            eps = torch.tensor([2 * float(alpha_i) * (r * norm) ** 2 for norm in norms]).double().reshape(n, 1, 1)
            x = x + eps * g + (2 * eps).sqrt() * z
    table = solvers.predictor_corrector(sde, times, corrector_steps=corrector_steps, snr=r, max_size=None)
    assert len(table) == row
    given: dict[str, Any] = {"sde": sde, "solver": table, "seed": 3}
    ours = fastsde.sample(tanh_score, (n, 2, 3), dtype=torch.float64, **given)
    torch.testing.assert_close(ours, x, rtol=1e-6, atol=1e-6)  # norms were rounded by float()
    low = fastsde.sample(tanh_score, (n, 2, 3), backend="eager", **given)
    torch.testing.assert_close(low.double(), x, rtol=0, atol=1e-5 * max(10.0, float(x.abs().max())))


def test_alpha_i_is_that_of_ddpm() -> None:
    """With betas that are steps of the VP-SDE, exp(-integral of beta) = 1 - beta_i + O(beta_i^2)."""
    sde, times = VPSDE(), linspace(1000, 0.001)
    snr = solvers.predictor_corrector(sde, times, snr=1.0).snr
    alpha_i = 1 - sde.beta(times[1:-1]) / 1001
    torch.testing.assert_close(snr[1:-1:2].square(), alpha_i, rtol=0, atol=(20 / 1000) ** 2)
    assert (solvers.predictor_corrector(VESDE(), linspace(9), snr=0.3).snr[1::2] == 0.3).all()


def test_no_step_is_longer_than_tweedies() -> None:
    """Single elements of two points, between which the score is 0 and the paper's step has no bound."""
    sde = VPSDE()

    def score(x: Tensor, t: Tensor) -> Tensor:  # of the points 1 and -1
        alpha, sigma = (match_dims(each, x) for each in (sde.alpha(t), sde.sigma(t)))
        return (alpha * torch.tanh(alpha * x / sigma**2) - x) / sigma**2

    bounded, unbounded = (
        solvers.build("predictor_corrector", sde, 101, solver_options={"max_size": size}) for size in (0.5, None)
    )
    langevin = bounded.snr > 0
    torch.testing.assert_close(bounded.eps_max[langevin], 0.5 * sde.sigma(bounded.time[langevin]) ** 2)
    kept, thrown = (fastsde.sample(score, (1000, 1), solver=table).abs().max() for table in (bounded, unbounded))
    assert kept < 2 < thrown


def test_rows_and_their_times() -> None:
    table = solvers.build("predictor_corrector", VPSDE(), 5)
    torch.testing.assert_close(table.time, torch.tensor([1, 2 / 3, 2 / 3, 1 / 3, 1 / 3], dtype=FLOAT64))
    assert (table.snr > 0).tolist() == [False, True, False, True, False]
    assert torch.equal(table.A.flatten()[1::2], torch.ones(2, dtype=FLOAT64))
    two = solvers.build("predictor_corrector", VPSDE(), 8, t_end=0.1, solver_options={"corrector_steps": 2})
    assert (two.snr > 0).tolist() == [False, True, True] * 2 + [False, True]
    none = solvers.build("predictor_corrector", VPSDE(), 8, solver_options={"corrector_steps": 0})
    assert torch.equal(none.packed, solvers.build("euler_maruyama", VPSDE(), 8).packed)
    denoised = solvers.build("predictor_corrector", VPSDE(), 6, denoise=True)
    assert denoised.snr[-1] == 0
    assert len(denoised.head(2)) == 2
    assert denoised.head(2).snr[1] > 0


@pytest.mark.parametrize("predictor", ["ddim", "exponential_euler_maruyama", "euler_ancestral", "ddpm"])
@pytest.mark.parametrize("sde", [VPSDE(), RectifiedFlow()], ids=str)
def test_any_step_without_history_predicts(sde: Process, predictor: str) -> None:
    options: dict[str, Any] = {"t_start": 0.9 * sde.t_max, "prediction": "v"}
    table = solvers.build("predictor_corrector", sde, 9, solver_options={"predictor": predictor}, **options)
    alone = solvers.build(predictor, sde, 5, **options)
    assert torch.equal(table.packed[::2], alone.packed)


@pytest.mark.parametrize("prediction", solvers.PREDICTIONS)
def test_predictions_of_one_network_give_the_same_samples(prediction: str) -> None:
    sde = VPSDE()

    def model(x: Tensor, t: Tensor) -> Tensor:
        score, alpha, sigma = gaussian_score(sde)(x, t), match_dims(sde.alpha(t), x), match_dims(sde.sigma(t), x)
        eps = -sigma * score
        x_0 = (x - sigma * eps) / alpha
        return {"score": score, "eps": eps, "x0": x_0, "v": alpha * eps - sigma * x_0, "flow": eps - x_0}[prediction]

    given: dict[str, Any] = {"solver": "predictor_corrector", "steps": 9, "dtype": torch.float64}
    ours = fastsde.sample(model, (4, 3), prediction=prediction, **given)
    torch.testing.assert_close(ours, fastsde.sample(gaussian_score(sde), (4, 3), **given), rtol=1e-9, atol=1e-9)


# Its samples --------------------------------------------------------------------------------------------------------


def deviation(table: StepTable, n: int = 400, dim: int = 64, **options: Any) -> float:
    x = fastsde.sample(gaussian_score(VPSDE()), (n, dim), solver=table, **options)
    return float(x.double().std())


@pytest.mark.slow
def test_langevin_steps_leave_a_gaussian_as_it_is_but_for_their_size() -> None:
    """In many dimensions |g|^2 is dim v / s^4 for the variance v where s^2 is right, and v settles at (1 + r^2) s^2."""
    sde, t, rows, dim = VPSDE(), 0.3, 300, 64
    right = float((sde.alpha(t) * STD).square() + sde.sigma(t).square()) ** 0.5
    one = torch.ones(rows, dtype=FLOAT64)
    for r in (0.05, 0.2):
        table = StepTable(t * one, one, d=one, e=one, q=one, snr=r * one)
        keys = noise.sample_keys(5, 200)
        x_init = float(sde.alpha(t)) * MEAN + right * noise.normal(keys, 10_000, (dim,))
        x = fastsde.sample(gaussian_score(sde), (200, dim), solver=table, x_init=x_init).double()
        # Four standard errors of a standard deviation of 12,800 values: 2.5 %; 1 / dim of the norms' own variation.
        assert float(x.std()) / right == pytest.approx(math.sqrt(1 + r**2), rel=0.025 + 1 / dim)
        assert float(x.mean()) == pytest.approx(float(sde.alpha(t)) * MEAN, abs=0.04)


@pytest.mark.slow
def test_langevin_steps_in_few_dimensions_settle_at_a_known_variance() -> None:
    dim, r, n = 4, 0.05, 3_000
    one = torch.ones(1_600, dtype=FLOAT64)  # the distance to the mean falls by exp(-2 r^2) a row, over all by e^8
    table = StepTable(0.3 * one, one, d=one, e=one, q=one, snr=r * one)
    x = fastsde.sample(lambda x, t: -x, (n, dim), solver=table).double()
    # Four standard errors: |x|^2 is (1 + 2 / dim) times a chi-squared variable of dim + 2 degrees of freedom. And steps
    # of r^2 that are not short next to the mean.
    error = 4 * math.sqrt(2 / (dim + 2) / n)
    assert float(x.square().mean()) == pytest.approx((1 + 2 / dim) ** 2, rel=error + 8 * r**2)


def test_the_corrector_mends_a_coarse_predictor() -> None:
    sde, end = VPSDE(), 0.05
    right = float((sde.alpha(end) * STD).square() + sde.sigma(end).square()) ** 0.5
    alone = deviation(solvers.euler_maruyama(sde, linspace(8, end)))
    both = deviation(solvers.predictor_corrector(sde, linspace(8, end), corrector_steps=4, snr=0.3))
    assert abs(both - right) < 0.6 * abs(alone - right)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_a_sample_does_not_depend_on_its_batch(backend: str) -> None:
    given: dict[str, Any] = {"solver": "predictor_corrector", "steps": 9, "backend": backend}
    whole = Sampler(tanh_score, (5,), **given)(33)
    split = Sampler(tanh_score, (5,), max_batch=4, **given)(33)
    assert torch.equal(whole, split)
    alone = Sampler(tanh_score, (5,), **given)(1, first_sample=7)
    assert torch.equal(whole[7:8], alone)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_without_a_gradient_the_state_stays(backend: str) -> None:
    one = torch.ones(2, dtype=FLOAT64)
    table = StepTable(one, one, d=one, e=one, q=one, snr=0.1 * one)
    x = noise.normal(noise.sample_keys(0, 3), 0, (4,))
    found = Sampler(lambda x, t: 0 * x, (4,), solver=table, backend=backend)(3, x_init=x)
    assert torch.equal(found, x)


def test_only_the_persistent_engine_does_without() -> None:
    given: dict[str, Any] = {"solver": "predictor_corrector", "steps": 5}
    with pytest.raises(ValueError, match="does not support Langevin rows; use 'eager' or 'reference'"):
        Sampler(fastsde.models.MLP(), (2,), backend="persistent", **given)
    assert Sampler(fastsde.models.MLP(), (2,), **given).backend == "eager"


def test_graphs_run_it(graphs: Any) -> None:
    device = torch.get_default_device()
    for seed, snr in ((0, 0.16), (1, 0.3)):
        options: dict[str, Any] = {"solver": "predictor_corrector", "steps": 3, "solver_options": {"snr": snr}}
        ours, theirs = (
            fastsde.sample(tanh_score_module, (5, 3), backend=backend, seed=seed, device=device, **options)
            for backend in ("graph", "reference")
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert len(graphs.recorded) == 1


class _Tanh(torch.nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return tanh_score(x, t)


tanh_score_module = _Tanh()


@pytest.mark.slow
def test_graphs_run_it_with_guidance(graphs: Any) -> None:
    device = torch.get_default_device()

    class Shifted(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return tanh_score(x, t) + y[:, None]

    model, y = Shifted(), torch.linspace(-1, 1, 5, device=device)
    guidance = fastsde.Guidance(y + 2, interval=(0.3, 0.8), rescale=0.5)
    ours, theirs = (
        Sampler(model, (3,), solver="predictor_corrector", steps=7, guidance=guidance, backend=backend, device=device)(
            5, model_kwargs={"y": y}, uncond_kwargs={"y": 0 * y}
        )
        for backend in ("graph", "reference")
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def test_noise_of_ones_own_sizes_the_steps() -> None:
    seen: list[int] = []

    def own(row: int, x: Tensor) -> Tensor:
        seen.append(row)
        return torch.full_like(x, 0.5)

    given: dict[str, Any] = {"solver": "predictor_corrector", "steps": 5, "noise": own}
    ours, theirs = (fastsde.sample(tanh_score, (3, 4), backend=backend, **given) for backend in ("eager", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert seen == [*range(5), *range(5)]


# Bad input ----------------------------------------------------------------------------------------------------------


def table(**changes: Any) -> StepTable:
    one = torch.ones(3, dtype=FLOAT64)
    return StepTable(**{"time": one, "a": one, "d": one, "e": one, "q": one, "snr": one, **changes})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: table(snr=-torch.ones(3, dtype=FLOAT64)), ValueError, "StepTable.snr must be at least 0, got -1"),
        (lambda: table(snr=torch.ones(3)), TypeError, "StepTable.snr must be a float64 tensor, got torch.float32"),
        (lambda: table(snr=torch.ones(2, dtype=FLOAT64)), ValueError, r"StepTable.snr must have shape \[3\]"),
        (lambda: table(eps_max=torch.zeros(3, dtype=FLOAT64)), ValueError, "StepTable.eps_max must be positive, got 0"),
        (lambda: table(clip=1.0), ValueError, "StepTable.clip must be None in a table with snr above 0, got 1.0"),
        (lambda: table(b=torch.ones(3, dtype=FLOAT64)), ValueError, "snr may be above 0 only where b is zero.* row 0"),
        (lambda: table(e=torch.tensor([1.0, 0, 1], dtype=FLOAT64)), ValueError, "e and d of slot 0 are not; see row 1"),
        (lambda: table(d=None), ValueError, "e and d of slot 0 are not; see row 0"),
        (
            lambda: solvers.build("predictor_corrector", VPSDE(), 4),
            ValueError,
            "no score at t = 0, where sigma is 0: steps must be 1 more than a multiple of 2, .* such as 3 or 5, got 4",
        ),
        *(
            (lambda options=options: solvers.build("predictor_corrector", VPSDE(), 5, solver_options=options), *rest)
            for options, *rest in (
                ({"snr": 0}, ValueError, "snr must be positive and finite, got 0"),
                ({"snr": "low"}, TypeError, "snr must be a number, got str"),
                ({"max_size": 0.0}, ValueError, "max_size must be positive and finite, or None, got 0.0"),
                ({"corrector_steps": -1}, ValueError, "corrector_steps must be at least 0, got -1"),
                ({"corrector_steps": 1.5}, TypeError, "corrector_steps must be an int, got float"),
                ({"predictor": "heun"}, ValueError, "predictor must be the name .* one row an interval, got 'heun'"),
                ({"predictor": "predictor_corrector"}, ValueError, "predictor must be the name of a solver"),
                ({"predictor": "unipc"}, ValueError, "predictor must have no history.*, got 'unipc'"),
                ({"final_rows": 1}, ValueError, r"solver_options\['final_rows'\] is not an option"),
            )
        ),
        (
            lambda: solvers.predictor_corrector(VPSDE(), linspace(2), final_rows=3),
            ValueError,
            r"final_rows must be in \[1, 3\), got 3",
        ),
    ],
)
def test_bad_input_is_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_network_that_returns_infinity_is_reported() -> None:
    for backend, value in itertools.product(("reference", "eager"), (math.nan, math.inf)):
        with pytest.raises(fastsde.NonFiniteError, match="the network returned NaN or infinity in row 1"):
            fastsde.sample(
                lambda x, t, value=value: x if float(t[0]) == 1 else x + value,
                (2, 3),
                solver="predictor_corrector",
                steps=3,
                backend=backend,
            )


def test_a_step_by_itself_is_the_reference_and_has_gradients() -> None:
    one, x = torch.ones(3, dtype=FLOAT64), torch.randn(4, 6)
    pc, keys = table(snr=0.3 * one), noise.sample_keys(0, 4)
    (ours,), (theirs,) = (each.solver_step([x], -x, pc, 1, keys=keys) for each in (ops, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    f = x.clone().requires_grad_()
    ops.solver_step([x], f, pc, 1, keys=keys)[0].sum().backward()
    assert f.grad is not None
    assert f.grad.isfinite().all()
