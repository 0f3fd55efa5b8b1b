"""Guidance by sample, row and interval, rescaled, and by a second network: `fastsde.Guidance`."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsde
from fastsde import VPSDE, Guidance, Sampler, noise, ops, reference, solvers
from fastsde.engines.chunks import alike, chunks

ROWS = 12
# A row rounds numbers of up to 20 some eight times.
TOLERANCE = ROWS * 8 * 20 * 2**-24
SCALES = torch.tensor([0.0, 1.0, 2.5, -1.0, 4.0, 0.5, 3.0])
N = len(SCALES)


class Net(nn.Module):
    """A smooth network of x, t and a condition."""

    def __init__(self, seed: int = 0, dim: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.last = nn.Linear(dim, 8), nn.Linear(8, dim)
        self.eval()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + t[:, None] + y[:, None])) - x  # type: ignore[no-any-return]


class Counted(Net):
    """A network whose calls on the host are counted."""

    calls = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x, t, y)


def call(n: int = N, device: str | torch.device = "cpu") -> dict[str, Any]:
    y = torch.arange(n, device=device) / 4 - 1
    return {"model_kwargs": {"y": y}, "uncond_kwargs": {"y": torch.zeros_like(y)}}


def expected(net: nn.Module, weight: Any, *, n: int = N, phi: float = 0.0, other: nn.Module | None = None) -> Tensor:
    """Samples by Euler-Maruyama on the VP-SDE in float64, written plainly; ``weight`` is a function of t."""
    net, other = copy.deepcopy(net).double(), copy.deepcopy(other or net).double()
    sde, keys = VPSDE(), noise.sample_keys(0, n)
    x, times = noise.normal(keys, 0, (3,)).double(), torch.linspace(1, 0, ROWS + 1, dtype=torch.float64)
    y = torch.arange(n).double() / 4 - 1
    for row, (t, after) in enumerate(itertools.pairwise(times)):
        f = net(x, t.expand(n), y)
        w = torch.as_tensor(weight(float(t)), dtype=torch.float64)
        u = other(x, t.expand(n), 0 * y)
        g = u + w.reshape(-1, 1) * (f - u)
        rescaled = g * f.std(dim=1, keepdim=True) / g.std(dim=1, keepdim=True)  # Lin et al. 2023, eq. 15
        score = phi * rescaled + (1 - phi) * g  # eq. 16
        beta, h = sde.beta(t), t - after
        x = x + (beta * x / 2 + beta * score) * h + (beta * h).sqrt() * noise.normal(keys, row + 1, (3,)).double()
    return x


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "one a sample": (SCALES, {"weight": lambda t: SCALES.double()}),
    "function of t": (Guidance(SCALES, schedule=lambda t: t**2), {"weight": lambda t: SCALES.double() * t**2}),
    "sequence": (
        Guidance(2.0, schedule=[k / 8 for k in range(ROWS)]),
        {"weight": lambda t: 2 * round((1 - t) * ROWS) / 8},
    ),
    "interval": (
        Guidance(SCALES, interval=(0.25, 0.6)),
        {"weight": lambda t: SCALES.double() if 0.25 <= t <= 0.6 else 1.0},
    ),
    "rescale": (Guidance(SCALES, rescale=0.7), {"weight": lambda t: SCALES.double(), "phi": 0.7}),
    "all": (
        Guidance(3.0, schedule=lambda t: 1 - t / 2, interval=(0.2, 0.9), rescale=1.0),
        {"weight": lambda t: 3 * (1 - t / 2) if 0.2 <= t <= 0.9 else 1.0, "phi": 1.0},
    ),
}


@pytest.mark.parametrize("backend", ["reference", "eager", "persistent"])
@pytest.mark.parametrize("case", CASES)
def test_samples_are_those_of_the_formula(case: str, backend: str) -> None:
    guidance, truth = CASES[case]
    if backend == "persistent" and isinstance(guidance, Guidance) and guidance.rescale:
        with pytest.raises(ValueError, match="does not support rescaled guidance; use 'eager' or 'reference'"):
            Sampler(Net(), (3,), guidance=guidance, backend=backend)
        return
    x = Sampler(Net(), (3,), steps=ROWS, guidance=guidance, backend=backend)(N, **call())
    torch.testing.assert_close(x.double(), expected(Net(), **truth), rtol=0, atol=TOLERANCE)


def test_in_float64_samples_are_the_formula_to_its_rounding() -> None:
    for guidance, truth in CASES.values():
        if isinstance(guidance, Guidance) and isinstance(guidance.scale, Tensor):
            guidance = Guidance(guidance.scale.double(), guidance.schedule, guidance.interval, guidance.rescale)
        x = Sampler(Net(), (3,), steps=ROWS, guidance=guidance, dtype=torch.float64)(N, **call())
        torch.testing.assert_close(x, expected(Net(), **truth), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "eager", "persistent"])
def test_one_scale_a_sample_is_a_run_for_each_and_may_be_split(backend: str) -> None:
    options: dict[str, Any] = {"steps": 5, "backend": backend}
    whole = Sampler(Net(), (3,), guidance=SCALES, **options)(N, **call())
    split = Sampler(Net(), (3,), guidance=SCALES, max_batch=2, **options)(N, **call())
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-5)
    for i, w in enumerate(SCALES.tolist()):
        alone = Sampler(Net(), (3,), guidance=w, **options)(N, **call())
        torch.testing.assert_close(alone[i], whole[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_outside_of_the_interval_the_network_is_called_once(backend: str) -> None:
    net, guidance = Counted(), Guidance(2.0, interval=(0.25, 0.6))
    times = solvers.build("euler_maruyama", VPSDE(), ROWS).time
    inside = int(((times >= 0.25) & (times <= 0.6)).sum())
    assert 0 < inside < ROWS
    Sampler(net, (3,), steps=ROWS, guidance=guidance, backend=backend)(N, **call())
    assert net.calls == ROWS + inside
    never = Sampler(net, (3,), steps=ROWS, guidance=Guidance(9.0, interval=(2, 3)), backend=backend)(N, **call())
    assert net.calls == ROWS + inside + ROWS
    plain = Sampler(net, (3,), steps=ROWS, backend=backend)(N, model_kwargs=call()["model_kwargs"])
    assert torch.equal(never, plain)


@pytest.mark.parametrize("backend", ["reference", "eager", "persistent"])
def test_a_second_network_guides_without_further_arguments(backend: str) -> None:
    net, bad = Net(), Net(1)
    sampler = Sampler(net, (3,), steps=ROWS, guidance=Guidance(SCALES, model=bad), backend=backend)

    class Conditional(nn.Module):  # which drops the zeros that `expected` gives to the other network
        def __init__(self) -> None:
            super().__init__()
            self.net = bad

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return self.net(x, t, torch.arange(len(x)).to(x) / 4 - 1)

    def truth() -> Tensor:
        return expected(net, lambda t: SCALES.double(), other=Conditional())

    x = sampler(N, model_kwargs=call()["model_kwargs"])
    torch.testing.assert_close(x.double(), truth(), rtol=0, atol=TOLERANCE)
    with torch.no_grad():  # new weights of either take effect
        bad.last.weight.mul_(-1)
    y = sampler(N, model_kwargs=call()["model_kwargs"])
    assert not torch.allclose(x, y, atol=1e-2)
    torch.testing.assert_close(y.double(), truth(), rtol=0, atol=TOLERANCE)
    given = sampler(N, **call())  # with arguments of its own
    torch.testing.assert_close(
        given.double(), expected(net, lambda t: SCALES.double(), other=bad), rtol=0, atol=TOLERANCE
    )


def test_a_network_that_guides_itself_is_unguided() -> None:
    net, kwargs = Net(), {"model_kwargs": call()["model_kwargs"]}
    x = Sampler(net, (3,), steps=5, guidance=Guidance(3.0, model=net))(N, **kwargs)
    torch.testing.assert_close(x, Sampler(net, (3,), steps=5)(N, **kwargs), rtol=0, atol=1e-5)


def test_rows_of_one_time_with_different_weights_do_not_run_persistent() -> None:
    schedule = [0.1 * k for k in range(5)]
    options: dict[str, Any] = {"solver": "heun", "steps": 5}
    auto = Sampler(Net(), (3,), guidance=Guidance(2.0, schedule=schedule), **options)
    x = auto(N, **call())
    assert auto.last_backend == "eager"
    theirs = Sampler(Net(), (3,), guidance=Guidance(2.0, schedule=schedule), backend="reference", **options)(
        N, **call()
    )
    torch.testing.assert_close(x, theirs, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="its guidance has different weights in rows of one time"):
        Sampler(Net(), (3,), guidance=Guidance(2.0, schedule=schedule), backend="persistent", **options)(N, **call())
    by_time = Sampler(Net(), (3,), guidance=Guidance(2.0, schedule=lambda t: t), **options)
    by_time(N, **call())
    assert by_time.last_backend == "persistent"


def test_a_sampler_pickles_and_a_schedule_is_evaluated_once() -> None:
    sampler = Sampler(Net(), (3,), steps=5, guidance=Guidance(SCALES, schedule=lambda t: t))
    again = pickle.loads(pickle.dumps(sampler))
    assert torch.equal(again(N, **call()), sampler(N, **call()))


def test_verify_compares_all_backends() -> None:
    guidance = Guidance(SCALES, interval=(0.2, 0.9), rescale=0.5)
    results = fastsde.verify.verify(Net(), (3,), steps=9, guidance=guidance, dtypes=[torch.float32], **call())
    verdicts = {result.backend: result.verdict for result in results}
    assert verdicts["eager"] == "pass"
    assert verdicts["persistent"] == "unavailable"


# Graphs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [None, 1, 4, 7, 100])
def test_chunks_are_of_one_kind_and_stop_where_they_must(every: int | None) -> None:
    kinds = [False] * 5 + [True] * 23 + [False] * 60
    found = alike(kinds, every)
    assert [kind for length, kind in found for _ in range(length)] == kinds
    ends = torch.tensor([length for length, _ in found]).cumsum(0).tolist()
    assert every is None or set(range(every, len(kinds), every)) <= set(ends)
    assert alike([True] * 999, every) == [(length, True) for length in chunks(999, every)]


def test_graphs_take_new_weights_without_a_capture(graphs: Any) -> None:
    device = torch.get_default_device()
    net, kwargs = Net().to(device), call(device=device)
    for scale in (SCALES, 2.0 * SCALES):
        guidance = Guidance(scale.to(device), schedule=lambda t: t, interval=(0.25, 0.6))
        assert_graph_is_reference(net, guidance, 4, **kwargs)
        assert len(graphs.recorded) == 2  # one with and one without guidance


@pytest.mark.slow
def test_graphs_of_rescaled_guidance_and_of_a_second_network(graphs: Any) -> None:
    device = torch.get_default_device()
    net, bad = Counted().to(device), Net(1).to(device)
    scales, kwargs = SCALES.to(device), call(device=device)
    assert_graph_is_reference(net, Guidance(scales, rescale=0.7, interval=(0.25, 0.6)), 4, **kwargs)
    assert len(graphs.recorded) == 2
    kwargs.pop("uncond_kwargs")
    sampler = Sampler(net, (3,), steps=4, guidance=Guidance(scales, model=bad), backend="graph")
    first, calls = sampler(N, **kwargs), net.calls
    with torch.no_grad():
        bad.last.bias.add_(1)  # in place: read by the graph
    ours = sampler(N, **kwargs)
    assert net.calls == calls
    assert len(graphs.recorded) == 3
    theirs = Sampler(net, (3,), steps=4, guidance=Guidance(scales, model=bad), backend="reference")(N, **kwargs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    assert not torch.allclose(first, ours, atol=1e-2)


def assert_graph_is_reference(net: Net, guidance: Guidance, steps: int, **kwargs: Any) -> None:
    ours, theirs = (
        Sampler(net, (3,), steps=steps, guidance=guidance, backend=backend)(N, **kwargs)
        for backend in ("graph", "reference")
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Guidance("2"), TypeError, "guidance must be a number, got str"),
        (lambda: Guidance(float("nan")), ValueError, "guidance must be finite, got nan"),
        (lambda: Guidance(torch.ones(2, 3)), ValueError, r"guidance.scale must be .* shape \[n\], got shape \[2, 3\]"),
        (lambda: Guidance(torch.ones(2).long()), TypeError, "guidance.scale must be floating-point, got torch.int64"),
        (lambda: Guidance(torch.tensor([1, torch.inf])), ValueError, "guidance.scale must be finite, got 1 values"),
        (lambda: Guidance(1.0, interval=(0.5, 0.2)), ValueError, "guidance.interval must be .* low < high"),
        (lambda: Guidance(1.0, interval=0.5), TypeError, r"guidance.interval must be \(low, high\), got float"),
        (lambda: Guidance(1.0, rescale=1.5), ValueError, r"guidance.rescale must be in \[0, 1\], got 1.5"),
        (
            lambda: Sampler(Net(), (3,), steps=4, guidance=Guidance(1.0, schedule=[1.0, 2.0])),
            ValueError,
            r"guidance.schedule must have shape \[4\], got \[2\]",
        ),
        (
            lambda: Sampler(Net(), (3,), steps=4, guidance=Guidance(1.0, schedule=lambda t: 1 / (t - 1))),
            ValueError,
            "guidance.schedule must be finite, got 1 values of NaN or infinity",
        ),
        (
            lambda: Sampler(Net(), (3,), steps=4, guidance=Guidance(1.0, schedule="up")),
            TypeError,
            "guidance.schedule must give numbers, got str",
        ),
        (
            lambda: Sampler(Net(), (3,), steps=4, guidance=SCALES)(3, **call(3)),
            ValueError,
            r"guidance.scale must have shape \[3\], got \[7\]",
        ),
        (
            lambda: Sampler(Net(), (3,), guidance=Guidance(1.0, model="swiss-roll")),
            ValueError,
            r"sample_shape of the checkpoint is \(2,\), got \(3,\)",
        ),
        (lambda: Sampler(Net(), (3,), guidance=Guidance(1.0))(N), ValueError, "guidance and uncond_kwargs go together"),
        (
            lambda: ops.solver_step(
                [torch.ones(2, 3)],
                torch.ones(2, 3),
                solvers.build("ddim", VPSDE(), 2),
                0,
                f_uncond=torch.ones(2, 3),
                guidance=torch.ones(3),
            ),
            ValueError,
            r"guidance must have shape \[2\], got \[3\]",
        ),
    ],
)
def test_bad_input_is_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_the_factor_is_one_where_nothing_varies() -> None:
    f = torch.randn(4, 3)
    g = torch.stack([f[0], torch.full((3,), 2.0), 3 * f[2] + 1, torch.zeros(3)])
    factor = reference.rescale_factor(f, g, 0.75)
    torch.testing.assert_close(factor, torch.tensor([1, 1, 0.75 / 3 + 0.25, 1]))
    assert reference.rescale_factor(f[:, :1], 2 * f[:, :1], 1.0).tolist() == [1.0] * 4  # single elements


def test_a_second_network_in_training_mode_is_told() -> None:
    other = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    with pytest.warns(RuntimeWarning, match="the network has Dropout in training mode"):
        Sampler(nn.Sequential(nn.Linear(4, 3)), (3,), steps=2, guidance=Guidance(2.0, model=other))(2)


def test_classifier_guidance_has_no_unconditional_arguments() -> None:
    sampler = Sampler(Net(), (3,), steps=2, guidance=fastsde.ClassifierGuidance(lambda x, t: -x.square().sum(1)))
    with pytest.raises(ValueError, match="uncond_kwargs are for classifier-free guidance"):
        sampler(N, **call())
