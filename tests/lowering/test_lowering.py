"""Networks as programs: parity with the network, what is refused and why, and what changes between calls."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import CONDITIONED, LOWERED, Film, N, Residual, tame
from torch import Tensor, nn
from torch.nn import functional

import fastsde
from fastsde import Sampler, ops
from fastsde.lowering import NotLowered, evaluate, lower

CPU = torch.device("cpu")
TIMES = torch.linspace(1, 0.01, 9)
native = pytest.mark.skipif(not ops.has_native(CPU), reason="no native kernels")


def build(name: str, seed: int = 0) -> tuple[Any, tuple[int, ...]]:
    torch.manual_seed(seed)
    make, shape = LOWERED[name]
    net = make()
    return (net.eval() if isinstance(net, nn.Module) else net), shape


def assert_as_exact(ours: Tensor, network: Any, *arguments: Any) -> None:
    """Checks that an error is at most twice that of PyTorch in fp32, plus some roundings."""
    theirs = network(*arguments)
    doubled = copy.deepcopy(network).double() if isinstance(network, nn.Module) else network
    exact = doubled(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments))
    error, scale = float((theirs - exact).abs().max()), max(1.0, float(exact.abs().max()))
    torch.testing.assert_close(ours.double(), exact.double(), rtol=0, atol=2 * error + 2**-20 * scale)


# Parity -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOWERED)
def test_the_program_in_plain_pytorch_is_the_network(name: str) -> None:
    network, shape = build(name)
    lowered = lower(network, shape, TIMES)
    for n in (1, 6, 63):
        x = torch.randn((n, *shape))
        vectors = lowered.vectors(TIMES, n, ())
        for row in (0, 4, 8):
            with torch.no_grad():
                found = evaluate(lowered.program, vectors, x.reshape(n, -1), row)
                assert_as_exact(found.reshape(x.shape), network, x, TIMES[row].expand(n))


@native
@pytest.mark.parametrize("name", LOWERED)
@pytest.mark.parametrize("n", [1, 63, 130])
def test_the_kernel_samples_as_the_reference(name: str, n: int) -> None:
    network, shape = build(name)
    network = tame(network) if isinstance(network, nn.Module) and name != "functions" else network
    options = {"steps": 7, "solver": "ddim", "prediction": "eps", "seed": 3, "trajectory": 3}
    ours, theirs = (fastsde.sample(network, (n, *shape), backend=b, **options) for b in ("persistent", "reference"))
    for mine, right in zip(ours, theirs, strict=True):
        scale = max(1.0, float(right.abs().max()))
        torch.testing.assert_close(mine, right, rtol=0, atol=3e-5 * scale)


@native
@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize("kind", CONDITIONED)
def test_conditions_and_guidance(kind: str, guidance: float | None) -> None:
    torch.manual_seed(0)
    network, given = tame(Film().eval()), CONDITIONED[kind]
    options: dict[str, Any] = {"steps": 7, "prediction": "eps", "model_kwargs": given, "seed": 3}
    if guidance is not None:
        options |= {"guidance": guidance, "uncond_kwargs": {name: torch.zeros_like(v) for name, v in given.items()}}
    ours, theirs = (fastsde.sample(network, (N, 3), backend=b, **options) for b in ("persistent", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    assert Sampler(network, (3,)).backend == "persistent"
    split = fastsde.sample(network, (N, 3), backend="persistent", max_batch=2, **options)
    torch.testing.assert_close(split, ours, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_what_the_time_or_the_conditions_decide_is_no_instruction() -> None:
    torch.manual_seed(0)
    film = Film().eval()
    alone = lower(film, (3,), TIMES).program
    assert alone.products == 3 * 24 + 24 * 3  # of the embedding and the FiLM layer nothing is left
    shared = lower(lambda x, t, c: film(x, t, c), (3,), TIMES, (torch.ones(5, 2),)).program
    assert shared == alone
    own = lower(lambda x, t, c: film(x, t, c), (3,), TIMES, (torch.randn(5, 2),)).program
    assert own.products == alone.products + 24 * 48
    assert own.widths[1] == 24
    residual = lower(Residual(32, 3), (2,), TIMES).program
    assert residual.products == 64 * 32 + 3 * 32 * 32 + 32 * 2


# Refusals -----------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return x


class Writing(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        found = torch.zeros(len(x), 3)
        found[:, :2] = x
        return found[:, :2]


def _in_place(x: Tensor, t: Tensor) -> Tensor:
    h = 2 * x
    view = h[:, :1]
    h.add_(1)
    return torch.cat((view, view), 1)


def _written_later(t: Tensor) -> Tensor:
    scale = torch.ones(1)
    found = scale * t[:, None]
    scale.add_(1)
    return found + scale


REFUSED: dict[str, tuple[Any, str]] = {
    "attention": (lambda x, t: x * (x @ x.T).mean(), "both of its factors follow the state, as in attention"),
    "mixing": (lambda x, t: x - x.mean(0), "it mixes samples"),
    "batch size": (lambda x, t: x * len(x), "depends on more than x, t, the conditions and the weights"),
    "decision": (lambda x, t: x if t[0] > 0.5 else -x, "Python code reads the time"),
    "sorting": (lambda x, t: x.sort(-1).values, "sort: a program has no such operation"),
    "dropout": (
        nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 2)),
        r"Dropout \(1\): .*draws random numbers",
    ),
    "convolution": (nn.Sequential(nn.Conv1d(1, 1, 1), nn.Linear(3, 2)), r"Conv1d \(0\): a program has no such layer"),
    "noise": (lambda x, t: x + torch.randn(2), "draws random numbers"),
    "state": (Counting(), "a call of it changes what it holds"),
    "writing": (Writing(), "writes the state into memory made before .*: use torch.cat"),
    "in place": (_in_place, "reads what it has changed in place through another tensor"),
    "its argument": (lambda x, t: x.mul_(2), "changes a weight or an argument in place"),
    "half": (lambda x, t: x.bfloat16().float(), "it computes in torch.bfloat16"),
    "threshold": (lambda x, t: functional.softplus(x, threshold=5), "it is linear from 5 on"),
    "numpy": (lambda x, t: x * float(t.numpy()[0]), r"Python code reads the time \(numpy\)"),
    "a list": (lambda x, t: x * t.tolist()[0], r"Python code reads the time \(tolist\)"),
    "written later": (lambda x, t: x + _written_later(t), "it writes in place to what it has read before"),
    "large": (nn.Sequential(nn.Linear(3, 3000), nn.Linear(3000, 3000), nn.Linear(3000, 2)), "9,021,002 parameters"),
}


@native
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_program_says_why_and_runs_elsewhere(kind: str) -> None:
    network, reason = REFUSED[kind]
    with pytest.raises(ValueError, match=f"backend 'persistent': .*{reason}.*; use 'eager' or 'reference'"):
        Sampler(network, (2,), backend="persistent")
    assert Sampler(network, (2,)).backend == "eager"


def test_the_network_s_own_errors_are_its_own() -> None:
    with pytest.raises(RuntimeError, match="must match the size"):
        fastsde.sample(lambda x, t: x + torch.ones(3), (2, 2), steps=2)
    with pytest.raises(TypeError, match="missing a required argument: 'c'"):
        fastsde.sample(lambda x, t, c: x + c, (2, 2), steps=2)
    with pytest.raises(NotLowered, match="condition without samples"):
        lower(lambda x, t, c: x, (2,), TIMES, (torch.ones(0, 2),))


@native
def test_no_samples_and_conditions_out_of_range() -> None:
    network, options = Film().eval(), {"steps": 3, "backend": "persistent"}
    for n in (0, 2, 0):
        assert fastsde.sample(network, (n, 3), model_kwargs={"c": torch.zeros(n, 2)}, **options).shape == (n, 3)
    sampler, labels = Sampler(network, (3,), **options), torch.tensor([1, 2, 99])
    for before in (False, True):
        if before:
            sampler(3, model_kwargs={"y": labels % 11})
        with pytest.raises(IndexError, match=r"at time 1 with model_kwargs 'y' of 1 \.\. 99: index out of range"):
            sampler(3, model_kwargs={"y": labels})


@native
def test_a_network_that_needs_conditions_is_decided_on_when_they_come() -> None:
    sampler = Sampler(lambda x, t, c: -x * c, (2,), steps=3, backend="persistent")
    c = torch.rand(5, 1)
    expected = fastsde.sample(lambda x, t, c: -x * c, (5, 2), steps=3, backend="reference", model_kwargs={"c": c})
    torch.testing.assert_close(sampler(5, model_kwargs={"c": c}), expected)
    assert sampler.last_backend == "persistent"
    sampler = Sampler(lambda x, t, c: x.sort(-1).values * c, (2,), steps=3)
    sampler(5, model_kwargs={"c": c})
    assert sampler.last_backend == "eager"


# Changes ------------------------------------------------------------------------------------------------------------


def _change_rate(net: Film) -> None:
    net.embedding[0].scale = 3.0


CHANGES: dict[str, Callable[[Film], Any]] = {
    "a weight of the state": lambda net: net.first.weight.data.mul_(1.5),
    "a weight of the time": lambda net: net.embedding[1].weight.data.mul_(1.5),
    "a weight of a condition": lambda net: net.condition.weight.data.mul_(1.5),
    "a norm's weight": lambda net: net.norm.weight.data.add_(0.5),
    "an attribute": _change_rate,
    "a module": lambda net: setattr(net, "embedding", nn.Sequential(net.embedding[0], nn.Linear(16, 24))),
    "a weight itself": lambda net: setattr(net.first, "weight", nn.Parameter(torch.ones(24, 3) / 9)),
    "a hook": lambda net: net.first.register_forward_hook(lambda module, args, output: 2 * output),
    "loaded": lambda net: net.load_state_dict(Film().state_dict()),
}


@native
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_calls_is_seen(change: str, own: bool) -> None:
    torch.manual_seed(0)
    net = Film().eval()
    given = {"c": torch.randn(4, 2) if own else torch.full((4, 2), 0.4)}
    sampler = Sampler(net, (3,), steps=4, solver="ddim", prediction="eps", backend="persistent")
    before = sampler(4, model_kwargs=given)
    CHANGES[change](net)
    after = sampler(4, model_kwargs=given)
    assert not torch.allclose(before, after, rtol=1e-3)
    options: dict[str, Any] = {"steps": 4, "solver": "ddim", "prediction": "eps", "model_kwargs": given}
    expected = fastsde.sample(net, (4, 3), backend="reference", **options)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


RATE = 1.0


class Classy(nn.Module):
    rate = 1.0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -x * self.rate * RATE


@native
@pytest.mark.parametrize("what", ["a class attribute", "a global"])
def test_a_class_and_the_globals_of_its_methods_are_looked_at(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Classy()
    sampler = Sampler(net, (2,), steps=3, backend="persistent")
    before = sampler(2)
    if what == "a global":
        monkeypatch.setitem(globals(), "RATE", 0.5)
    else:
        monkeypatch.setattr(Classy, "rate", 0.5)
    expected = fastsde.sample(net, (2, 2), steps=3, backend="reference")
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(sampler(2), expected)


@native
def test_numbers_that_python_code_reads_are_looked_at_again() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return -x * self.scale.item()

    net = Scaled()
    sampler = Sampler(net, (2,), steps=3, backend="persistent")
    sampler(2)
    net.scale.data.fill_(0.5)
    expected = fastsde.sample(net, (2, 2), steps=3, backend="reference")
    torch.testing.assert_close(sampler(2), expected)


class Reading(nn.Module):
    """Reads a buffer and a shared condition as lists, and adds to a part of an embedding in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.ones(1))
        self.last = nn.Linear(3, 3)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        embedding = torch.stack((t, 2 * t, 3 * t), -1)
        embedding[:, :2] += 1.5
        return self.last(x + embedding) * c.tolist()[0] * float(self.k.numpy()[0])


@native
def test_lists_and_arrays_that_python_code_reads_are_looked_at_again() -> None:
    torch.manual_seed(0)
    net = Reading()
    sampler = Sampler(net, (3,), steps=3, backend="persistent")
    for c, k in ((1.0, 1.0), (-1.0, 1.0), (-1.0, 0.5)):
        net.k.fill_(k)
        given = {"c": torch.full((4,), c)}
        expected = fastsde.sample(net, (4, 3), steps=3, backend="reference", model_kwargs=given)
        torch.testing.assert_close(sampler(4, model_kwargs=given), expected, rtol=1e-4, atol=1e-3)


@native
@pytest.mark.parametrize("mix", [lambda c: c - c.mean(0), lambda c: c / c.max()])
def test_conditions_that_mix_samples_are_seen_whatever_they_are(mix: Callable[[Tensor], Tensor]) -> None:
    layer, c = nn.Linear(3, 3), torch.cat((torch.ones(8, 1), torch.full((2, 1), 4.0)))
    with pytest.raises(ValueError, match="depends on more than"):
        fastsde.sample(lambda x, t, c: layer(x) * mix(c), (10, 3), steps=2, backend="persistent", model_kwargs={"c": c})


@native
def test_what_is_kept_with_a_network_does_not_keep_it_alive() -> None:
    net = Film()
    fastsde.sample(net, (2, 3), steps=2, backend="persistent")
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None


@native
def test_buffers_and_random_states_are_left_alone() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    state, held = torch.get_rng_state(), net[1].running_mean.clone()
    sampler = Sampler(net, (2,), steps=2)
    assert torch.equal(net[1].running_mean, held)
    with pytest.warns(RuntimeWarning, match="BatchNorm1d in training mode"):
        sampler(3)
    assert sampler.last_backend == "eager"
    assert torch.equal(torch.get_rng_state(), state)


@native
def test_not_a_number_passes_through_a_program() -> None:
    torch.manual_seed(0)
    net = Film().eval()
    net.norm.weight.data[3] = math.nan
    with pytest.raises(fastsde.NonFiniteError, match="the network returned NaN or infinity in row 0, at time 1"):
        fastsde.sample(net, (3, 3), steps=3, backend="persistent")


class _Mixing(nn.Module):
    """Mixes the conditions of samples, which only a comparison shows; its last layer starts as zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.condition, self.last = nn.Linear(3, 2), nn.Linear(2, 2)
        nn.init.zeros_(self.last.weight), nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        f: Tensor = self.last(x + self.condition(c - c.flip(0)))
        return f


def test_a_program_that_could_not_be_compared_is_made_again() -> None:
    network, given = _Mixing(), {"c": torch.randn(6, 3)}
    sampler = fastsde.Sampler(network, (2,), steps=3)
    first = sampler(6, model_kwargs=given)
    expected = fastsde.sample(network, (6, 2), steps=3, model_kwargs=given, backend="eager")
    torch.testing.assert_close(first, expected)
    with torch.no_grad():
        network.last.weight.normal_()
    second = sampler(6, model_kwargs=given)
    assert torch.equal(second, fastsde.sample(network, (6, 2), steps=3, model_kwargs=given, backend="eager"))
    assert sampler.last_backend == "eager"
