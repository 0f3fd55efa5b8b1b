"""Samples encoded upwards and decoded downwards come back, within what the docstring of `fastsde.encode` states."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_likelihood import closed_form, exact, marginal, options, points

import fastsde
from fastsde import EDM, VPSDE, RectifiedFlow, data, decode, encode, solvers
from fastsde.sde import Process
from fastsde.solvers import REGISTRY

QUIET = [name for name, kind in REGISTRY.items() if not kind.variants[0].noise]


def test_the_swiss_roll_comes_back() -> None:
    x = data.swiss_roll(400, seed=1).x
    z = encode("swiss-roll", x)
    assert float((decode("swiss-roll", z) - x).abs().max()) < 3e-3  # as stated by encode
    assert abs(float(z.std()) - 1) < 0.1
    assert abs(float(z.mean())) < 0.1


@pytest.mark.slow
def test_digits_come_back() -> None:
    given = {"label": torch.arange(4)}
    how: dict[str, Any] = {"solver": "dpm_solver_pp_2m", "spacing": "log_snr", "t_end": 1e-4, "model_kwargs": given}
    x = fastsde.sample("mnist", (4, 1, 28, 28), steps=25, **how)
    back = decode("mnist", encode("mnist", x, model_kwargs=given), model_kwargs=given)
    assert float((back - x).abs().max()) < 1e-2  # as stated by encode
    other = decode("mnist", encode("mnist", x, steps=20), model_kwargs=given, steps=20)
    assert float((other - x).abs().max()) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("solver", QUIET)
@pytest.mark.parametrize("sde", [VPSDE(), EDM()], ids=str)
def test_latents_are_those_of_the_exact_flow(sde: Process, solver: str) -> None:
    x, t = points(), 0.05 * sde.t_max
    how: dict[str, Any] = options(sde, "v", solver=solver, steps=120)
    z = encode(exact(sde, "v"), x, t_start=t, **how)
    (mean, std), (end, end_std) = marginal(sde, t), marginal(sde, sde.t_max)
    expected = end + end_std / std * (x - mean)
    accuracy = 0.1 if REGISTRY[solver].variants[0].order == 1 else 5e-3
    assert float(((z - expected) / end_std).abs().max()) < accuracy
    back = decode(exact(sde, "v"), z, t_end=t, **how)
    assert float((back - x).abs().max()) < 2 * accuracy
    assert torch.isfinite(closed_form(sde, x, t)).all()


def test_rectified_flow_encodes_clean_data() -> None:
    sde, x = RectifiedFlow(), points()
    how: dict[str, Any] = options(sde, "flow", solver="rk4", steps=80, spacing="uniform")
    z = encode(exact(sde, "flow"), x, t_start=0.0, **how)
    torch.testing.assert_close(decode(exact(sde, "flow"), z, t_end=0.0, **how), x, rtol=0, atol=1e-3)


def test_encoding_is_the_upward_table_and_decoding_is_sampling() -> None:
    model, x = fastsde.models.MLP(shape=(2,), hidden=(8,)), torch.randn(5, 2)
    how: dict[str, Any] = {"solver": "heun", "steps": 6, "spacing": "log_snr", "prediction": "eps"}
    up = solvers.build("heun", VPSDE(), 6, t_start=1e-4, t_end=1.0, spacing="log_snr", prediction="eps")
    z = fastsde.sample(model, (5, 2), solver=up, steps=6, x_init=x)
    assert torch.equal(encode(model, x, **how), z)
    assert torch.equal(decode(model, z, **how), fastsde.sample(model, (5, 2), x_init=z, t_end=1e-4, **how))
    assert encode(model, x[:0], **how).shape == (0, 2)
    torch.testing.assert_close(encode(model, x, max_batch=2, **how), z)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"solver": "ddpm"}, ValueError, "solver='ddpm' cannot run from data to noise: .* only a solver without noise"),
        ({"solver": "ddim", "solver_options": {"eta": 1.0}}, ValueError, "solver='ddim' cannot run from data to noise"),
        ({"solver": "nobody"}, ValueError, "solver must be one of"),
        ({"solver": 3}, TypeError, "solver must be a str, got int"),
        ({"t_start": 1.0}, ValueError, r"t_start must be in \[0, 1\), got 1.0"),
        (
            {"t_start": 0.0},
            ValueError,
            "cannot run from data to noise: sigma must be positive",
        ),
        ({"sde": fastsde.RectifiedFlow()}, ValueError, "alpha must be positive.*heun or rk4"),
        ({"t_start": "0"}, TypeError, "t_start must be a number"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"x": torch.zeros(2, 3, dtype=torch.uint8)}, TypeError, "x must be floating-point, got torch.uint8"),
        ({"x": torch.full((2, 3), math.nan)}, ValueError, "x must be finite"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"model": "swiss-roll"}, ValueError, r"sample_shape of the checkpoint is \(2,\), got \(3,\)"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"model": lambda x, t: -x, "x": torch.zeros(2, 3), "steps": 4}
    with pytest.raises(kind, match=message):
        encode(**{**good, **changes})


def test_decode_names_a_solver_with_noise() -> None:
    with pytest.raises(ValueError, match="solver='euler_maruyama' cannot run from data to noise"):
        decode("swiss-roll", torch.zeros(2, 2), solver="euler_maruyama")
