"""Traced loops as tables: known ones, any number of samples, any backend, conditions, and what the loop changes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastsde
from fastsde import noise, solvers
from fastsde.solvers import StepTable
from fastsde.tracing import MismatchError, Replay, TraceError, record

ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


class Network(nn.Module):
    """Mixes the elements of a sample; takes times of any form, and labels."""

    def __init__(self, dim: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.inner = nn.Sequential(nn.Linear(dim + 1, 16), nn.Tanh(), nn.Linear(16, dim))
            self.labels = nn.Embedding(5, dim)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Any, y: Tensor | None = None) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, 1).expand(len(x), 1) / 1000
        x = x if y is None else x + self.labels(y)
        return self.dropout(self.inner(torch.cat((x, t), -1)))


def network() -> Network:
    return Network().eval()


def steps(count: int) -> list[int]:
    return torch.linspace(999, 0, count, device="cpu").round().long().tolist()


# Known tables ---------------------------------------------------------------------------------------------------------


def ddim_loop(model: Any, n: int, eta: float = 0.0, clip: float | None = None, count: int = 10) -> Tensor:
    """DDIM (Song, Meng & Ermon 2021, equation 12), with the bar of alpha under the roots."""
    x = torch.randn(n, 2, dtype=torch.float64)
    times = steps(count)
    for i, t in enumerate(times):
        now = ALPHA_BAR[t]
        then = ALPHA_BAR[times[i + 1]] if i + 1 < count else torch.tensor(1.0, dtype=torch.float64)
        eps = model(x, torch.tensor([t]))
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        sigma = eta * ((1 - then) / (1 - now)).sqrt() * (1 - now / then).sqrt()
        x = then.sqrt() * x0 + (1 - then - sigma**2).sqrt() * eps
        if eta and i + 1 < count:
            x = x + sigma * torch.randn_like(x)
    return x


@pytest.mark.parametrize(("eta", "clip"), [(0.0, None), (0.0, 1.0), (0.7, None), (1.0, 2.0)])
def test_a_loop_of_ddim_is_the_table_of_ddim(eta: float, clip: float | None) -> None:
    table = fastsde.trace(ddim_loop, network().double(), 3, eta=eta, clip=clip).table
    assert table is not None
    times = torch.tensor(steps(10))
    alpha = torch.cat((ALPHA_BAR[times].sqrt(), torch.ones(1, dtype=torch.float64)))
    known = solvers.ddim(alpha, (1 - alpha**2).sqrt(), times.double(), prediction="eps", eta=eta, clip=clip)
    assert torch.equal(table.time, known.time)
    assert table.clip == known.clip
    assert_same_steps(table, known, 3, 2e-11)


def assert_same_steps(ours: StepTable, theirs: StepTable, n: int, tolerance: float) -> None:
    """Compares what tables compute, whose slots may differ."""
    model, keys = network().double(), noise.sample_keys(3, n)
    results = [fastsde.reference.sample(model, (n, 2), table, keys, dtype=torch.float64) for table in (ours, theirs)]
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_the_tutorials_loop_is_euler_maruyama() -> None:
    def loop(model: Any, n: int) -> Tensor:
        x = torch.randn(n, 2, dtype=torch.float64)
        times = torch.linspace(1, 0, 1000, dtype=torch.float64)
        for i in range(999):
            t, h = times[i], times[i] - times[i + 1]
            beta = 0.1 + 19.9 * t
            x = x + 0.5 * beta * x * h + beta * model(x, t.expand(n)) * h + (beta * h).sqrt() * torch.randn_like(x)
        return x

    table = fastsde.trace(loop, network().double(), 2).table
    assert table is not None
    known = solvers.build("euler_maruyama", fastsde.VPSDE(), 999)
    assert table.slots == 1
    for name in ("time", "A", "b", "d", "e"):
        torch.testing.assert_close(getattr(table, name), getattr(known, name), rtol=1e-12, atol=1e-12)


def test_a_multistep_loop_keeps_its_history_in_slots() -> None:
    def loop(model: Any, n: int, order: int) -> Tensor:
        x, old = torch.randn(n, 2, dtype=torch.float64), []
        for i in range(8):
            old = [model(x, i), *old][:order]
            weights = {1: [1.0], 2: [1.5, -0.5], 3: [23 / 12, -16 / 12, 5 / 12]}[len(old)]
            x = x + 0.1 * sum(w * f for w, f in zip(weights, old, strict=True))
        return x

    for order in (1, 2, 3):
        traced = fastsde.trace(loop, network().double(), 3, order)
        assert traced.table is not None
        assert traced.slots == order
        assert all(len(call.states) == 1 for call in traced.calls)


def test_an_elementwise_loop_costs_no_memory_per_element() -> None:
    def loop(model: Any) -> Tensor:
        x = torch.randn(1, 3, 64, 64)
        for i in range(10):
            x = (x.flatten(1) * 0.9).view_as(x) + 0.1 * model(x, torch.full((1,), i)) + 0.1 * torch.randn_like(x)
        return x.clamp(-1, 1)

    program = record(loop, lambda x, t: x.tanh(), network=None, modules=()) if False else None
    program = record(loop, Tanh())
    assert not program.mover._known  # no index of any element
    coefficients = [c for row in program.rows for value in row.values() for c in (*value.terms.values(), value.const)]
    assert all(isinstance(c, float) for c in coefficients)


class Tanh(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.tanh()


# Any loop that is affine ----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 6),
    history=st.integers(0, 3),
    noises=st.integers(0, 2),
    clips=st.booleans(),
    returns_all=st.booleans(),
)
def test_random_affine_loops(seed: int, rows: int, history: int, noises: int, clips: bool, returns_all: bool) -> None:
    weights = torch.randn(rows, 4 + history, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2

    def loop(model: Any, n: int) -> Any:
        x, old, all_of_them = torch.randn(n, 3, dtype=torch.float64), [], []
        for k in range(rows):
            w = weights[k]
            f = model(w[0] * x, w[1])
            old = [f, *old][: history + 1]
            data = (x - w[1] * f).clamp(-1.5, 1.5) if clips else x - w[1] * f
            x = w[2] * x + w[3] * data + sum(c * each for c, each in zip(w[4:], old[1:], strict=False))
            for _ in range(noises):
                x = x + 0.3 * torch.randn_like(x)
            all_of_them.append(x)
        return torch.stack(all_of_them) if returns_all else x

    model = Network(3).double().eval()
    traced = fastsde.trace(loop, model, 4)
    program = traced.program
    draws = [torch.randn(draw.shape, dtype=torch.float64) for draw in program.draws]
    with Replay(draws):
        theirs = loop(model, 4).detach()
    ours = program.run([model], draws).detach()
    size = float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11 * max(1.0, size))
    if noises < 2:  # one noise a row is a table, or its slots differ from what it returns
        result = traced(model, 4, seed=seed % 1000, dtype=torch.float64)
        again = traced(model, 4, seed=seed % 1000, dtype=torch.float64)
        assert torch.equal(result, again)


# Any number of samples, any backend -----------------------------------------------------------------------------------


def guided(model: Any, n: int, y: Tensor | None = None, scale: float = 2.0) -> Tensor:
    """Classifier-free guidance in one batch."""
    x = torch.randn(n, 2)
    labels = torch.cat([y if y is not None else torch.full((n,), 1), torch.zeros(n, dtype=torch.long)])
    for t in steps(6):
        f, f_uncond = model(torch.cat([x] * 2), torch.tensor([t]), labels).chunk(2)
        x = 0.9 * x + 0.2 * (f_uncond + scale * (f - f_uncond)) + 0.1 * torch.randn_like(x)
    return x


def concatenated(model: Any, n: int) -> Tensor:
    x = torch.randn(n, 2)
    for t in torch.linspace(1, 0.1, 6):
        x = 0.9 * x + 0.1 * model(torch.cat((x, t.expand(n, 1)), -1)) + 0.2 * torch.randn_like(x)
    return x


def all_states(model: Any, n: int) -> tuple[Tensor, list[Tensor]]:
    x = 3 * torch.randn(n, 2)
    kept = [x]
    for t in steps(5):
        x = 0.8 * x + 0.1 * model(x, torch.full((n,), t))
        kept.append(x)
    return torch.stack(kept, dim=1), kept


def moved(model: Any, n: int) -> Tensor:
    x = torch.randn(n, 1, 2)
    for t in steps(5):
        x = 0.9 * x + 0.1 * model(x.flatten(1).flip(-1), t).flip(-1)[:, None] + 0.1 * torch.randn_like(x)
    return (x.permute(0, 2, 1).reshape(n, 2) / 2 + 0.5).clamp(0, 1)


with torch.random.fork_rng(devices=[]):
    torch.manual_seed(1)
    MLP = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))


@pytest.mark.parametrize("loop", [guided, concatenated, all_states, moved])
def test_any_number_of_samples(loop: Callable[..., Any]) -> None:
    model = MLP if loop is concatenated else network()
    traced = fastsde.trace(loop, model, 4)
    assert traced.table is not None, traced.why_no_table
    if loop is guided:
        with pytest.raises(ValueError, match="n must be 4"):  # each sample has its own label
            traced(model, 7)
        return
    with torch.no_grad():
        for n in (0, 1, 4, 63):
            ours = traced(model, n, seed=5)
            keys = noise.sample_keys(5, n)
            draws = record(loop, model, n).draws if n else []
            noises = [noise.normal(keys, step, (2,)).reshape(draw.shape) for step, draw in enumerate(draws)]
            if n == 0:
                continue
            with Replay(noises):
                theirs = loop(model, n)
            for a, b in zip(
                torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(theirs), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["reference", "eager", "persistent"])
def test_backends(backend: str) -> None:
    fast = fastsde.accelerate(concatenated, backend=backend)
    other = fastsde.accelerate(concatenated, backend="reference")
    torch.testing.assert_close(fast(MLP, 65), other(MLP, 65), rtol=0, atol=2e-5)
    assert fast.traced is not None
    assert fast.traced.engine == backend
    assert backend in fast.explain()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "eager", "graph", "persistent"])
def test_backends_on_a_gpu(backend: str) -> None:
    def on_gpu(model: Any, n: int) -> Tensor:
        x = torch.randn(n, 2, device="cuda")
        for t in torch.linspace(1, 0.1, 40, device="cuda"):
            x = 0.9 * x + 0.1 * model(torch.cat((x, t.expand(n, 1)), -1)) + 0.2 * torch.randn_like(x)
        return x

    model = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 2)).cuda()
    fast = fastsde.accelerate(on_gpu, backend=backend)
    ours = [fast.with_options(seed=seed)(model, 1000) for seed in (0, 1, 0)]
    assert torch.equal(ours[0], ours[2])
    reference = fastsde.accelerate(on_gpu, backend="reference")(model, 1000)
    torch.testing.assert_close(ours[0], reference, rtol=0, atol=2e-4)
    torch.manual_seed(4)
    theirs = on_gpu(model, 1000)
    torch.manual_seed(4)
    torch.testing.assert_close(fast.with_options(noise="torch", backend="auto")(model, 1000), theirs, rtol=0, atol=2e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("loop", [guided, all_states, moved])
def test_networks_of_any_kind_in_a_graph(loop: Callable[..., Any]) -> None:
    with torch.device("cuda"):
        model = network().cuda()
        fast = fastsde.accelerate(loop, backend="graph")
        reference = fastsde.accelerate(loop, backend="reference")
        for a, b in zip(tree_leaves(fast(model, 33)), tree_leaves(reference(model, 33)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


def test_samples_do_not_depend_on_the_batch() -> None:
    traced = fastsde.trace(concatenated, MLP, 5)
    whole = traced(MLP, 70_001, seed=2)
    torch.testing.assert_close(traced(MLP, 3, seed=2, first_sample=69_998), whole[-3:], rtol=0, atol=1e-5)
    torch.testing.assert_close(fastsde.sample(MLP, (5, 2), solver=traced.table, seed=2), whole[:5], rtol=0, atol=1e-5)


# Conditions -----------------------------------------------------------------------------------------------------------


def test_new_labels_need_no_new_trace() -> None:
    def loop(model: Any, y: Tensor, w: float) -> Tensor:
        x = torch.randn(3, 2)
        for t in steps(5):
            x = 0.9 * x + 0.1 * w * model(x, t, y)
        return x

    model, fast = network(), fastsde.accelerate(loop, noise="torch")
    traces = []
    for labels in ([0, 1, 2], [3, 3, 4]):
        y = torch.tensor(labels)
        torch.manual_seed(1)
        theirs = loop(model, y, 0.5).detach()
        torch.manual_seed(1)
        torch.testing.assert_close(fast(model, y, 0.5), theirs, rtol=0, atol=1e-5)
        traces.append(fast.traced)
    assert traces[0] is traces[1]
    fast(model, torch.tensor([1, 1, 1]), 0.6)
    assert fast.traced is not traces[0]  # a number is part of the table


def test_conditions_that_follow_the_row() -> None:
    def two_calls(model: Any, n: int) -> Tensor:
        x, y, none = torch.randn(n, 2), torch.arange(n) % 5, torch.zeros(n, dtype=torch.long)
        for t in steps(5):
            f, f_uncond = model(x, t, y), model(x, t, none)
            x = 0.9 * x + 0.1 * (f_uncond + 1.5 * (f - f_uncond))
        return x

    model, fast = network(), fastsde.accelerate(two_calls, noise="torch")
    torch.manual_seed(1)
    theirs = two_calls(model, 6).detach()
    torch.manual_seed(1)
    torch.testing.assert_close(fast(model, 6), theirs, rtol=0, atol=1e-5)
    assert fast.traced is not None
    assert fast.traced.table is not None
    assert fast.traced.slots == 2


# The loop's own side --------------------------------------------------------------------------------------------------


def test_modes_that_the_loop_sets_are_used_later() -> None:
    def loop(model: Any, n: int) -> Tensor:
        was = model.training
        model.eval()
        x = torch.randn(n, 2)
        for t in steps(4):
            x = 0.9 * x + 0.1 * model(x, t)
        model.train(was)
        return x

    model = Network().train()  # dropout would be noticed
    fast = fastsde.accelerate(loop)
    first = fast(model, 5)
    assert model.training
    assert model.dropout.training
    assert torch.equal(fast(model, 5), first)


def test_any_default_device() -> None:
    def loop(model: Any, n: int, y: Tensor) -> Tensor:
        x = torch.randn(n, 2, device="cpu")
        for t in steps(4):
            doubled = model(torch.cat([x] * 2), torch.tensor([t], device="cpu"), torch.cat([y, y]))
            x = 0.9 * x + 0.1 * doubled.chunk(2)[0].flip(-1)
        return torch.stack([x, x])

    y, model = torch.tensor([1, 2, 3]), network()
    expected = fastsde.accelerate(loop)(model, 3, y)
    fast = fastsde.accelerate(loop)
    with torch.device("meta"):
        assert torch.equal(fast(model, 3, y), expected)


def test_weights_are_followed_and_the_network_is_left_alone() -> None:
    model, fast = network(), fastsde.accelerate(concatenated)
    fast(MLP, 4)
    assert "forward" not in vars(MLP)
    own = MLP[0].weight.detach().clone()
    before = fast(MLP, 4)
    try:
        with torch.no_grad():
            MLP[0].weight.mul_(2)
        after = fast(MLP, 4)
    finally:
        with torch.no_grad():
            MLP[0].weight.copy_(own)
    assert not torch.equal(before, after)
    assert torch.equal(fast(MLP, 4), before)
    del model


def test_threads_trace_and_sample_at_the_same_time() -> None:
    fast, results = fastsde.accelerate(concatenated), dict[int, Tensor]()

    def work(i: int) -> None:
        for n in (20 + i, 20 + i % 2):
            results[n] = fast(MLP, n)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, result in results.items():
        assert torch.equal(result, fast(MLP, n))


def test_a_wrong_trace_is_an_error_that_says_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsde.tracing import tabulate

    right = tabulate._coefficients

    def wrong(row: Any, slots: int) -> Any:
        found = right(row, slots)
        found.f[0] = {key: 1.02 * value for key, value in found.f[0].items()}
        return found

    monkeypatch.setattr(tabulate, "_coefficients", wrong)
    with pytest.raises(MismatchError, match=r"differs from the loop's own by \S+ \(RMS\), where rounding explains"):
        fastsde.accelerate(concatenated)(MLP, 16)
    fastsde.accelerate(concatenated, check=False)(MLP, 16)


def test_the_cache_is_bounded() -> None:
    fast = fastsde.accelerate(concatenated, check=False)
    for n in range(1, 25):
        fast(MLP, n)
    assert sum(map(len, fast._known.values())) <= 16


def test_explain_shows_the_rows() -> None:
    text = fastsde.trace(ddim_loop, network().double(), 3, clip=1.0).explain()
    for words in ("10 network calls, 1 slot", "It is a table", "f = network(s0, 999)", "D = clamp(", "row 9"):
        assert words in text
    text = fastsde.trace(masked, network(), 3).explain()
    assert "It is no table, since its coefficients differ from element to element" in text


def test_explain_says_why_a_loop_does_not_run_in_one_launch() -> None:
    fast = fastsde.accelerate(guided)
    fast(network(), 4)
    assert "It does not run in one launch: " in fast.explain()
    sampler = fastsde.Sampler(MLP, (2,), steps=3)
    sampler(4, callback=lambda row, time, x: None)
    assert sampler.backend is not None  # that of a call without a callback, which does not change what is said
    assert "does not support callback" in (sampler.passed_over or "")
    fast = fastsde.accelerate(concatenated)
    fast(MLP, 65)
    assert ("one launch" in fast.explain()) == (fast.traced.engine != "persistent")


def masked(model: Any, n: int) -> Tensor:
    mask, known = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    x = torch.randn(n, 2)
    for t in steps(4):
        x = 0.9 * x + 0.1 * model(x, t)
        x = mask * known + (1 - mask) * x
    return x


def test_what_is_no_table_says_which_options_it_cannot_have() -> None:
    traced = fastsde.trace(masked, network(), 3)
    assert traced.table is None
    assert traced(network(), seed=1).shape == (3, 2)
    for options, words in (
        ({"n": 4}, "n must be 3"),
        ({"backend": "persistent"}, "backend 'persistent' needs a loop that is a table"),
        ({"compile": True}, "compile needs a loop that is a table"),
        ({"max_batch": 2}, "max_batch needs a loop that is a table"),
    ):
        with pytest.raises(ValueError, match=words):
            traced(network(), **options)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fastsde.accelerate(3), "loop must be callable, got int: for a method, give object.method"),
        (lambda: fastsde.accelerate(guided, what=1), "accelerate takes network, .*, got 'what'"),
        (lambda: fastsde.accelerate(guided, noise="numpy"), "noise must be 'contract' or 'torch', got 'numpy'"),
        (lambda: fastsde.accelerate(guided, seed=-1), r"seed must be in \[0, 2\^64\), got -1"),
        (lambda: fastsde.accelerate(guided, check=1), "check must be"),
        (lambda: fastsde.accelerate(guided, modules=MLP), "modules must be a sequence of nn.Modules"),
        (lambda: fastsde.accelerate(guided).with_options(what=1), "'what' is no option"),
        (lambda: fastsde.accelerate(guided).explain(), "call the loop once"),
        (lambda: fastsde.trace(guided, 3, 4), "network must name .* exactly one argument .* got none"),
        (lambda: fastsde.trace(guided, MLP, 4, network="net"), "network must be one of the loop's arguments model, n"),
        (lambda: fastsde.trace(guided, MLP, 4, network="n"), "network 'n' must be callable, got int"),
        (lambda: fastsde.trace(guided, MLP, 4, modules=[3]), "modules must be nn.Modules, got int"),
        (lambda: fastsde.trace(concatenated, MLP, 4, state="n"), "state must name a tensor argument .* got 'n'"),
        (lambda: fastsde.trace(concatenated, MLP), "missing a required argument: 'n'"),
        (lambda: fastsde.trace(concatenated, MLP, 4)(MLP, 4, steps=3), "'steps' is no option of a traced loop"),
        (lambda: fastsde.trace(concatenated, MLP, 4)(MLP, -1), "n must be"),
        (lambda: fastsde.trace(concatenated, MLP, 4)(MLP, 4, state=torch.zeros(4, 2)), "starts from no state"),
        (lambda: fastsde.trace(lambda net, n: torch.randn(n), MLP, 4), "the loop never calls its network"),
        (lambda: fastsde.trace(concatenated, MLP, 4)(4), "model must be the network, got int"),
        (lambda: fastsde.trace(lambda net, n: 3, MLP, 4), "the loop never calls its network"),
    ],
)
def test_bad_input(call: Callable[[], Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=words):
        call()


def test_errors_of_the_loop_and_of_the_schedule() -> None:
    def broken(model: Any, n: int) -> Tensor:
        raise KeyError("my own")

    def infinite(model: Any, n: int) -> Tensor:
        x = torch.randn(n, 2)
        for i in range(3):
            x = x + model(x, i) / (i - 1)
        return x

    with pytest.raises(KeyError, match="my own"):
        fastsde.accelerate(broken)(MLP, 3)
    with pytest.raises(TraceError, match="the loop computes NaN or infinity before network call 2"):
        fastsde.accelerate(infinite)(network(), 3)
    assert math.isfinite(float(fastsde.accelerate(concatenated)(MLP, 3).sum()))
