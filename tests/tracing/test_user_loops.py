"""Loops as users write them (loops.py, refused_loops.py), traced rightly or refused; nothing is baked in silently."""

from __future__ import annotations

import functools
import inspect
import itertools
import linecache
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import refused_loops
import torch
from cases import EITHER, MLP, REFUSED, TRACED, Case, Mixing
from loops import Diffusion, GaussianDiffusion
from refused_loops import dynamic_thresholding, langevin_by_norms, learned_variance
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import fastsde
from fastsde import TraceError
from fastsde.tracing import Replay, record

# fp32: some 8 steps of 8 rounded operations on states of up to 4, half an ulp each (2^-22), if all go the same way.
# Half: 6 steps round a state and a sum of up to 4 by at most 2 eps each, in random directions: 2 sqrt(12) eps.
TOLERANCES = {torch.float32: 64 * 2**-22, torch.float16: 8 * 2**-10, torch.bfloat16: 8 * 2**-7}
FP32 = TOLERANCES[torch.float32]


def network(make: Callable[[], nn.Module] = MLP) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def prepared(case: Case, net: nn.Module) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Returns the loop, its first arguments and the options of `fastsde.accelerate`."""
    if case.made:
        return case.loop(net), (), {"modules": [net], **case.options}
    return case.loop, (net,), case.options


def seeded(loop: Callable[..., Any], *args: Any, seed: int, **kwargs: Any) -> Any:
    """Returns the result, without anything that later steps of the loop could change in it."""
    torch.manual_seed(seed)
    result = loop(*args, **kwargs)
    result = list(result) if inspect.isgenerator(result) else result
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, result)


def assert_same(ours: Any, theirs: Any, tolerance: float) -> None:
    """Compares structure, types, dtypes and shapes, and the values to rounding."""
    structures = [
        tree_map(lambda x: (x.dtype, x.shape, x.device) if isinstance(x, Tensor) else x, r) for r in (ours, theirs)
    ]
    assert structures[0] == structures[1]
    assert type(ours) is type(theirs)
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        if isinstance(a, Tensor):
            assert type(a) is type(b)
            torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance)


def generators(kwargs: dict[str, Any]) -> list[Tensor]:
    found = [x for x in tree_leaves(kwargs) if isinstance(x, torch.Generator)]
    return [torch.get_rng_state(), *(g.get_state() for g in found)]


def cases(which: list[Case]) -> Any:
    return pytest.mark.parametrize("case", which, ids=lambda case: case.name)


@cases(TRACED)
def test_the_accelerated_loop_returns_the_loops_numbers(case: Case) -> None:
    loop, args, options = prepared(case, network(case.network))
    fast = fastsde.accelerate(loop, noise="torch", **options)
    traces = []
    for seed in (1, 2, 1):
        kwargs = case.arguments(case.dtype, seed)
        theirs = seeded(loop, *args, seed=seed, **kwargs)
        after = generators(kwargs)
        kwargs = case.arguments(case.dtype, seed)
        ours = seeded(fast, *args, seed=seed, **kwargs)
        assert_same(ours, theirs, TOLERANCES[case.dtype])
        assert all(map(torch.equal, generators(kwargs), after))  # what is drawn next is the same as well
        traces.append(fast.traced)
    assert traces[1] is traces[0]
    assert traces[2] is traces[0]


@cases([case for case in TRACED if case.double])
def test_the_recorded_algebra_is_the_loops(case: Case) -> None:
    net = network(case.network).double()
    loop, args, options = prepared(case, net)
    kwargs = case.arguments(torch.float64, 1)
    program = record(loop, *args, double=True, **options, **case.arguments(torch.float64, 1))
    generator = torch.Generator().manual_seed(3)
    noises = [torch.randn(draw.shape, dtype=torch.float64, generator=generator) for draw in program.draws]
    state = kwargs[case.state].clone() if case.state else None
    ours = program.run([net], [z.clone() for z in noises], dtype=torch.float64, state=state)
    with Replay(noises, double=True):  # the loop may change them in place
        theirs = loop(*args, **kwargs)
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-12, atol=1e-12)


@cases(EITHER)
def test_never_wrong(case: Case) -> None:
    loop, args, options = prepared(case, network(case.network))
    assert_never_wrong(
        loop, loop, args, lambda seed: case.arguments(torch.float32, seed), TOLERANCES[case.dtype], **options
    )


@cases(REFUSED)
@pytest.mark.parametrize("call", ["trace", "accelerate"])
def test_refusals_name_the_operation_and_the_line(case: Case, call: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = functools.partial(fastsde.trace, case.loop)
    run = run if call == "trace" else fastsde.accelerate(case.loop, noise="torch")
    with pytest.raises(TraceError) as caught:
        run(network(case.network), **case.arguments(torch.float32, 1))
    error = caught.value
    assert re.search(case.words, f"{error.operation} {error.reason}".lower())
    found = re.fullmatch(r"refused_loops\.py:(\d+) in ([\w.]+)", error.line)
    assert found, error.line
    assert linecache.getline(refused_loops.__file__, int(found[1])).rstrip().endswith("here"), error.line
    assert found[2].split(".")[-1] in (case.name, "_threshold")
    assert error.operation in str(error)
    assert error.reason in str(error)
    assert error.line in str(error)
    assert "\n" not in error.line


@pytest.mark.parametrize("loop", [dynamic_thresholding, langevin_by_norms, learned_variance])
def test_what_no_table_has_is_replayed_on_request(loop: Callable[..., Any]) -> None:
    case = next(case for case in REFUSED if case.loop is loop)
    net = network(case.network)
    fast = fastsde.accelerate(loop, noise="torch", replay=True)
    for seed in (1, 2):
        assert_same(seeded(fast, net, seed=seed), seeded(loop, net, seed=seed), FP32)


# Nothing is baked in silently -----------------------------------------------------------------------------------------

SCALE = 0.2
SETTINGS = {"eta": 0.3, "nested": {"clip": 1.5}}
SCHEDULE = np.linspace(1.0, 0.2, 6)
COEFFICIENTS = torch.linspace(0.1, 0.3, 6)
WIDTHS = [0.1, 0.2]


def _scaled(f: Tensor) -> Tensor:
    return SCALE * f


@torch.no_grad()
def configured(model, n=3, steps=6, labels=None, eta=None):
    x = torch.randn(n, 2)
    for i in range(steps):
        x = x + _scaled(model(x, float(SCHEDULE[i]), labels)) + COEFFICIENTS[i] * WIDTHS[i % 2] * torch.randn(n, 2)
        x = x + (SETTINGS["eta"] if eta is None else eta) * 0.1 * torch.randn_like(x)
    return x.clamp(-SETTINGS["nested"]["clip"], SETTINGS["nested"]["clip"])


def _a_global(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "SCALE", 0.4)


def _an_entry(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(SETTINGS, "eta", 0.9)


def _a_nested_entry(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(SETTINGS["nested"], "clip", 0.5)


def _a_list(patch: pytest.MonkeyPatch) -> None:
    WIDTHS[1] = 0.7


def _an_array(patch: pytest.MonkeyPatch) -> None:
    SCHEDULE[2] = 3.0


def _a_tensor(patch: pytest.MonkeyPatch) -> None:
    COEFFICIENTS[2] = 1.0


def _a_function(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "_scaled", lambda f: 0.5 * f)


@pytest.mark.parametrize(
    "change",
    [_a_global, _an_entry, _a_nested_entry, _a_list, _an_array, _a_tensor, _a_function],
    ids=lambda f: f.__name__[1:],
)
def test_a_changed_global_is_followed(change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    fast = fastsde.accelerate(configured, noise="torch")
    held = [x.copy() if isinstance(x, list | np.ndarray) else x.clone() for x in (WIDTHS, SCHEDULE, COEFFICIENTS)]
    before = seeded(fast, net, seed=1)
    change(monkeypatch)
    after = seeded(fast, net, seed=1)
    assert_same(after, seeded(configured, net, seed=1), FP32)
    assert not torch.allclose(before, after, atol=1e-3)
    monkeypatch.undo()
    WIDTHS[:], SCHEDULE[:], COEFFICIENTS[:] = held
    assert_same(seeded(fast, net, seed=1), before, FP32)


def test_changed_arguments_are_followed() -> None:
    net = network()
    fast = fastsde.accelerate(configured, noise="torch")
    labels = torch.tensor([0, 1, 2])
    others = ({"steps": 4}, {"n": 5}, {"steps": 6}, {"eta": 0.5}, {"labels": labels}, {"labels": labels + 1}, {})
    for kwargs in others * 2:
        assert_same(seeded(fast, net, seed=1, **kwargs), seeded(configured, net, seed=1, **kwargs), FP32)
    labels.fill_(3)  # in place
    kwargs = {"labels": labels}
    assert_same(seeded(fast, net, seed=1, **kwargs), seeded(configured, net, seed=1, **kwargs), FP32)


def test_positional_arguments_and_defaults_are_the_loops() -> None:
    net = network()
    fast = fastsde.accelerate(configured, noise="torch")
    assert inspect.signature(fast) == inspect.signature(configured)
    assert fast.__name__ == "configured"
    for args, kwargs in (
        ((net, 4), {}),
        ((net, 4, 3), {}),
        ((net,), {"n": 4, "steps": 3}),
        ((), {"model": net, "n": 4}),
    ):
        assert_same(seeded(fast, *args, seed=1, **kwargs), seeded(configured, *args, seed=1, **kwargs), FP32)


def test_a_trained_network_is_followed() -> None:
    net = network()
    fast = fastsde.accelerate(configured, noise="torch")
    for _ in range(2):
        assert_same(seeded(fast, net, seed=1), seeded(configured, net, seed=1), FP32)
        with torch.no_grad():
            for weight in net.parameters():
                weight.mul_(1.5)
    other = network(lambda: MLP(width=8))
    assert_same(seeded(fast, other, seed=1), seeded(configured, other, seed=1), FP32)


def _attribute(diffusion: Any) -> None:
    diffusion.eta = 0.2


def _schedule_in_place(diffusion: Any) -> None:
    diffusion.alpha_hat.mul_(0.8)


def _steps(diffusion: Any) -> None:
    diffusion.__init__(steps=4)


@pytest.mark.parametrize("change", [_attribute, _schedule_in_place, _steps], ids=lambda f: f.__name__[1:])
def test_a_changed_attribute_is_followed(change: Callable[[Any], None]) -> None:
    net, diffusion = network(), Diffusion()
    fast = fastsde.accelerate(diffusion, noise="torch")
    before = seeded(fast, net, seed=1)
    change(diffusion)
    assert_same(seeded(fast, net, seed=1), seeded(diffusion, net, seed=1), FP32)
    assert not torch.allclose(before, seeded(fast, net, seed=1), atol=1e-3)


def test_a_changed_buffer_is_followed() -> None:
    diffusion = GaussianDiffusion(Mixing())
    fast = fastsde.accelerate(diffusion.sample, noise="torch", modules=[diffusion.model])
    for _ in range(2):
        assert_same(seeded(fast, seed=1), seeded(diffusion.sample, seed=1), FP32)
        diffusion.alphas_cumprod.mul_(0.9)
    diffusion.num_timesteps = 3
    assert_same(seeded(fast, seed=1), seeded(diffusion.sample, seed=1), FP32)


def test_changed_closures_configs_and_attributes_of_the_network_are_followed() -> None:
    config = SimpleNamespace(sampling=SimpleNamespace(eta=0.5))
    weight = 0.2

    @torch.no_grad()
    def sample(model):
        x = torch.randn(3, 2)
        for i in range(5):
            x = x + weight * model.scale * model(x, i / 5) + 0.1 * config.sampling.eta * torch.randn_like(x)
        return x

    net = network()
    net.scale = 1.0  # type: ignore[assignment]
    fast = fastsde.accelerate(sample, noise="torch")

    def check() -> None:
        assert_same(seeded(fast, net, seed=1), seeded(sample, net, seed=1), FP32)

    check()
    weight = 0.4
    check()
    config.sampling.eta = 2.0
    check()
    net.scale = 0.5  # type: ignore[assignment]
    check()


# Loops that change something themselves: right or an error.

COUNT = 0
NUMBERS: Iterator[int] = itertools.count()


@torch.no_grad()
def changes_a_global(model):
    global COUNT
    COUNT += 1
    x = torch.randn(3, 2)
    for i in range(5):
        x = x + 0.1 * COUNT * model(x, i / 5)
    return x


@torch.no_grad()
def takes_the_next_number(model):
    scale = 0.1 * (1 + next(NUMBERS))
    x = torch.randn(3, 2)
    for i in range(5):
        x = x + scale * model(x, i / 5)
    return x


@torch.no_grad()
def default_that_grows(model, calls=[]):  # noqa: B006
    calls.append(1)
    x = torch.randn(3, 2)
    for i in range(5):
        x = x + 0.1 * len(calls) * model(x, i / 5)
    return x


class Counting:
    def __init__(self) -> None:
        self.calls, self.previous = 0, None

    def __call__(self, model):
        self.calls += 1
        x = torch.randn(3, 2)
        with torch.no_grad():
            for i in range(5):
                x = x + 0.1 * self.calls * model(x, i / 5)
        return x

    def continued(self, model):  # goes on from where the last call ended
        x = torch.randn(3, 2) if self.previous is None else self.previous
        with torch.no_grad():
            for i in range(5):
                x = x + 0.1 * model(x, i / 5)
        self.previous = x
        return x


@torch.no_grad()
def numpy_generator_of_its_own(model):
    rng = np.random.default_rng()
    x = torch.randn(3, 2)
    for i in range(5):
        x = x + 0.1 * model(x, i / 5) + 0.1 * torch.from_numpy(rng.standard_normal((3, 2))).float()
    return x


def _reset() -> None:
    global COUNT, NUMBERS
    COUNT, NUMBERS = 0, itertools.count()
    inspect.signature(default_that_grows).parameters["calls"].default.clear()


def assert_never_wrong(
    loop: Any,
    again: Any,
    args: tuple[Any, ...],
    arguments: Callable[[int], dict[str, Any]],
    tolerance: float,
    **options: Any,
) -> None:
    """Three calls of a loop, and three of it accelerated from the same beginning: each is right or refused."""
    seeds = (1, 2, 1)
    given = [arguments(seed) for seed in seeds]
    _reset()
    theirs = [seeded(loop, *args, seed=seed, **kwargs) for seed, kwargs in zip(seeds, given, strict=True)]
    _reset()
    fast = None
    for seed, result, after in zip(seeds, theirs, given, strict=True):
        kwargs = arguments(seed)
        try:
            fast = fast or fastsde.accelerate(again, noise="torch", **options)
            ours = seeded(fast, *args, seed=seed, **kwargs)
        except TraceError:
            return
        assert_same(ours, result, tolerance)
        for changed, expected in zip(tree_leaves(kwargs), tree_leaves(after), strict=True):
            if isinstance(changed, Tensor):  # by the loop, in place
                torch.testing.assert_close(changed, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "make",
    [
        lambda: changes_a_global,
        lambda: takes_the_next_number,
        lambda: default_that_grows,
        Counting,
        lambda: Counting().continued,
    ],
    ids=["global", "iterator", "default", "attribute", "last state"],
)
def test_a_loop_that_changes_itself_is_never_wrong(make: Callable[[], Any]) -> None:
    assert_never_wrong(make(), make(), (network(),), lambda seed: {}, FP32)


def test_random_numbers_that_nothing_records_are_an_error() -> None:
    with pytest.raises(TraceError):
        fastsde.accelerate(numpy_generator_of_its_own, noise="torch")(network())


def test_a_numpy_generator_given_by_the_user_is_not_baked_in() -> None:
    @torch.no_grad()
    def sample(model, rng):
        x = torch.randn(3, 2)
        for i in range(5):
            x = x + 0.1 * model(x, i / 5) + 0.1 * torch.from_numpy(rng.standard_normal((3, 2))).float()
        return x

    assert_never_wrong(sample, sample, (network(),), lambda seed: {"rng": np.random.default_rng(seed)}, FP32)


def test_steps_from_an_iterator_are_never_wrong() -> None:
    @torch.no_grad()
    def sample(model, times):
        x = torch.randn(3, 2)
        for t in times:
            x = x + 0.1 * model(x, t)
        return x

    net = network()
    fast = fastsde.accelerate(sample, noise="torch")
    for count in (4, 6, 4):
        try:
            ours = seeded(fast, net, seed=1, times=(i / count for i in range(count)))
        except TraceError:
            return
        assert_same(ours, seeded(sample, net, seed=1, times=(i / count for i in range(count))), FP32)


def test_a_callback_of_the_user_gets_every_state_or_is_refused() -> None:
    @torch.no_grad()
    def sample(model, callback=None):
        x = torch.randn(3, 2)
        for i in range(5):
            x = x + 0.1 * model(x, i / 5)
            callback(i, x)
        return x

    net, ours, theirs = network(), [], []
    fast = fastsde.accelerate(sample, noise="torch")
    for seed in (1, 2):
        try:
            seeded(fast, net, seed=seed, callback=lambda i, x: ours.append((i, x)))
        except TraceError:
            return
        seeded(sample, net, seed=seed, callback=lambda i, x: theirs.append((i, x)))
        assert_same(ours, theirs, FP32)


def test_memory_of_the_user_is_never_left_wrong() -> None:
    out, history = torch.zeros(6, 3, 2), []

    @torch.no_grad()
    def sample(model, out, history):
        x = torch.randn(3, 2)
        for i in range(6):
            x = x + 0.1 * model(x, i / 6)
            out[i] = x
            history.append(x.clone())
        return x

    net, theirs, theirs_out = network(), [], torch.zeros(6, 3, 2)
    fast = fastsde.accelerate(sample, noise="torch")
    for seed in (1, 2):
        try:
            seeded(fast, net, seed=seed, out=out, history=history)
        except TraceError:
            return
        seeded(sample, net, seed=seed, out=theirs_out, history=theirs)
        assert_same((out, history), (theirs_out, theirs), FP32)


# The loops themselves -------------------------------------------------------------------------------------------------


def test_the_loops_run_in_plain_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    """Each loop must be one that a user has running; and the cases are as many and as different as they claim."""
    for case in (*TRACED, *EITHER, *REFUSED):
        loop, args, _ = prepared(case, network(case.network))
        results = [seeded(loop, *args, seed=seed, **case.arguments(case.dtype, seed)) for seed in (1, 1, 2)]
        tensors = [[x.double() for x in tree_leaves(r) if isinstance(x, Tensor)] for r in results]
        if case.name not in ("numpy_noise", "decides_by_random", "keeps_lists", "keeps_numpy_states"):
            assert all(map(torch.equal, tensors[0], tensors[1])), case.name
            assert all(bool(x.isfinite().all()) for x in tensors[0])
            assert max(float(x.abs().max()) for x in tensors[0]) < 8
        if case.name not in ("seeds_itself", "keeps_lists", "keeps_numpy_states"):
            assert any(not torch.equal(x, y) for x, y in zip(tensors[0], tensors[2], strict=True)), case.name
    names = [case.name for case in (*TRACED, *EITHER, *REFUSED)]
    assert len(set(names)) == len(names)
    assert len(TRACED) >= 40
    assert len(REFUSED) >= 18
