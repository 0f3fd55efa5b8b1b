"""Solvers by name: options, spacing, start, denoising; in `solvers.build`, `sample`, `Sampler` and the command line."""

from __future__ import annotations

import inspect
import math
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastsde
from fastsde import VPSDE, Sampler, StepTable, noise, reference, solvers, subject
from fastsde.cli import main
from fastsde.sde import PROCESSES
from fastsde.solvers import REGISTRY, SOLVERS
from fastsde.solvers.times import spaced
from fastsde.vocabulary import SPACINGS

SDE = VPSDE()


def gaussian(x: Tensor, t: Tensor, std: float = 0.1) -> Tensor:
    """Returns the score of N(0, std^2) data."""
    alpha, sigma = (value.reshape(-1, *(1,) * (x.ndim - 1)) for value in (SDE.alpha(t), SDE.sigma(t)))
    return -x / (alpha**2 * std**2 + sigma**2)


def deviation(table: StepTable) -> float:
    """Returns the exact standard deviation of samples of `gaussian`, from the weights of all independent draws."""
    draws = torch.eye(len(table) + 1, dtype=torch.float64)
    x = reference.sample(
        gaussian,
        (len(draws), 1),
        table,
        noise.sample_keys(0, len(draws)),
        x_init=draws[:, :1],
        noise_function=lambda row, x: draws[:, row + 1 : row + 2],
        dtype=torch.float64,
    )
    return float(x.square().sum().sqrt())


def sampled(**options: Any) -> Tensor:
    return fastsde.sample(gaussian, (6, 2), backend="reference", dtype=torch.float64, **{"steps": 9, **options})


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SOLVERS)
def test_the_rows_of_a_table_are_the_calls_and_have_the_times_of_its_spacing(name: str, spacing: str) -> None:
    kind = REGISTRY[name]
    start = 1.0 if spacing == "leading" else 0.8
    for steps in (1, 5, 9):
        table = solvers.build(name, SDE, steps, spacing=spacing, prediction="v", t_start=start)
        rows = kind.rows_of({})
        intervals = -(-steps // rows)
        expected = spaced(spacing, SDE, intervals, start, 0.0)[:-1]
        assert len(table) == steps
        own = table.time[::rows]
        torch.testing.assert_close(own, expected, rtol=0, atol=0)


# The last denoising step --------------------------------------------------------------------------------------------


def test_denoising_takes_the_noise_that_euler_maruyama_leaves() -> None:
    plain, denoised = (solvers.build("euler_maruyama", SDE, 20, denoise=each) for each in (False, True))
    assert deviation(plain) == pytest.approx(0.264, abs=5e-4)  # where 0.1 is right
    assert deviation(denoised) == pytest.approx(0.1, rel=0.2)
    assert deviation(solvers.build("euler_maruyama", SDE, 50, denoise=True)) == pytest.approx(0.1, rel=0.02)
    assert torch.equal(plain.packed[:-1], denoised.packed[:-1])
    assert torch.equal(plain.time, denoised.time)


@pytest.mark.parametrize("prediction", ["score", "x0"])
@pytest.mark.parametrize("steps", [1, 2, 5, 6])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_last_row_gives_the_data_prediction(name: str, steps: int, prediction: str) -> None:
    kind = REGISTRY[name]
    for clip in (None, 0.5) if "clip" in kind.options else (None,):
        table = solvers.build(name, SDE, steps, prediction=prediction, denoise=True, clip=clip, spacing="quadratic")
        assert len(table) == steps
        slots = torch.linspace(-2, 2, 6 * table.slots, dtype=torch.float64).reshape(table.slots, 2, 3).unbind()
        f = torch.linspace(1, -1, 6, dtype=torch.float64).reshape(2, 3)
        x = reference.solver_step(slots, f, table, steps - 1)[0]
        t = float(table.time[-1])
        assert t > 0
        called_with = reference.network_input(slots, table, steps - 1)
        data = f if prediction == "x0" else (called_with + SDE.sigma(t) ** 2 * f) / SDE.alpha(t)
        expected = data if clip is None else data.clamp(-clip, clip)
        torch.testing.assert_close(x, expected, rtol=1e-13, atol=1e-13)
        assert not table.d[-1].any()


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_pp_2m", "dpm_solver_pp_3m", "unipc", "ddpm", "deis"])
def test_denoising_changes_nothing_where_the_last_step_is_down_to_clean_data(name: str) -> None:
    results = [sampled(solver=name, denoise=each) for each in (False, True)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_denoising_from_pure_noise_needs_a_network_that_knows() -> None:
    flow = PROCESSES["rectified_flow"]()
    assert len(solvers.build("heun", flow, 1, prediction="flow", denoise=True)) == 1
    with pytest.raises(ValueError, match="where alpha is 0"):
        solvers.build("ddim", flow, 1, prediction="eps", denoise=True)


# Options of builders ------------------------------------------------------------------------------------------------


def test_options_reach_the_builder() -> None:
    times = torch.linspace(1, 0, 8, dtype=torch.float64)
    schedule = SDE.alpha(times), SDE.sigma(times), times[:-1]
    for built, expected in (
        (
            solvers.build("unipc", SDE, 7, solver_options={"order": 3, "variant": "bh1"}),
            solvers.unipc(*schedule, "score", order=3, variant="bh1"),
        ),
        (solvers.build("ddim", SDE, 7, eta=0.4), solvers.ddim(*schedule, "score", eta=0.4)),
        (solvers.build("ddim", SDE, 7, solver_options={"eta": 0.4}), solvers.ddim(*schedule, "score", eta=0.4)),
        (
            solvers.build("euler_ancestral", SDE, 7, eta=0.0, clip=1.0),
            solvers.euler_ancestral(*schedule, "score", eta=0.0, clip=1.0),
        ),
    ):
        assert torch.equal(built.packed, expected.packed)
        assert built.clip == expected.clip


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("heun", {"eta": 0.5}), ValueError, "eta .* which heun does not use; pick ddim, euler_ancestral; got 0.5"),
        (("ddim", {"eta": 1.5}), ValueError, r"eta must be in \[0, 1\], got 1.5"),
        (
            ("unipc", {"solver_options": {"oder": 3}}),
            ValueError,
            r"solver_options\['oder'\] is not an option of unipc: its options are order, variant, .*; got 3",
        ),
        (
            ("euler_maruyama", {"solver_options": {"order": 2}}),
            ValueError,
            r"solver_options\['order'\] is not an option of euler_maruyama: it has none; got 2",
        ),
        (
            ("heun", {"solver_options": {"euler_final": True}}),  # steps decide
            ValueError,
            r"solver_options\['euler_final'\] is not an option of heun: it has none; got True",
        ),
        (("unipc", {"solver_options": ["order"]}), TypeError, "solver_options must be a mapping .*, got list"),
        (("unipc", {"solver_options": {"order": 4}}), ValueError, "order must be 1, 2 or 3, got 4"),
        (("unipc", {"solver_options": {"variant": "bh3"}}), ValueError, "variant must be one of bh1, bh2, got 'bh3'"),
        (("deis", {"solver_options": {"order": 2.0}}), TypeError, "order must be an int, got float"),
        (("adams_bashforth", {"solver_options": {"order": 5}}), ValueError, "order must be 1, 2, 3 or 4, got 5"),
        (
            ("dpm_solver_pp_3m", {"solver_options": {"variant": "taylor"}}),
            ValueError,
            "variant must be midpoint or heun, got 'taylor'",
        ),
        (
            ("dpm_solver_pp_2m", {"solver_options": {"stochastic": 1}}),
            TypeError,
            "stochastic must be True or False, got 1",
        ),
        (
            ("dpm_solver_pp_2m", {"solver_options": {"lower_order_final": "no"}}),
            TypeError,
            "lower_order_final must be True or False, got 'no'",
        ),
        (("edm_stochastic", {"solver_options": {"s_churn": -1}}), ValueError, "s_churn must be at least 0 .*, got -1"),
        (("edm_stochastic", {"solver_options": {"s_min": math.nan}}), ValueError, "s_min must be at least 0, got nan"),
        (
            ("ddim", {"eta": 0.5, "solver_options": {"eta": 0.5}}),
            ValueError,
            "eta is given twice, as eta=0.5 and in solver_options",
        ),
        (("ddim", {"denoise": 1}), TypeError, "denoise must be True or False, got 1"),
        (("ddim", {"t_start": 1.5}), ValueError, r"t_start must be in \[0, 1\], got 1.5"),
        (
            ("ddim", {"t_start": 0.5, "t_end": 0.5}),
            ValueError,
            r"t_end must be in \[0, 0.5\) or, to run upwards, .*got 0.5",
        ),
        (("ddim", {"t_start": "late"}), TypeError, "t_start must be a number, got str"),
        (("ddim", {"spacing": "cosine"}), ValueError, "spacing must be one of uniform, .*, got 'cosine'"),
        (("ddim", {"spacing": 7}), ValueError, "spacing must be one of uniform, .*, got 7"),
        (("ddim", {"rho": 5.0}), ValueError, "rho is an option of spacing='karras', got rho=5.0"),
        (("edm_stochastic", {"steps": 6}), ValueError, "takes an odd number of steps.*got steps=6, take 5 or 7"),
    ],
)
def test_bad_options_are_named(arguments: tuple[str, dict[str, Any]], error: type[Exception], message: str) -> None:
    name, options = arguments
    with pytest.raises(error, match=message):
        solvers.build(name, SDE, **{"steps": 5, **options})


# sample and Sampler -------------------------------------------------------------------------------------------------


def test_sample_takes_what_build_takes() -> None:
    taken = set(inspect.signature(solvers.build).parameters) - {"solver", "sde", "steps"}
    assert set(subject.TABLE_DEFAULTS) == taken
    assert set(typing.get_type_hints(subject.TableOptions)) == taken - {"prediction"}
    for function in (fastsde.sample, Sampler.__init__):
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in taken} == subject.TABLE_DEFAULTS


def test_sample_builds_the_table_of_its_options() -> None:
    options = {"spacing": "karras", "rho": 5.0, "t_end": 0.01, "solver_options": {"order": 3}, "denoise": True}
    table = solvers.build("unipc", SDE, 9, **options)
    assert torch.equal(sampled(solver="unipc", **options), sampled(solver=table))
    assert not torch.equal(sampled(solver="unipc", **options), sampled(solver="unipc"))
    for order in ([2], 2.0):  # even if it resembles a known one
        with pytest.raises(TypeError, match=r"order must be an int, got (float|list)"):
            sampled(solver="unipc", solver_options={"order": order})
        sampled(solver="unipc", solver_options={"order": 2})
    eta = sampled(solver="ddim", eta=1.0, t_end=0.1)
    torch.testing.assert_close(eta, sampled(solver="ddpm", t_end=0.1), rtol=1e-10, atol=1e-10)


def test_two_processes_of_the_users_own_are_told_apart() -> None:
    class Scaled(fastsde.VPSDE):  # not a dataclass: two of them are equal and have the same hash
        def __init__(self, factor: float) -> None:
            super().__init__()
            object.__setattr__(self, "factor", factor)

        def integral_beta(self, t: torch.Tensor | float) -> torch.Tensor:
            return self.factor * super().integral_beta(t)

    once, twice = Scaled(1.0), Scaled(2.0)
    assert once == twice
    ours = [sampled(solver="ddim", sde=sde) for sde in (once, twice, fastsde.VPSDE())]
    assert torch.equal(ours[0], ours[2])
    assert not torch.equal(ours[0], ours[1])


@pytest.mark.parametrize(
    "option",
    [
        {"t_start": 1.0},
        {"spacing": "karras"},
        {"rho": 7.0},
        {"eta": 0.0},
        {"solver_options": {}},
        {"denoise": True},
    ],
    ids=str,
)
def test_a_table_has_its_options_in_itself(option: dict[str, Any]) -> None:
    name, value = next(iter(option.items()))
    with pytest.raises(
        ValueError, match=f"{name} is part of the StepTable given as solver: leave it out, got {value!r}"
    ):
        sampled(solver=solvers.build("ddim", SDE, 9), **option)


def test_a_start_in_the_middle_begins_at_x_init() -> None:
    x_0 = 0.1 * torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(6, 2)
    mean, sigma = SDE.marginal_prob(x_0, 0.4)
    x_init = mean + sigma * noise.normal(noise.sample_keys(0, 6), 0, (2,)).double()
    x = sampled(solver="heun", steps=401, t_start=0.4, x_init=x_init)
    # The probability flow of N(0, 0.1^2) data scales x with the marginal's standard deviation.
    spread = math.sqrt(float(SDE.alpha(0.4)) ** 2 * 0.01 + float(SDE.sigma(0.4)) ** 2)
    torch.testing.assert_close(x, x_init * 0.1 / spread, rtol=2e-3, atol=0)
    with pytest.raises(ValueError, match=r"x_init must be given with t_start, as the state at t = 0\.4, got None"):
        sampled(solver="heun", t_start=0.4)
    sampler = Sampler(gaussian, (2,), t_start=0.4, solver="ddim", steps=3, backend="reference", dtype=torch.float64)
    with pytest.raises(ValueError, match="x_init must be given with t_start"):
        sampler(6)
    assert torch.equal(sampler(6, x_init=x_init), sampled(solver="ddim", steps=3, t_start=0.4, x_init=x_init))


def test_the_command_line_passes_the_options_on(tmp_path: Path) -> None:
    words = "sample swiss-roll -n 3 --steps 5 --solver ddim --eta 0.5 --spacing karras --denoise --clip 3 --t-end 0.01"
    file = tmp_path / "x.npz"
    main([*words.split(), "--backend", "reference", "--quiet", "--save", str(file)], standalone_mode=False)
    options = {"solver": "ddim", "steps": 5, "eta": 0.5, "spacing": "karras", "denoise": True, "clip": 3, "t_end": 0.01}
    expected = fastsde.sample("swiss-roll", (3, 2), backend="reference", **options)
    with np.load(file) as saved:
        torch.testing.assert_close(torch.from_numpy(saved[saved.files[0]]), expected, rtol=0, atol=0)


# Churn --------------------------------------------------------------------------------------------------------------


def test_churn_from_the_prior_has_its_exact_distribution() -> None:
    # Before the first interval, the noise that algorithm 2 adds is part of the scale of the prior.
    for sde in (SDE, PROCESSES["edm"](), PROCESSES["ve"]()):
        options = {"s_churn": 2.0, "s_noise": 1.1}
        table = solvers.build("edm_stochastic", sde, 9, solver_options=options)
        rho = float(sde.sigma(sde.t_max) / sde.alpha(sde.t_max))
        hat = rho * 1.4
        assert float(sde.sigma(table.time[0]) / sde.alpha(table.time[0])) == pytest.approx(hat, rel=1e-12)
        of_prior = (sde.prior_std / float(sde.alpha(sde.t_max))) ** 2
        expected = float(sde.alpha(table.time[0])) ** 2 * (of_prior + 1.1**2 * (hat**2 - rho**2))
        assert (float(table.n[0, 0]) * sde.prior_std) ** 2 == pytest.approx(expected, rel=1e-12)
        # A given state is not drawn from the prior, and no noise is added to it first.
        middle = solvers.build("edm_stochastic", sde, 9, t_start=0.9 * sde.t_max, solver_options=options)
        assert float(middle.n[0, 0]) == 1
        assert float(middle.time[0]) == 0.9 * sde.t_max
        assert (middle.d[1:-1:2, 0] > 0).all()


def test_churn_is_within_its_bounds() -> None:
    options = {"s_churn": 100.0, "s_min": 0.5, "s_max": 20.0}
    table = solvers.build("edm_stochastic", SDE, 19, solver_options=options)
    times = torch.linspace(1, 0, 11, dtype=torch.float64)
    rho = SDE.sigma(times) / SDE.alpha(times)
    inside = (rho[1:-1] >= 0.5) & (rho[1:-1] <= 20)
    assert torch.equal(table.d[1:-1:2, 0] > 0, inside)
    starts = SDE.sigma(table.time[::2]) / SDE.alpha(table.time[::2])
    expected = rho[:-1] * (1 + (math.sqrt(2) - 1) * torch.cat((inside.new_zeros(1), inside)).double())
    torch.testing.assert_close(starts, expected, rtol=1e-12, atol=0)
