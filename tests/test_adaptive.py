"""Adaptive solvers in `fastsde.Sampler`: exact solutions, the paper's algorithm written plainly, calls and options."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsde
from fastsde import NonFiniteError, Sampler, noise
from fastsde.adaptive import StepSizeError
from fastsde.adaptive.gotta_go_fast import three_bits
from fastsde.adaptive.path import BrownianPath
from fastsde.engines.network import Network
from fastsde.engines.own_times import Output
from fastsde.models import MLP
from fastsde.request import Request
from fastsde.sde import EDM, VESDE, VPSDE, Process, RectifiedFlow, SubVPSDE, match_dims
from fastsde.solvers import PREDICTIONS, AdaptiveODE, GottaGoFast, StepTable

MEAN, STD = 0.8, 0.5
ONE = torch.ones(1, dtype=torch.float64)
SOLVERS = [AdaptiveODE(1e-4, 1e-4), GottaGoFast(0.2, 0.1)]
PROCESSES = [VPSDE(), *(pytest.param(sde, marks=pytest.mark.slow) for sde in (SubVPSDE(), VESDE(), EDM()))]
Model = Callable[..., Tensor]


class Gaussian(nn.Module):
    """The exact network for N(MEAN, STD^2) data, each element alike. Keeps the arguments of its calls."""

    def __init__(self, sde: Process, prediction: str = "score") -> None:
        super().__init__()
        self.sde, self.prediction = sde, prediction
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        self.calls.append((x.clone(), t.clone()))
        alpha, sigma = (match_dims(value, x).to(x) for value in (self.sde.alpha(t), self.sde.sigma(t)))
        mean = MEAN if shift is None else MEAN + match_dims(shift, x).to(x)
        eps = sigma * (x - alpha * mean) / (alpha**2 * STD**2 + sigma**2)
        x_0 = mean + alpha * STD**2 * (x - alpha * mean) / (alpha**2 * STD**2 + sigma**2)
        return {
            "score": lambda: -eps / sigma,
            "eps": lambda: eps,
            "x0": lambda: x_0,
            "v": lambda: alpha * eps - sigma * x_0,
            "flow": lambda: eps - x_0,
        }[self.prediction]()


def sampler(solver: Any, sde: Process | None = None, prediction: str = "score", **options: Any) -> Sampler:
    sde = VPSDE() if sde is None else sde
    options = {"dtype": torch.float64, "sample_shape": (3,)} | options
    return Sampler(Gaussian(sde, prediction), sde=sde, prediction=prediction, solver=solver, **options)


def flow(sde: Process, x: Tensor, start: float, end: float) -> Tensor:
    """Returns where the probability flow of the Gaussian data takes x: it keeps the number of standard deviations."""
    (alpha, sigma), (alpha_end, sigma_end) = ((sde.alpha(t), sde.sigma(t)) for t in (start, end))
    scale = ((alpha_end**2 * STD**2 + sigma_end**2) / (alpha**2 * STD**2 + sigma**2)).sqrt()
    return alpha_end * MEAN + scale * (x - alpha * MEAN)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: sde.name)
def test_the_flow_of_gaussian_data(sde: Process, prediction: str) -> None:
    draw = sampler(AdaptiveODE(1e-7, 1e-9), sde, prediction)
    exact = flow(sde, sde.prior_sampling((5, 3)).double(), sde.t_max, sde.t_min)
    torch.testing.assert_close(draw(5), exact, rtol=1e-5, atol=1e-5)
    assert draw.last_backend == draw.backend == "adaptive"


@pytest.mark.parametrize("prediction", ["v", "flow", "x0"])
def test_the_flow_from_pure_noise_down_to_data(prediction: str) -> None:
    sde = RectifiedFlow()
    end = 0.0 if prediction != "x0" else 1e-3  # whose velocity is 0 / 0 where sigma is 0
    found = sampler(AdaptiveODE(1e-8, 1e-8), sde, prediction, t_end=end)(4)
    torch.testing.assert_close(found, flow(sde, sde.prior_sampling((4, 3)).double(), 1.0, end), rtol=1e-5, atol=1e-5)


def test_the_flow_in_fp32_from_a_state_in_between() -> None:
    x = torch.randn(63, 2, 5)
    draw = sampler(AdaptiveODE(), sample_shape=(2, 5), t_start=0.6, t_end=0.01, dtype=torch.float32)
    torch.testing.assert_close(draw(63, x_init=x).double(), flow(VPSDE(), x.double(), 0.6, 0.01), rtol=1e-3, atol=1e-3)


# Gotta Go Fast ------------------------------------------------------------------------------------------------------


def algorithm_1(
    sde: Process, solver: GottaGoFast, key: Tensor, size: int, t_end: float
) -> tuple[Tensor, list[tuple[Tensor, float]]]:
    """Jolicoeur-Martineau et al. 2021, algorithm 1, for one sample, as it is printed but for the rounding of h.

    Returns:
        The sample, and the arguments of the calls of the score.
    """
    calls: list[tuple[Tensor, float]] = []
    network = Gaussian(sde)

    def reverse(x: Tensor, t: float) -> tuple[Tensor, float]:
        calls.append((x, t))
        score = network(x[None], torch.tensor([t], dtype=torch.float64))[0]
        g = float(sde.diffusion(t))
        return float(sde.drift_coefficient(t)) * x - g**2 * score, g

    def draw(step: int) -> Tensor:
        return noise.normal(key, step, (size,))[0].double()

    x, t, h, attempt = sde.prior_std * draw(0), sde.t_max, solver.h_init, 0
    previous = x
    while t > t_end:
        z = draw(attempt + 1)
        drift, g = reverse(x, t)
        euler = x - h * drift + math.sqrt(h) * g * z
        t_next = t_end if h == t - t_end else t - h
        drift, g = reverse(euler, t_next)
        other = x - h * drift + math.sqrt(h) * g * z
        improved = (euler + other) / 2
        delta = (solver.rtol * torch.maximum(euler.abs(), previous.abs())).clamp(min=solver.atol)
        scaled = (euler - improved) / delta
        error = float(scaled.norm()) / math.sqrt(size) if solver.norm == "l2" else float(scaled.abs().max())
        if error <= 1:
            x = improved if solver.extrapolate else euler
            t, previous = t_next, euler
        mantissa, exponent = math.frexp(solver.safety * h * error**-solver.exponent)
        h = min(t - t_end, math.floor(8 * mantissa) / 8 * 2.0**exponent)
        attempt += 1
    return x, calls


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: sde.name)
@pytest.mark.parametrize(
    "solver",
    [
        GottaGoFast(0.05, 0.02, keeps_noise=False),
        GottaGoFast(0.1, 0.05, h_init=0.5, extrapolate=False, norm="linf", exponent=0.5, keeps_noise=False),
    ],
    ids=["defaults", "others"],
)
def test_every_call_is_that_of_algorithm_1(sde: Process, solver: GottaGoFast) -> None:
    draw = sampler(solver, sde, t_end=0.01 * sde.t_max)
    keys = noise.sample_keys(3, 1)
    expected, calls = algorithm_1(sde, solver, keys, 3, 0.01 * sde.t_max)
    found = draw(1, seed=3)
    network = draw._network.model
    assert len(network.calls) == len(calls) == draw.network_calls
    for (x, t), (x_expected, t_expected) in zip(network.calls, calls, strict=True):
        torch.testing.assert_close(x[0], x_expected, rtol=1e-8, atol=1e-8)
        assert float(t) == pytest.approx(t_expected, rel=1e-9)
    torch.testing.assert_close(found[0], expected, rtol=1e-8, atol=1e-8)


def test_without_rejections_keeping_noise_changes_nothing() -> None:
    solvers = [GottaGoFast(0.1, 5.0, safety=1.0, exponent=0.001, keeps_noise=keeps) for keeps in (False, True)]
    assert torch.equal(*(sampler(solver)(5) for solver in solvers))


@pytest.mark.slow
@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=lambda sde: sde.name)
def test_moments_of_gaussian_data(sde: Process) -> None:
    """In one dimension, where new noise after each rejection would make the standard deviation 0.73 and 1.1."""
    n = 4_000
    x = sampler(GottaGoFast(), sde, sample_shape=())(n)
    # Four standard errors, and a bias of the steps of about a tolerance.
    assert float(x.mean()) == pytest.approx(MEAN, abs=4 * STD / math.sqrt(n) + 0.01)
    assert float(x.std()) == pytest.approx(STD, rel=4 / math.sqrt(2 * n) + 0.02)


def path_steps(path: BrownianPath, t: Tensor, ends: Tensor, accepted: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Takes one step, towards the ends; returns the increments and where it ends."""
    after = path.end_of_step(ends)
    torch.manual_seed(seed)
    increment = path.increment(t, after, torch.randn(len(t), 2, dtype=torch.float64))
    path.advance(t, after, increment, accepted)
    return increment, after


def test_parts_of_a_rejected_increment_add_up_to_it() -> None:
    t = torch.ones(3, dtype=torch.float64)
    yes, no = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    path = BrownianPath(torch.zeros(3, 2, dtype=torch.float64))
    far, _ = path_steps(path, t, t - 0.8, no, 0)
    near, _ = path_steps(path, t, t - 0.2, no, 1)  # two points are known: 0.8, 0.2
    first, after = path_steps(path, t, t - 0.5, yes, 2)  # so that it ends at 0.8
    torch.testing.assert_close(first, near)
    torch.testing.assert_close(after, t - 0.2)
    second, _ = path_steps(path, after, t - 0.3, yes, 3)
    beyond, passed = path_steps(path, t - 0.3, t - 0.9, no, 4)  # past the last point, to 0.1
    torch.testing.assert_close(passed, t - 0.9)
    third, after = path_steps(path, t - 0.3, t - 0.95, yes, 5)
    torch.testing.assert_close(after, t - 0.8)
    torch.testing.assert_close(first + second + third, far)
    fourth, _ = path_steps(path, after, t - 0.9, yes, 6)
    torch.testing.assert_close(third + fourth, beyond)
    fresh, after = path_steps(path, t - 0.9, t - 1.0, yes, 7)
    torch.manual_seed(7)
    torch.testing.assert_close(fresh, math.sqrt(0.1) * torch.randn(3, 2, dtype=torch.float64))


def test_paths_are_brownian_whatever_is_rejected() -> None:
    """Rejects whatever is large, twice as strictly as a solver would: the sum to the end is still standard normal."""
    n = 4_000
    path, t = BrownianPath(torch.zeros(n, 2, dtype=torch.float64)), torch.ones(n, dtype=torch.float64)
    total, h = torch.zeros(n, 2, dtype=torch.float64), torch.full_like(t, 0.7)
    for seed in range(100):
        after = path.end_of_step((t - h).clamp(min=0))
        torch.manual_seed(seed)
        increment = path.increment(t, after, torch.randn(n, 2, dtype=torch.float64))
        accepted = (increment.abs().amax(1) < 0.4) | (h < 0.02)
        path.advance(t, after, increment, accepted)
        total, t = total + increment * accepted[:, None], torch.where(accepted, after, t)
        h = torch.where(accepted, 1.5, 0.5) * h
    assert (t == 0).all()
    assert float(total.mean()) == pytest.approx(0, abs=4 / math.sqrt(2 * n))
    assert float(total.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / (2 * n)))
    assert float((total**4).mean()) == pytest.approx(3, abs=4 * math.sqrt(96 / (2 * n)))


# Samples, batches and calls -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_depend_on_its_batch(solver: Any) -> None:
    draw = sampler(solver)
    whole, calls = draw(7, seed=5), draw.network_calls
    assert torch.equal(whole, draw(7, seed=5))
    assert not torch.equal(whole, draw(7, seed=6))
    torch.testing.assert_close(draw(3, seed=5, first_sample=4), whole[4:], rtol=1e-12, atol=1e-12)
    assert torch.equal(draw.network_calls, calls[4:])
    order = torch.tensor([6, 0, 3])
    torch.testing.assert_close(draw(3, keys=noise.sample_keys(5, 7)[order]), whole[order], rtol=1e-12, atol=1e-12)
    split = sampler(solver, max_batch=2)
    torch.testing.assert_close(split(7, seed=5), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(split.network_calls, calls)


@pytest.mark.slow
def test_rounding_errors_of_the_network_do_not_grow() -> None:
    """Without rounded step sizes hardly any of these samples would be the same."""
    n = 100
    draw, plain = (Sampler("swiss-roll", solver=GottaGoFast(), backend=each) for each in ("auto", "reference"))
    is_same = ((draw(n) - plain(n)).abs() < 1e-4).all(1)
    assert int(is_same.sum()) >= n - 4
    assert int((draw.network_calls == plain.network_calls).sum()) >= n - 4


def test_step_sizes_are_rounded_down() -> None:
    h = torch.tensor([1.0, 0.99, 0.0625, 7.9, 8.1, 1e-300, math.inf], dtype=torch.float64)
    expected = [1.0, 0.875, 0.0625, 7.0, 8.0]
    rounded = three_bits(h)
    assert rounded[:5].tolist() == expected
    assert torch.equal(three_bits(rounded), rounded)
    assert 0.8e-300 < float(rounded[5]) <= 1e-300
    assert math.isfinite(rounded[6])


@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_calls_are_counted_for_each_sample(solver: Any, denoise: bool) -> None:
    draw = sampler(solver, denoise=denoise)
    assert draw.network_calls is None
    draw(20)
    calls = draw._network.model.calls
    assert draw.network_calls.shape == (20,)
    assert draw.network_calls.dtype == torch.int64
    # Samples that have finished are not evaluated.
    assert int(draw.network_calls.sum()) == sum(len(x) for x, _ in calls)
    assert int(draw.network_calls.max()) == len(calls)
    assert len(draw.network_calls.unique()) > 1
    times = torch.cat([t for _, t in calls])
    assert float(times.min()) == pytest.approx(VPSDE().t_min, rel=1e-9)
    assert times.max() == 1


def test_calls_of_a_table() -> None:
    draw = sampler("heun", steps=5)
    draw(3)
    assert draw.network_calls.tolist() == [5, 5, 5]


def test_denoising_gives_the_predicted_data() -> None:
    noisy, clean = (sampler(AdaptiveODE(1e-8, 1e-8), t_end=0.2, denoise=denoise)(4) for denoise in (False, True))
    alpha, variance = VPSDE().alpha(0.2), VPSDE().alpha(0.2) ** 2 * STD**2 + VPSDE().sigma(0.2) ** 2
    torch.testing.assert_close(clean, MEAN + alpha * STD**2 / variance * (noisy - alpha * MEAN), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("n", [0, 1])
def test_few_samples_and_plain_numbers(solver: Any, n: int) -> None:
    draw = sampler(solver, sample_shape=(), denoise=True)
    assert draw(n).shape == draw.network_calls.shape == (n,)
    assert sampler(solver, sample_shape=(0,))(n).shape == (n, 0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_conditions_stay_with_their_samples_and_are_guided(solver: Any) -> None:
    shift = torch.linspace(-2, 2, 9, dtype=torch.float64)
    guided = sampler(solver, guidance=3.0)(9, model_kwargs={"shift": shift / 3}, uncond_kwargs={"shift": 0 * shift})
    plain = sampler(solver)(9, model_kwargs={"shift": shift})  # since the score is affine in the shift
    # The steps of an ODE follow the rounding of the error estimates.
    torch.testing.assert_close(guided, plain, rtol=1e-5, atol=1e-5)
    scales = torch.tensor([3.0, *[1.0] * 7, 6.0], dtype=torch.float64)
    of_each = sampler(solver, guidance=scales)(
        9, model_kwargs={"shift": shift / scales}, uncond_kwargs={"shift": 0 * shift}
    )
    torch.testing.assert_close(of_each, plain, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=f"guidance.interval needs rows, which {type(solver).__name__} does not have"):
        sampler(solver, guidance=fastsde.Guidance(2.0, interval=(0.2, 0.8)))
    with pytest.raises(ValueError, match=r"guidance\.schedule needs rows"):
        sampler(solver, guidance=fastsde.Guidance(2.0, schedule=[1.0, 2.0]))
    alone = sampler(solver)(1, first_sample=8, model_kwargs={"shift": shift[8:]})
    torch.testing.assert_close(alone[0], plain[8], rtol=1e-9, atol=1e-9)


# Networks -----------------------------------------------------------------------------------------------------------


def outputs(model: nn.Module, optimize: bool, **options: Any) -> Output:
    n = options.pop("n", 63)
    table = StepTable(ONE, a=ONE)
    if "guidance" in options:
        scale = fastsde.Guidance(options["guidance"])
        options["guidance"] = scale.weights(n, table, torch.device("cpu"), torch.float32, None)
    request = Request((n, 2), table, noise.sample_keys(0, n), **options)
    return Output(Network(model, optimize=optimize), request)


@pytest.mark.parametrize("kind", ["plain", "sequential", "labels", "guided", "sinusoidal"])
def test_small_networks_run_natively_with_a_time_of_each_sample(kind: str) -> None:
    torch.manual_seed(0)
    label = torch.arange(63) % 3
    options: dict[str, Any] = {"model_kwargs": {"label": label}} if kind in ("labels", "guided") else {}
    if kind == "guided":
        options |= {"guidance": 2.5, "uncond_kwargs": {"label": torch.full_like(label, 3)}}
    model: nn.Module = MLP(2, (32, 32), "SiLU", classes=3 if options else 0)
    if kind == "sequential":
        model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    fast, plain = (outputs(model, optimize, **options) for optimize in (True, False))
    assert fast._program is not None or not fastsde.ops.has_native(torch.device("cpu"))
    assert plain._program is None
    x, t = torch.randn(63, 2), torch.rand(63, dtype=torch.float64)
    with torch.no_grad():
        for samples in (torch.arange(63), torch.tensor([4, 60, 61])):
            expected = plain(x[samples], t[samples], samples)
            torch.testing.assert_close(fast(x[samples], t[samples], samples), expected, rtol=1e-5, atol=1e-5)


def test_new_weights_are_used() -> None:
    draw = Sampler(MLP(2, (16,)).requires_grad_(False), (2,), solver=AdaptiveODE(1e-3, 1e-3), prediction="eps")
    before = draw(5)
    for parameter in draw._network.model.parameters():
        parameter.mul_(0.5)
    plain = Sampler(draw._network.model, (2,), solver=AdaptiveODE(1e-3, 1e-3), prediction="eps", backend="reference")
    after = draw(5)
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, plain(5), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [AdaptiveODE(1e-3, 1e-3), GottaGoFast(0.1, 0.05)])
def test_shipped_models(solver: Any) -> None:
    points = Sampler("swiss-roll", solver=solver)
    assert points(1000).abs().max() < 4
    digits = Sampler("mnist", solver=solver, guidance=1.5, denoise=True)
    found = digits(4, seed=1)
    assert found.shape == (4, 1, 28, 28)
    torch.testing.assert_close(digits(1, seed=1, first_sample=3)[0], found[3], rtol=0.02, atol=0.02)


def test_networks_in_bf16() -> None:
    low, high = (sampler(SOLVERS[0], prediction="v", dtype=dtype)(8) for dtype in (torch.bfloat16, torch.float32))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, high, rtol=8 * 2**-8, atol=8 * 2**-8)
    assert not torch.equal(low, high)


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_networks_that_return_nan(solver: Any) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t[:, None] < 0.5, torch.nan, -x)

    with pytest.raises(
        NonFiniteError, match=r"in [123] samples \(the first is sample \d\), in a step from time (0\.[5-9]|1)"
    ):
        fastsde.sample(network, (3, 2), solver=solver)


@pytest.mark.parametrize("solver", [AdaptiveODE(1e-6, 1e-6, max_steps=3), GottaGoFast(0.001, 0.001, max_steps=3)])
def test_too_many_steps(solver: Any) -> None:
    with pytest.raises(StepSizeError, match=r"3 steps \(max_steps\) were not enough for 5 samples .* rtol=.* atol="):
        sampler(solver)(5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 100}, "AdaptiveODE chooses its own steps by its rtol and atol: leave steps out, got 100"),
        ({"spacing": "karras"}, "spacing is an option of tables, not of AdaptiveODE: leave it out, got 'karras'"),
        ({"clip": 1.0}, "clip is an option of tables"),
        ({"eta": 0.0}, "eta is an option of tables"),
        ({"solver_options": {}}, "solver_options is an option of tables"),
        ({"t_end": 1.0}, r"t_end must be in \[0, 1\), got 1"),
        ({"t_start": 2.0}, r"t_start must be in \(0, 1\], got 2"),
        ({"prediction": "noise"}, "prediction must be one of"),
        ({"backend": "graph"}, "backend must be 'auto', or 'reference' for a network in plain PyTorch, got 'graph'"),
        ({"sde": RectifiedFlow()}, "does not have at t = 1: give another t_start or t_end"),
    ],
)
def test_options_that_do_not_apply(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(lambda x, t: -x, (2,), **{"solver": AdaptiveODE()} | options)


@pytest.mark.parametrize("option", ["noise", "callback", "trajectory"])
def test_options_that_need_rows(option: str) -> None:
    value = 2 if option == "trajectory" else lambda *_: None
    with pytest.raises(ValueError, match=f"{option} needs rows, which GottaGoFast does not have: leave it out"):
        sampler(GottaGoFast())(2, **{option: value})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rtol": -0.1}, ValueError, "rtol must be at least 0 and finite, got -0.1"),
        ({"h_init": 0}, ValueError, "h_init must be above 0 and finite, got 0"),
        ({"safety": 1.5}, ValueError, r"safety must be in \(0, 1\], got 1.5"),
        ({"exponent": True}, TypeError, "exponent must be a number, got bool"),
        ({"extrapolate": 1}, TypeError, "extrapolate must be True or False, got 1"),
        ({"norm": "max"}, ValueError, "norm must be one of l2, linf, got 'max'"),
        ({"max_steps": 2**28}, ValueError, "max_steps must be in"),
    ],
)
def test_bad_options_of_gotta_go_fast(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GottaGoFast(**options)


def test_repr_names_the_solver() -> None:
    assert "GottaGoFast(rtol=0.02" in repr(sampler(GottaGoFast()))
