"""Log densities against closed forms: of Gaussian data, the flow of whose exact network is known; and their parts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsde
from fastsde import (
    EDM,
    VESDE,
    VPSDE,
    CosineVPSDE,
    NonFiniteError,
    RectifiedFlow,
    SubVPSDE,
    bits_per_dim,
    log_prob,
    noise,
)
from fastsde.engines import Network
from fastsde.likelihood.divergence import DEQUANTISATION_STEP, PROBE_STEP, Divergence
from fastsde.sde import Process, match_dims
from fastsde.solvers import PREDICTIONS, AdaptiveODE

FLOAT64 = torch.float64
SDES = (VPSDE(), SubVPSDE(), VESDE(), EDM(), RectifiedFlow(), CosineVPSDE())
MEAN = torch.tensor([0.3, -0.8, 0.1], dtype=FLOAT64)
STD = torch.tensor([0.5, 1.0, 0.2], dtype=FLOAT64)


def marginal(sde: Process, t: Tensor | float) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation ``[..., 3]`` of N(MEAN, diag STD^2) data at a time."""
    t = torch.as_tensor(t, dtype=FLOAT64)
    alpha, sigma = sde.alpha(t)[..., None], sde.sigma(t)[..., None]
    return alpha * MEAN, torch.sqrt(alpha**2 * STD**2 + sigma**2)


def exact(sde: Process, prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the network that training on the Gaussian data would end in."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (match_dims(each(t), x) for each in (sde.alpha, sde.sigma))
        mean, std = marginal(sde, t)
        gap = (x - mean) / std**2
        if prediction == "score":
            return -gap
        eps, x_0 = sigma * gap, MEAN + alpha * STD**2 * gap
        return {"eps": eps, "x0": x_0, "v": alpha * eps - sigma * x_0, "flow": eps - x_0}[prediction]

    return network


def closed_form(sde: Process, x: Tensor, t: float) -> Tensor:
    """Returns the density of the prior carried down the exact flow, x(T) = m_T + s_T / s_t (x - m_t)."""
    (mean, std), (end, end_std) = marginal(sde, t), marginal(sde, sde.t_max)
    return sde.prior_logp(end + end_std / std * (x - mean)) + (end_std / std).log().sum()


def points(n: int = 5) -> Tensor:
    return MEAN + STD * noise.normal(noise.sample_keys(3, n), 0, (3,)).double()


def options(sde: Process, prediction: str = "eps", **more: Any) -> dict[str, Any]:
    return {"sde": sde, "prediction": prediction, "dtype": FLOAT64, **more}


FAST = ("vp-eps", "edm-x0")
CASES = [
    pytest.param(sde, kind, id=name, marks=[] if name in FAST else pytest.mark.slow)
    for sde in SDES
    for kind in PREDICTIONS
    if kind not in ("score", "eps", "x0") or float(sde.alpha(sde.t_max)) > 0
    for name in [f"{sde.name}-{kind}"]
]


@pytest.mark.parametrize(("sde", "prediction"), CASES)
def test_gaussian_densities_are_the_closed_form(sde: Process, prediction: str) -> None:
    x, t = points(), 0.3 * sde.t_max
    got = log_prob(exact(sde, prediction), x, **options(sde, prediction, steps=520, t_start=t))
    assert got.dtype == FLOAT64
    torch.testing.assert_close(got, closed_form(sde, x, t), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sde", [VPSDE(), EDM()], ids=str)
def test_densities_at_the_default_time(sde: Process) -> None:
    got = log_prob(exact(sde, "eps"), points(), **options(sde, steps=1200))
    torch.testing.assert_close(got, closed_form(sde, points(), sde.t_min), rtol=0, atol=1e-6)


def test_the_density_of_standard_normal_data_is_their_own() -> None:
    # On the VP-SDE these stay standard normal at all times, as the prior is.
    x = noise.normal(noise.sample_keys(0, 6), 0, (4,)).double()
    got = log_prob(lambda x, t: -x, x, **options(VPSDE(), "score", steps=8))
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("rk4", 4)])
def test_order_of_convergence(solver: str, order: int) -> None:
    sde, x = VPSDE(), points()
    expected = closed_form(sde, x, 0.01)
    errors = []
    for steps in (32, 64, 128):
        got = log_prob(exact(sde, "v"), x, **options(sde, "v", solver=solver, steps=steps, t_start=0.01))
        errors.append(float((got - expected).abs().max()))
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(order - 0.3 < slope < order + 0.5 for slope in slopes), slopes


@pytest.mark.slow
def test_a_last_interval_of_fewer_rows_keeps_the_integral() -> None:
    sde, x = VPSDE(), points()
    for solver, steps in (("heun", 101), ("rk4", 101), ("rk4", 102), ("rk4", 103)):
        how = options(sde, "v", solver=solver, steps=steps, t_start=0.01, spacing="quadratic")
        torch.testing.assert_close(log_prob(exact(sde, "v"), x, **how), closed_form(sde, x, 0.01), rtol=0, atol=0.1)


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_adaptive_steps_agree(method: str) -> None:
    pytest.importorskip("torchode", exc_type=ImportError)
    sde, x = VPSDE(), points()
    solver = AdaptiveODE(rtol=1e-8, atol=1e-8, method=method)
    got = log_prob(exact(sde, "eps"), x, **options(sde, solver=solver, t_start=1e-3))
    torch.testing.assert_close(got, closed_form(sde, x, 1e-3), rtol=0, atol=1e-6)


# The trace ----------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """f = M x for each sample, times 1 + t."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        f: Tensor = (x.flatten(1) @ self.matrix.T).reshape(x.shape) * match_dims(1 + t, x)
        return f


def matrix(size: int) -> Tensor:
    return noise.normal(noise.sample_keys(5, 1), 0, (size, size))[0].double() / size


def divergence(model: nn.Module, shape: tuple[int, ...], n: int, probes: int, **kwargs: Any) -> Tensor:
    x = noise.normal(noise.sample_keys(1, n), 0, shape).to(next(model.parameters()).dtype)
    keys = noise.sample_keys(0, n)
    t = torch.linspace(0, 1, n).to(x.dtype)
    f, found = Divergence(Network(model), keys, shape, probes)(x, t, kwargs)
    torch.testing.assert_close(f, model(x, t, **kwargs).detach())
    return found


@pytest.mark.parametrize("shape", [(1,), (2,), (63,), (1, 5, 5), (100,)])
def test_the_exact_trace_of_each_sample_at_its_own_time(shape: tuple[int, ...]) -> None:
    weights = matrix(math.prod(shape))
    found = divergence(Linear(weights), shape, 4, 0)
    torch.testing.assert_close(found, weights.trace() * (1 + torch.linspace(0, 1, 4).double()), rtol=0, atol=1e-12)


def test_hutchinson_is_exact_for_diagonal_jacobians() -> None:
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(torch.ones(1, dtype=FLOAT64)))
    model.forward = lambda x, t: torch.sin(x * model.weight)  # type: ignore[method-assign]
    for probes in (1, 3):
        torch.testing.assert_close(divergence(model, (1000,), 3, probes), divergence(model, (1000,), 3, 0))


@pytest.mark.parametrize("probes", [1, 4])
def test_hutchinson_is_unbiased_with_its_known_variance(probes: int) -> None:
    size, n = 6, 4096
    weights = matrix(size)
    keys, x = noise.sample_keys(7, n), torch.zeros(n, size, dtype=FLOAT64)
    _, found = Divergence(Network(Linear(weights)), keys, (size,), probes)(x, torch.zeros(n, dtype=FLOAT64), {})
    off = (weights + weights.T).tril(-1)
    variance = float(off.square().sum()) / probes  # of sum_(i>j) (M_ij + M_ji) e_i e_j
    assert abs(float(found.mean() - weights.trace())) < 4 * math.sqrt(variance / n)
    assert abs(float(found.var()) / variance - 1) < 4 * math.sqrt(14 / n)  # kurtosis of a quadratic form, at most 15


def test_probes_are_signs_of_the_contract() -> None:
    size, n = 5, 3
    weights, keys = matrix(size), noise.sample_keys(9, n, 2)
    e = 1.0 - 2.0 * (noise.bits(keys, PROBE_STEP + 1, (size,), noise.STREAM_OTHER) & 1).double()
    one = 1.0 - 2.0 * (noise.bits(keys, PROBE_STEP, (size,), noise.STREAM_OTHER) & 1).double()
    assert torch.equal(noise.signs(keys, PROBE_STEP + 1, (size,), noise.STREAM_OTHER).double(), e)
    expected = sum(((each @ weights.T) * each).sum(1) for each in (one, e)) / 2
    x, t = torch.zeros(n, size, dtype=FLOAT64), torch.zeros(n, dtype=FLOAT64)
    estimate = Divergence(Network(Linear(weights)), keys, (size,), 2)
    _, found = estimate(x, t, {})
    torch.testing.assert_close(found, expected)
    _, some = estimate(x[1:], t[1:], {}, torch.tensor([1, 2]))
    torch.testing.assert_close(some, expected[1:])


class Refused(torch.autograd.Function):
    """tanh, with a backward pass that vmap refuses: it reads a number on the host."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        assert math.isfinite(grad.sum().item())
        result: Tensor = grad * (1 - x.tanh() ** 2)
        return result


class Detour(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=FLOAT64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = Refused.apply(x) * self.weight
        return result


def test_a_network_that_vmap_refuses_is_differentiated_vector_by_vector() -> None:
    n = 4
    x = noise.normal(noise.sample_keys(1, n), 0, (3,)).double()
    torch.testing.assert_close(divergence(Detour(), (3,), n, 0), (1 - x.tanh() ** 2).sum(1))


def test_weights_and_x_stay_as_they_are() -> None:
    model, x = fastsde.models.MLP(shape=(2,), hidden=(8,)), torch.randn(9, 4)[:, ::2]
    before = x.clone()
    first = log_prob(model, x, prediction="eps", steps=8)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert not first.requires_grad
    with torch.inference_mode():
        again = log_prob(model, x.clone(), prediction="eps", steps=8)
    assert torch.equal(first, again)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = Linear(matrix(40).float())
    x = noise.normal(noise.sample_keys(2, 7), 0, (40,))
    how: dict[str, Any] = {"prediction": "v", "steps": 8, "seed": 3, "probes": 2}
    whole = log_prob(model, x, **how)
    torch.testing.assert_close(log_prob(model, x, max_batch=3, **how), whole, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(log_prob(model, x[4:], first_sample=4, **how), whole[4:], rtol=1e-5, atol=1e-4)
    keys = noise.sample_keys(3, 7)
    del how["seed"]
    torch.testing.assert_close(log_prob(model, x, keys=keys, **how), whole, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(log_prob(model, x, seed=4, **how), whole)
    precise = [log_prob(model, x, trace="exact", prediction="v", steps=8, seed=seed) for seed in (3, 4)]
    assert torch.equal(*precise)


def test_layers_in_training_mode_are_told() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    with pytest.warns(RuntimeWarning, match=r"the network has BatchNorm1d in training mode.*call model\.eval"):
        log_prob(model, torch.ones(4, 2), prediction="eps", steps=4)


def test_an_empty_batch() -> None:
    assert log_prob(exact(VPSDE(), "eps"), points(0), **options(VPSDE(), steps=4)).shape == (0,)
    assert log_prob("swiss-roll", torch.empty(0, 2), steps=4).shape == (0,)


# Checkpoints --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_conditions_are_given_or_none() -> None:
    x = fastsde.sample("mnist", (2, 1, 28, 28), solver="ddim", steps=5, model_kwargs={"label": torch.tensor([3, 4])})
    likelihoods = {
        name: log_prob("mnist", x, steps=4, model_kwargs=given)
        for name, given in {
            "own": {"label": torch.tensor([3, 4])},
            "none": {"label": torch.tensor([10, 10])},
            "not given": None,
        }.items()
    }
    assert torch.equal(likelihoods["not given"], likelihoods["none"])
    assert not torch.allclose(likelihoods["own"], likelihoods["none"])
    with pytest.raises(ValueError, match=r"labels from 0 to 9, or 10 for none, got 3 .. 11"):
        log_prob("mnist", x, steps=4, model_kwargs={"label": torch.tensor([3, 11])})


@pytest.mark.slow
def test_the_density_of_the_swiss_roll_integrates_to_one() -> None:
    side = torch.linspace(-2.6, 2.6, 97)
    grid = torch.cartesian_prod(side, side)
    density = log_prob("swiss-roll", grid, steps=40, t_start=1e-3).exp()
    total = float(density.sum()) * float(side[1] - side[0]) ** 2
    assert abs(total - 1) < 0.01
    roll = log_prob("swiss-roll", fastsde.data.swiss_roll(500, seed=1).x, steps=100)
    # The entropy of the roll is a bound for every model, reached by one that knows the data.
    assert -1.6 < float(roll.mean()) < -1.2


@pytest.mark.slow
def test_compiled_networks_have_the_same_densities() -> None:
    model, x = Linear(matrix(2).float()), torch.ones(5, 2)
    how: dict[str, Any] = {"prediction": "eps", "steps": 4, "trace": "hutchinson", "probes": 3}
    torch.testing.assert_close(log_prob(model, x, compile=True, **how), log_prob(model, x, **how), rtol=1e-4, atol=1e-4)


# Bits per dimension -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value_range", "offset"), [((-1.0, 1.0), 7.0), ((0.0, 1.0), 8.0), ((-3.0, 5.0), 5.0)])
def test_bits_per_dim_count_the_levels(value_range: tuple[float, float], offset: float) -> None:
    images = torch.randint(0, 256, (4, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = options(VPSDE(), "score", steps=8, seed=5)
    got = bits_per_dim(lambda x, t: -x, images, value_range=value_range, **how)
    u = noise.uniform(noise.sample_keys(5, 4), DEQUANTISATION_STEP, (1, 3, 3), noise.STREAM_OTHER).double()
    low, high = value_range
    y = low + (high - low) * (u + images) / 256
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(y).flatten(1).sum(1)
    torch.testing.assert_close(got, -log_p / math.log(2) / 9 + offset, rtol=0, atol=1e-9)
    floats = low + (high - low) * images.double() / 255
    torch.testing.assert_close(bits_per_dim(lambda x, t: -x, floats, value_range=value_range, **how), got)


def test_bits_per_dim_name_bad_images() -> None:
    for images, kind, message in (
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "images must be uint8 or floating-point, got torch.int64"),
        (torch.full((2, 3), 1.5), ValueError, "images must lie in value_range, -1 .. 1, got 1.5 .. 1.5"),
        (torch.zeros(3), ValueError, r"images must be \[B, \*shape\], got \[3\]"),
        (torch.full((2, 3), math.nan), ValueError, "images must be finite"),
        ("x", TypeError, "images must be a tensor, got str"),
    ):
        with pytest.raises(kind, match=message):
            bits_per_dim(lambda x, t: -x, images)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="value_range must be"):
        bits_per_dim(lambda x, t: -x, torch.zeros(2, 3), value_range=(1.0, -1.0))


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x must be floating-point"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have the batch first"),
        ({"x": torch.full((2, 3), math.inf)}, ValueError, "x must be finite"),
        ({"solver": "ddim"}, ValueError, "solver must be one of heun, rk4, or an AdaptiveODE, got 'ddim'"),
        ({"solver": 4}, TypeError, "solver must be a name or an AdaptiveODE, got int"),
        ({"solver": AdaptiveODE(), "steps": 9}, ValueError, "steps must be None with AdaptiveODE"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"t_start": 1.0}, ValueError, r"t_start must be in \[0, 1\), got 1.0"),
        ({"t_start": 0.0}, ValueError, "t_start|velocity"),
        ({"trace": "full"}, ValueError, "trace must be one of auto, exact, hutchinson, got 'full'"),
        ({"probes": 0}, ValueError, "probes must be at least 1, got 0"),
        ({"probes": 2, "trace": "exact"}, ValueError, "probes are of trace='hutchinson'.*got 2"),
        ({"prediction": "noise"}, ValueError, "prediction must be one of"),
        ({"max_batch": 0}, ValueError, "max_batch must be at least 1"),
        ({"compile": "openvino"}, TypeError, "compile must be True or False"),
        ({"model_kwargs": {"y": torch.zeros(5)}}, ValueError, r"model_kwargs\['y'\] must have the batch of 2"),
        ({"model": 3}, TypeError, "model must be callable"),
        ({"model": "no-such"}, FileNotFoundError, "there is no checkpoint no-such"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"model": lambda x, t: -x, "x": torch.zeros(2, 3), "prediction": "eps"}
    with pytest.raises(kind, match=message):
        log_prob(**{**good, **changes})


def test_a_network_without_gradients_is_an_error() -> None:
    @torch.no_grad()
    def network(x: Tensor, t: Tensor) -> Tensor:
        return -x

    with pytest.raises(ValueError, match="model must be differentiable with respect to x for a likelihood"):
        log_prob(network, torch.zeros(2, 3))


def test_what_is_not_finite_is_reported_with_its_row() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(match_dims(t, x) > 0.5, x * math.nan, x)

    with pytest.raises(NonFiniteError, match=r"the network returned NaN or infinity in row \d+, at time 0\.[5-9]"):
        log_prob(network, torch.ones(2, 3), spacing="uniform", steps=16)
    pytest.importorskip("torchode", exc_type=ImportError)
    with pytest.raises(NonFiniteError, match=re.escape("NaN or infin")):
        log_prob(network, torch.ones(2, 3), solver=AdaptiveODE())


@pytest.mark.parametrize("shape", [(), (0,)])
@pytest.mark.parametrize("solver", ["rk4", AdaptiveODE(1e-8, 1e-8)])
def test_samples_of_one_number_or_none(shape: tuple[int, ...], solver: Any) -> None:
    x = torch.tensor([0.3, -1.0], dtype=FLOAT64).reshape(2, *[1] * len(shape)).expand(2, *shape)
    found = log_prob(lambda x, t: -x, x, solver=solver, dtype=FLOAT64)  # standard normal data, at all times
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x)[:, None].flatten(1).sum(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_conditions_made_in_inference_mode() -> None:
    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return -x * y[:, None]

    y, x = torch.tensor([0.5, 1.0]), torch.ones(2, 3)
    expected = log_prob(network, x, steps=4, model_kwargs={"y": y})
    with torch.inference_mode():
        assert torch.equal(log_prob(network, x, steps=4, model_kwargs={"y": y.clone()}), expected)


def test_a_wrong_condition_is_named() -> None:
    with pytest.raises(TypeError, match=r"model must be callable as model\(x, t, \*\*model_kwargs\).* 'y'"):
        log_prob(lambda x, t: -x, torch.zeros(2, 3), model_kwargs={"y": torch.zeros(2)})


def test_dequantised_images_are_not_rounded_to_the_networks_dtype() -> None:
    images = torch.arange(12, dtype=torch.uint8).reshape(2, 6)
    zero = nn.Module()
    zero.forward = lambda x, t: 0 * x
    full, low = (bits_per_dim(zero, images, steps=4, dtype=dtype) for dtype in (None, torch.bfloat16))
    torch.testing.assert_close(low, full, rtol=0, atol=1e-6)
