"""`fastsde.sample` and `Sampler`: backends agree, samples depend only on the seed, and inputs are not changed."""

from __future__ import annotations

import hashlib
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastsde
from fastsde import VPSDE, NonFiniteError, Sampler, noise, sample, solvers
from fastsde.reference import network_input, solver_step

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("reference", "eager")
SDE = VPSDE()
U = 2.0**-24  # the unit roundoff of fp32
# A row rounds each term at most 18 times (see `rounding_bound`), each time by u = 6e-8 relative to about 1.
ROW = 18 * U
SHAPES = [(), (1,), (2,), (63,), (3, 5, 7)]


def elementwise(x: Tensor, t: Tensor) -> Tensor:
    """A nonlinear network with only correctly rounded operations: no libm, matrix products or reductions.

    Like a score it pulls to the origin, at a rate that depends on t and x and is that of Gaussian data or slightly
    less, so that states stay of size 1 with every solver for a score.
    """
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    return -x * ((3 + t) * 0.25) * (1 - 0.25 / (1 + x * x))


def conditional(x: Tensor, t: Tensor, label: Tensor, scale: float = 1.0) -> Tensor:
    """The same, but pulling each sample to its own point."""
    return elementwise(x - label.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype), t) * scale


class Mlp(nn.Module):
    """A small network with matrix products, whose output has the size of a score."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width + 1, 16), nn.SiLU(), nn.Linear(16, width))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat((x, t[:, None]), 1)) - x


class Scale(nn.Module):
    """f = -w b x: one weight and one buffer, to check what happens to them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))
        self.register_buffer("factor", torch.ones(1, dtype=dtype))
        self.seen: list[tuple[torch.dtype, torch.dtype, torch.dtype]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append((x.dtype, t.dtype, self.weight.dtype))
        return -self.weight * self.factor * x


def rounding_bound(table, x_init, keys, model=elementwise, *, guidance=None, kwargs=None, uncond=None):
    """Returns a bound of the error of an fp32 run of an elementwise network, and the exact result (in float64).

    This is classic running error analysis. In a row of m slots, each term of s' = A s + b f + e D + d z goes through at
    most 2 m + 6 roundings (two coefficients, two products, m sums of D, m + 2 more sums), and f itself through at most
    10 in the networks above, 3 more with guidance. So the error of a row is at most 2 m + 16 (19) u times the sum of
    the terms' sizes, to first order. It is multiplied by the derivative of the final state with respect to the row's
    result, which autograd computes in float64.
    """
    kwargs, uncond = kwargs or {}, uncond or {}
    columns = {name: getattr(table, name).abs() for name in ("p", "q", "A", "b", "e", "d")}
    absolute = replace(table, **columns, clip=None)
    slots = [x_init.double(), *(torch.zeros_like(x_init, dtype=torch.float64) for _ in range(1, table.slots))]
    injected, sizes = [], []
    for row in range(len(table)):
        k, x = table.row(row), network_input(slots, table, row)
        t = torch.full((len(x),), k.time, dtype=torch.float64)
        f = model(x, t, **kwargs)
        size_f = f.abs()
        if guidance is not None:
            other = model(x, t, **uncond)
            size_f = other.abs() * (1 + abs(guidance)) + abs(guidance) * f.abs()
            f = other + guidance * (f - other)
        z = noise.normal(keys, row + 1, x.shape[1:]).double()
        # The row with absolute values gives the size of each sum.
        sizes += solver_step([slot.abs() for slot in slots], size_f, absolute, row, z=z.abs())
        slots = solver_step(slots, f, table, row, z=z)
        injected += [torch.zeros_like(slot, requires_grad=True) for slot in slots]
        slots = [slot + error for slot, error in zip(slots, injected[-len(slots) :], strict=True)]
    carried = torch.autograd.grad(slots[0].sum(), injected, allow_unused=True)
    error = sum(g.abs() * size.detach() for g, size in zip(carried, sizes, strict=True) if g is not None)
    return (2 * table.slots + (16 if guidance is None else 19)) * U * error, slots[0].detach()


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    excess = ((actual.double() - expected.double()).abs() - bound).max() if actual.numel() else torch.tensor(0.0)
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    assert excess <= 0, f"apart by {float(excess):.3g} more than rounding explains"


def both(model, shape, **options):
    return [sample(model, shape, backend=backend, **options) for backend in BACKENDS]


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()


AFFINE = [name for name, kind in solvers.REGISTRY.items() if kind.is_affine]


# Backends agree -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", solvers.PREDICTIONS)
@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_backends_agree_within_rounding_on_every_solver_and_prediction(solver, prediction):
    # 9 rows: odd, so that heun takes every prediction down to t = 0.
    table = solvers.build(solver, SDE, 9, prediction=prediction)
    keys = noise.sample_keys(3, 16)
    bound, exact = rounding_bound(table, noise.normal(keys, 0, (3, 2)), keys)
    options = {"solver": solver, "steps": 9, "prediction": prediction, "seed": 3}
    for actual in both(elementwise, (16, 3, 2), **options):
        assert_within(actual, exact, bound)


@pytest.mark.parametrize("clip", [1.0, 0.3])
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm_solver_pp_2m"])
def test_backends_agree_where_the_prediction_is_clipped(solver, clip):
    table = solvers.build(solver, SDE, 10, prediction="eps", clip=clip)
    keys = noise.sample_keys(0, 32)
    bound, exact = rounding_bound(table, noise.normal(keys, 0, (5,)), keys)
    unclipped = sample(elementwise, (32, 5), solver=solver, steps=10, prediction="eps")
    for actual in both(elementwise, (32, 5), solver=solver, steps=10, prediction="eps", clip=clip):
        assert_within(actual, exact, bound)
        assert actual.abs().max() <= clip * (1 + U)  # the last row returns D where sigma ends at 0
        assert not torch.allclose(actual, unclipped)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.5, -2])
def test_backends_agree_under_guidance(guidance):
    table = solvers.build("euler_maruyama", SDE, 12)
    keys = noise.sample_keys(0, 8)
    cond = {"label": torch.linspace(-1, 1, 8), "scale": 0.5}
    uncond = {"label": torch.zeros(8)}
    bound, exact = rounding_bound(
        table, noise.normal(keys, 0, (3,)), keys, conditional, guidance=guidance, kwargs=cond, uncond=uncond
    )
    options = {"steps": 12, "guidance": guidance, "model_kwargs": cond, "uncond_kwargs": uncond}
    for actual in both(conditional, (8, 3), **options):
        assert_within(actual, exact, bound)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance_of_zero_and_one_are_the_two_networks(backend):
    cond, uncond = {"label": torch.ones(6)}, {"label": torch.full((6,), -1.0)}
    options = {"steps": 20, "backend": backend}
    for guidance, kwargs in ((0, uncond), (1, cond)):
        guided = sample(conditional, (6, 2), guidance=guidance, model_kwargs=cond, uncond_kwargs=uncond, **options)
        alone = sample(conditional, (6, 2), model_kwargs=kwargs, **options)
        torch.testing.assert_close(guided, alone, atol=20 * ROW, rtol=0)


@pytest.mark.parametrize("max_batch", [None, 1, 5])
def test_model_kwargs_are_split_with_the_batch(max_batch):
    # Tensors are split with their samples; scalars, strings and None are passed on unchanged.
    def model(x, t, label, scale, mode, nothing, flag):
        assert (scale, mode, nothing, flag) == (0.5, "on", None, True)
        assert len(label) == len(x)
        assert label.dtype == torch.int64  # labels are not cast to the network's dtype
        return conditional(x, t, label, scale)

    kwargs = {"label": torch.arange(12), "scale": 0.5, "mode": "on", "nothing": None, "flag": True}
    for backend in BACKENDS:
        actual = sample(model, (12, 2), steps=5, model_kwargs=kwargs, backend=backend, max_batch=max_batch)
        alone = [
            sample(
                conditional,
                (1, 2),
                steps=5,
                first_sample=i,
                backend="reference",
                model_kwargs={"label": torch.tensor([i]), "scale": 0.5},
            )
            for i in range(12)
        ]
        bound, exact = rounding_bound(
            solvers.build("euler_maruyama", SDE, 5),
            noise.normal(noise.sample_keys(0, 12), 0, (2,)),
            noise.sample_keys(0, 12),
            conditional,
            kwargs={"label": torch.arange(12), "scale": 0.5},
        )
        assert_within(actual, exact, bound)
        if backend == "reference":
            assert torch.equal(actual, torch.cat(alone))


@pytest.mark.parametrize("n", [0, 1, 63, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backends_agree_on_odd_shapes(shape, n):
    table = solvers.build("euler_maruyama", SDE, 4)
    keys = noise.sample_keys(1, n)
    bound, exact = rounding_bound(table, noise.normal(keys, 0, shape), keys)
    for actual in both(elementwise, (n, *shape), steps=4, seed=1):
        assert_within(actual, exact, bound)
        assert actual.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_samples_need_no_network(backend):
    def model(x, t):
        raise AssertionError("called for nothing")

    x, states = sample(model, (0, 3), steps=4, trajectory=2, backend=backend)
    assert x.shape == (0, 3)
    assert states.shape == (3, 0, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_batch", [None, 3])
def test_x_init_of_any_strides_is_the_initial_state(backend, max_batch):
    base = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 1)
    layouts = {"transposed": base[:, ::2].t(), "expanded": base[:1, :10].t().expand(10, 4), "strided": base.t()[::2]}
    for name, x_init in layouts.items():
        assert not x_init.is_contiguous(), name
        options = {"steps": 5, "backend": backend, "max_batch": max_batch}
        actual, states = sample(elementwise, (10, 4), x_init=x_init, trajectory=5, **options)
        assert torch.equal(states[0], x_init)
        assert torch.equal(actual, sample(elementwise, (10, 4), x_init=x_init.contiguous(), **options))
        assert not torch.equal(actual, sample(elementwise, (10, 4), **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_x_init_of_the_prior_draw_changes_nothing(backend):
    x_init = SDE.prior_sampling((5, 3), seed=8)
    expected = sample(elementwise, (5, 3), steps=6, seed=8, backend=backend)
    actual = sample(elementwise, (5, 3), steps=6, seed=8, x_init=x_init, backend=backend)
    tolerance = 0 if backend == "reference" else 4e-6 * float(expected.abs().max())  # a kernel draws to 4e-6
    torch.testing.assert_close(actual, expected, atol=6 * tolerance, rtol=0)


@pytest.mark.parametrize("steps", [20, 3, 1])
def test_a_table_of_the_users_own_is_the_named_solvers(steps):
    table = solvers.euler_maruyama(SDE, torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    for backend in BACKENDS:
        named = sample(elementwise, (3, 2), steps=steps, backend=backend)
        assert torch.equal(sample(elementwise, (3, 2), solver=table, backend=backend), named)
        assert torch.equal(sample(elementwise, (3, 2), solver=table, steps=steps, backend=backend), named)


# The same samples, however they are drawn ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_samples_do_not_depend_on_the_split_bit_for_bit(solver):
    sampler = Sampler(elementwise, (3,), solver=solver, steps=9, backend="reference")
    whole = sampler(65, seed=5)
    for max_batch in (1, 7, 64, 65, 1000):
        part = Sampler(elementwise, (3,), solver=solver, steps=9, backend="reference", max_batch=max_batch)
        assert torch.equal(part(65, seed=5), whole), max_batch


def test_samples_do_not_depend_on_earlier_calls():
    sampler = Sampler(elementwise, (3,), steps=7, backend="reference")
    calls = [(10, 0), (3, 1), (10, 2), (1, 0)]
    forward = {call: sampler(call[0], seed=call[1]) for call in calls}
    backward = {call: sampler(call[0], seed=call[1]) for call in reversed(calls)}
    for call in calls:
        fresh = sample(elementwise, (call[0], 3), steps=7, seed=call[1], backend="reference")
        assert torch.equal(forward[call], fresh)
        assert torch.equal(backward[call], fresh)
    assert torch.equal(forward[1, 0], forward[10, 0][:1])
    assert not torch.equal(forward[10, 0], forward[10, 2])


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(n=st.integers(0, 40), split=st.integers(1, 45), seed=st.integers(0, 2**64 - 1), width=st.integers(1, 9))
def test_any_split_of_any_batch_under_any_seed_gives_the_same_samples(n, split, seed, width):
    options = {"steps": 3, "seed": seed, "backend": "reference"}
    whole = sample(elementwise, (n, width), **options)
    assert torch.equal(sample(elementwise, (n, width), max_batch=split, **options), whole)
    first = min(split, n)
    assert torch.equal(sample(elementwise, (n - first, width), first_sample=first, **options), whole[first:])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_batch", [1, 7, 64])
def test_splits_agree_with_matrix_products(backend, max_batch):
    # A matrix product may sum in another order for another batch: 1e-5 is some 100 roundings of a state of size 1.
    model, options = Mlp(), {"steps": 20, "backend": backend}
    whole = sample(model, (70, 2), **options)
    torch.testing.assert_close(sample(model, (70, 2), max_batch=max_batch, **options), whole, atol=1e-5, rtol=0)
    last = sample(model, (10, 2), first_sample=60, max_batch=max_batch, **options)
    torch.testing.assert_close(last, whole[60:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", ["euler_maruyama", "ddpm"])
def test_eager_splits_agree_within_rounding(solver):
    # Smaller batches draw noise for more rows at once; 2,000 samples draw it row by row.
    table = solvers.build(solver, SDE, 9)
    keys = noise.sample_keys(0, 2000)
    bound, exact = rounding_bound(table, noise.normal(keys, 0, (8,)), keys)
    for max_batch in (None, 1999, 64):
        actual = sample(elementwise, (2000, 8), solver=solver, steps=9, backend="eager", max_batch=max_batch)
        assert_within(actual, exact, bound)


def test_first_sample_continues_a_batch():
    options = {"steps": 5, "seed": 2, "backend": "reference"}
    whole = sample(elementwise, (100, 3), **options)
    assert torch.equal(sample(elementwise, (10, 3), first_sample=90, **options), whole[90:])
    eager = {**options, "backend": "eager"}
    last = sample(elementwise, (10, 3), first_sample=90, **eager)
    torch.testing.assert_close(last, sample(elementwise, (100, 3), **eager)[90:], atol=5 * ROW, rtol=0)


def test_first_sample_reaches_the_end_of_its_range():
    last = sample(elementwise, (1, 3), steps=3, first_sample=2**64 - 1)
    assert not torch.equal(last, sample(elementwise, (1, 3), steps=3))


def _as_uint64(keys: Tensor) -> Tensor:
    return torch.tensor([[word % 2**64 for word in key] for key in keys.tolist()], dtype=torch.uint64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_are_taken_as_int64_and_as_uint64(backend):
    keys = noise.sample_keys(12, 6)
    expected = sample(elementwise, (6, 2), steps=4, seed=12, backend=backend)
    strided = torch.stack((keys, keys), -1)[..., 0]
    assert (keys < 0).any()  # otherwise words above 2^63 are not tested
    for given_keys in (keys, _as_uint64(keys), strided):
        assert torch.equal(sample(elementwise, (6, 2), steps=4, keys=given_keys, backend=backend), expected)
    order = torch.tensor([5, 0, 0, 3])
    picked = sample(elementwise, (4, 2), steps=4, keys=keys[order], backend=backend)
    torch.testing.assert_close(picked, expected[order], atol=4 * ROW, rtol=0)


@pytest.mark.parametrize("max_batch", [None, 2])
@pytest.mark.parametrize("form", ["list", "tuple", "int64", "uint64", "int32"])
def test_a_seed_a_sample_draws_what_each_seed_alone_draws(form, max_batch):
    seeds = [0, 7, 7, 123] + ([2**64 - 1, 2**63] if form in ("list", "tuple", "uint64") else [])
    options = {"steps": 4, "backend": "reference"}
    dtypes = {"int64": torch.int64, "uint64": torch.uint64, "int32": torch.int32}
    keys = torch.tensor(seeds, dtype=dtypes[form]) if form in dtypes else {"list": list, "tuple": tuple}[form](seeds)
    together = sample(elementwise, (len(seeds), 3), keys=keys, max_batch=max_batch, **options)
    alone = [sample(elementwise, (1, 3), seed=seed, **options) for seed in seeds]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together[1], together[2])
    assert sample(elementwise, (0, 3), keys=[], **options).shape == (0, 3)


@pytest.mark.slow
def test_another_process_draws_the_same_samples():
    program = (
        "import hashlib, fastsde, sys; sys.path.insert(0, 'tests'); from test_sampler import elementwise, digest\n"
        "print(digest(fastsde.sample(elementwise, (50, 3), steps=20, seed=9, backend='reference', max_batch=16)))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [digest(sample(elementwise, (50, 3), steps=20, seed=9, backend="reference"))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_takes_nothing_from_torchs_generator(backend):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sample(elementwise, (3, 2), steps=4, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(sample(elementwise, (3, 2), steps=4, backend=backend), first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_defaults_of_torch_do_not_matter(backend):
    expected = sample(elementwise, (3, 2), steps=4, backend=backend)
    torch.set_default_dtype(torch.float64)
    try:
        actual = sample(elementwise, (3, 2), steps=4, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


# Trajectory, callback, progress, noise ------------------------------------------------------------------------------


def _all_states(shape, steps, **options) -> Tensor:
    """Returns the initial state and the state after each row, computed row by row by hand."""
    table = solvers.build("euler_maruyama", SDE, steps)
    keys = noise.sample_keys(options.get("seed", 0), shape[0])
    states = [noise.normal(keys, 0, shape[1:])]
    for row in range(steps):
        t = torch.full(shape[:1], float(table.time[row]))
        states.append(solver_step((states[-1],), elementwise(states[-1], t), table, row, keys=keys)[0])
    return torch.stack(states)


@pytest.mark.parametrize("every", [1, 3, 10, 11, 50])
@pytest.mark.parametrize("max_batch", [None, 2])
def test_trajectory_is_every_mth_state_from_the_initial_on(every, max_batch):
    expected = _all_states((5, 2), 10, seed=4)
    options = {"steps": 10, "seed": 4, "trajectory": every, "max_batch": max_batch}
    x, states = sample(elementwise, (5, 2), backend="reference", **options)
    assert states.shape == (10 // every + 1, 5, 2)
    assert torch.equal(states, expected[::every])
    assert torch.equal(x, expected[-1])
    x, states = sample(elementwise, (5, 2), backend="eager", **options)
    torch.testing.assert_close(states, expected[::every], atol=10 * ROW, rtol=0)
    torch.testing.assert_close(x, expected[-1], atol=10 * ROW, rtol=0)
    assert torch.equal(x, sample(elementwise, (5, 2), backend="eager", steps=10, seed=4, max_batch=max_batch))


@pytest.mark.parametrize("backend", BACKENDS)
def test_callback_is_called_after_each_row_with_row_time_and_state(backend):
    calls: list[tuple[int, float, Tensor]] = []
    x, states = sample(
        elementwise, (5, 2), steps=6, backend=backend, trajectory=1, callback=lambda *args: calls.append(args)
    )
    assert [(row, time) for row, time, _ in calls] == [(row, pytest.approx(1 - row / 6)) for row in range(6)]
    assert all(isinstance(time, float) for _, time, _ in calls)
    # The callback may keep the states: none was overwritten by a later row.
    assert torch.equal(torch.stack([state for _, _, state in calls]), states[1:])
    assert torch.equal(calls[-1][2], x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_callback_sees_each_part_of_a_split_batch(backend):
    calls: list[tuple[int, int]] = []
    sample(
        elementwise,
        (5, 2),
        steps=3,
        backend=backend,
        max_batch=2,
        callback=lambda row, time, x: calls.append((row, len(x))),
    )
    assert calls == [(row, size) for size in (2, 2, 1) for row in range(3)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_in_a_callback_ends_the_run(backend):
    class Enough(Exception):  # noqa: N818
        pass

    def stop(row, time, x):
        if row == 2:
            raise Enough

    with pytest.raises(Enough):
        sample(elementwise, (5, 2), steps=9, backend=backend, callback=stop)


@pytest.mark.parametrize("backend", BACKENDS)
def test_progress_goes_to_stderr_alone(backend, capfd):
    sample(elementwise, (4, 2), steps=5, backend=backend, progress=True, max_batch=3)
    out, err = capfd.readouterr()
    assert out == ""
    assert "10/10" in err  # 5 rows of each of the two parts
    sample(elementwise, (4, 2), steps=5, backend=backend)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_function_is_called_after_the_network_in_rows_that_have_noise(backend):
    events: list[object] = []

    def model(x, t):
        events.append("network")
        return elementwise(x, t)

    def draw(row, x):
        events.append(row)
        assert x.shape == (3, 2)
        return torch.zeros_like(x)

    sample(model, (3, 2), steps=4, noise=draw, backend=backend)
    assert events == ["network", 0, "network", 1, "network", 2, "network", 3]
    events.clear()
    sample(model, (3, 2), solver="ddpm", steps=3, noise=draw, backend=backend)
    assert events == ["network", 0, "network", 1, "network"]  # sigma ends at 0, so the last row has none
    events.clear()
    sample(model, (3, 2), solver="ddim", steps=3, noise=draw, backend=backend)
    assert events == ["network"] * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_function_that_draws_by_the_contract_changes_nothing(backend, dtype):
    keys = noise.sample_keys(6, 5)
    options = {"steps": 8, "seed": 6, "backend": backend}
    actual = sample(elementwise, (5, 3), noise=lambda row, x: noise.normal(keys, row + 1, (3,)).to(dtype), **options)
    expected = sample(elementwise, (5, 3), **options)
    tolerance = 0 if backend == "reference" else 4e-6 * float(expected.abs().max())  # a kernel draws to 4e-6
    torch.testing.assert_close(actual, expected, atol=8 * tolerance, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_function_sees_the_state_before_the_row_and_its_part_of_the_batch(backend):
    seen: list[Tensor] = []

    def draw(row, x):
        seen.append(x.clone())
        return torch.ones_like(x)

    _, states = sample(elementwise, (3, 2), steps=4, noise=draw, backend=backend, trajectory=1)
    assert torch.equal(torch.stack(seen), states[:-1])
    seen.clear()
    sample(elementwise, (3, 2), steps=2, noise=draw, backend=backend, max_batch=2)
    assert [len(x) for x in seen] == [2, 2, 1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_function_of_the_wrong_shape_is_named_with_its_row(backend):
    def draw(row, x):
        return torch.zeros(3, 1) if row == 2 else torch.zeros_like(x)

    with pytest.raises(ValueError, match=r"noise in row 2 must have shape \[3, 2\], got \[3, 1\]"):
        sample(elementwise, (3, 2), steps=5, noise=draw, backend=backend)


# Dtypes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [True, False])
def test_fp64_runs_network_and_state_in_fp64(explicit):
    model = Scale(torch.float32 if explicit else torch.float64)
    dtype = torch.float64 if explicit else None
    copies: list[Scale] = []
    x, states = sample(model, (4, 2), steps=20, dtype=dtype, trajectory=20, callback=lambda r, t, x: copies.append(x))
    assert x.dtype == states.dtype == copies[0].dtype == torch.float64
    # The noise consists of the same fp32 numbers.
    low = sample(lambda x, t: -x, (4, 2), steps=20, backend="reference")
    torch.testing.assert_close(x.float(), low, atol=20 * ROW, rtol=0)
    assert not torch.equal(x, low.double())
    exact = sample(lambda x, t: -x, (4, 2), steps=20, dtype=torch.float64)
    assert torch.equal(x, exact)


def test_fp64_keeps_all_digits_of_x_init_and_noise():
    tenth = torch.full((1, 2), 0.1, dtype=torch.float64)
    options = {"steps": 3, "dtype": torch.float64, "trajectory": 3}
    fine, states = sample(elementwise, (1, 2), x_init=tenth, noise=lambda row, x: tenth, **options)
    assert torch.equal(states[0], tenth)
    for changed in ({"x_init": tenth.float()}, {"noise": lambda row, x: tenth.float()}):
        coarse, _ = sample(
            elementwise, (1, 2), **{"x_init": tenth, "noise": lambda row, x: tenth, **changed, **options}
        )
        assert 0 < (fine - coarse).abs().max() < 1e-7  # 0.1 is 1.5e-9 off in fp32, and all coefficients are of size 1


def test_fp64_takes_the_reference_backend():
    assert Sampler(Scale(torch.float64), (2,)).backend == "reference"
    assert Sampler(Scale(), (2,), dtype=torch.float64).backend == "reference"
    assert Sampler(Scale(), (2,)).backend in ("persistent", "eager")
    with pytest.raises(ValueError, match=r"'eager' keeps the state in fp32.*use 'reference'"):
        Sampler(Scale(), (2,), dtype=torch.float64, backend="eager")


@pytest.mark.parametrize(
    "guidance", [{}, {"guidance": 2.3, "uncond_kwargs": {"label": torch.full((6,), 0.7)}}], ids=len
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_network_keeps_an_fp32_state(backend, low, guidance):
    inside, outside = set(), set()

    def model(x, t, label):
        inside.update((x.dtype, t.dtype, label.dtype))
        return -x * label[:, None]

    kwargs = {"model_kwargs": {"label": torch.ones(6)}, **guidance}
    options = {"steps": 10, "backend": backend, "trajectory": 1, **kwargs}
    x, states = sample(model, (6, 3), dtype=low, callback=lambda row, time, x: outside.add(x.dtype), **options)
    assert inside == {low, torch.float32}  # x is cast, t and conditions are not
    assert outside == {x.dtype, states.dtype} == {torch.float32}
    assert not torch.equal(x, x.to(low).float())  # an fp32 state has more digits than the network's dtype

    # Only the network's input is rounded to the low dtype; its output is converted at once.
    def by_hand(x, t, label):
        return model(x.to(low), t, label)

    expected, expected_states = sample(by_hand, (6, 3), **options)
    assert torch.equal(x, expected)
    assert torch.equal(states, expected_states)
    assert not torch.equal(x, sample(lambda x, t, label: -x * label[:, None], (6, 3), **options)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_of_the_weights_is_what_the_network_runs_in(backend, low):
    model = Scale(low)
    x = sample(model, (6, 3), steps=5, backend=backend)
    assert set(model.seen) == {(low, torch.float32, low)}
    assert x.dtype == torch.float32
    # The same as fp32 weights that run in that dtype as a copy.
    assert torch.equal(x, sample(Scale(), (6, 3), steps=5, backend=backend, dtype=low))


@pytest.mark.parametrize("backend", BACKENDS)
def test_x_init_of_another_dtype_is_brought_to_the_states(backend):
    x_init = torch.tensor([[0.1, -0.2]], dtype=torch.float64)
    double = sample(elementwise, (1, 2), steps=3, x_init=x_init, backend=backend)
    assert torch.equal(double, sample(elementwise, (1, 2), steps=3, x_init=x_init.float(), backend=backend))
    half = sample(elementwise, (1, 2), steps=3, x_init=x_init.bfloat16(), backend=backend)
    assert half.dtype == torch.float32


# Inputs that stay unchanged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
def test_weights_changed_between_calls_are_seen(dtype):
    model = Scale()
    sampler = Sampler(model, (2,), steps=5, dtype=dtype)
    before = sampler(3)
    with torch.no_grad():
        model.weight.mul_(2)
    doubled = sampler(3)
    assert not torch.equal(doubled, before)
    assert torch.equal(doubled, sample(model, (3, 2), steps=5, dtype=dtype))
    with torch.no_grad():
        model.weight.div_(2)
        model.factor.mul_(2)
    assert torch.equal(sampler(3), doubled)  # a buffer is treated like a parameter
    model.load_state_dict(Scale().state_dict())
    assert torch.equal(sampler(3), before)


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=str)
def test_buffers_outside_the_state_dict_are_seen_too(dtype):
    model = Scale()
    model.register_buffer("factor", torch.ones(1), persistent=False)
    sampler = Sampler(model, (2,), steps=5, dtype=dtype)
    before = sampler(3)
    model.factor.mul_(2)
    assert torch.equal(sampler(3), sample(model, (3, 2), steps=5, dtype=dtype))
    assert not torch.equal(sampler(3), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_of_mixed_dtypes_runs_as_it_is_unless_a_dtype_is_asked_for(backend):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(2, 2, dtype=torch.bfloat16), nn.LayerNorm(2)

        def forward(self, x, t):
            seen.add((x.dtype, self.low.weight.dtype, self.high.weight.dtype))
            return self.high(self.low(x).to(self.high.weight.dtype))

    seen: set = set()
    sample(Mixed(), (3, 2), steps=2, backend=backend)
    assert seen == {(torch.bfloat16, torch.bfloat16, torch.float32)}
    seen.clear()
    sample(Mixed(), (3, 2), steps=2, backend=backend, dtype=torch.float32)
    assert seen == {(torch.float32,) * 3}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_of_buffers_alone_is_run_in_the_dtype_asked_for(dtype):
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("matrix", torch.eye(2))

        def forward(self, x, t):
            return -x @ self.matrix  # refuses two dtypes

    model = Fixed()
    expected = sample(lambda x, t: -x, (3, 2), steps=3, dtype=dtype)
    assert torch.equal(sample(model, (3, 2), steps=3, dtype=dtype), expected)
    assert model.matrix.dtype == torch.float32


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_the_models_mode_is_followed_and_left_alone(dtype):
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 1)

        def forward(self, x, t):
            return -x if self.training else 0 * x

    model = Moody()
    sampler = Sampler(model, (2,), steps=3, dtype=dtype)
    training = sampler(3)
    model.eval()
    evaluating = sampler(3)
    assert not torch.equal(training, evaluating)
    assert not model.training
    model.train()
    assert torch.equal(sampler(3), training)
    assert model.training


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_the_model_is_left_as_it_was(backend, dtype):
    model = Mlp()
    model.net[0].eval()
    model.net[2].weight.requires_grad_(False)
    model.net[2].bias.grad = torch.ones(2)
    parameters = dict(model.named_parameters())

    def state():
        flags = [
            (p.dtype, p.requires_grad, p._version, None if p.grad is None else p.grad.clone())
            for p in parameters.values()
        ]
        return [m.training for m in model.modules()], flags

    before, weights = state(), {name: p.detach().clone() for name, p in parameters.items()}
    sample(model, (4, 2), steps=3, backend=backend, dtype=dtype, guidance=2.0, uncond_kwargs={})
    assert str(state()) == str(before)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in parameters.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_results_have_no_autograd_graph(backend, dtype):
    assert torch.is_grad_enabled()
    x_init = torch.ones(4, 2, requires_grad=True)
    seen: list[bool] = []

    def watch(row, time, x):
        seen.append(x.requires_grad or torch.is_grad_enabled())

    x, states = sample(
        Mlp(), (4, 2), steps=3, backend=backend, dtype=dtype, trajectory=1, x_init=x_init, callback=watch
    )
    assert not x.requires_grad
    assert not states.requires_grad
    assert seen == [False] * 3
    assert x_init.grad is None
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_results_share_no_memory_with_x_init(backend, solver):
    x_init = torch.ones(4, 2)
    x, states = sample(lambda x, t: 0 * x, (4, 2), solver=solver, steps=1, x_init=x_init, backend=backend, trajectory=1)
    assert torch.equal(x_init, torch.ones(4, 2))
    storages = [tensor.untyped_storage().data_ptr() for tensor in (x_init, x, states)]
    assert len(set(storages)) == 3
    keys = noise.sample_keys(0, 4)
    before = keys.clone()
    sample(elementwise, (4, 2), solver=solver, steps=3, keys=keys, backend=backend)
    assert torch.equal(keys, before)


@pytest.mark.parametrize("prediction", solvers.PREDICTIONS)
@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_a_network_that_returns_its_input_itself_does_no_harm(solver, prediction):
    # f and x share memory: an engine that updated x in place would also change f.
    options = {"solver": solver, "steps": 7, "prediction": prediction}
    for backend in BACKENDS:
        aliased = sample(lambda x, t: x, (5, 3), backend=backend, **options)
        assert torch.equal(aliased, sample(lambda x, t: x.clone(), (5, 3), backend=backend, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_network_that_writes_to_one_buffer_every_time_does_no_harm(backend):
    # As in a captured graph. The second-order solver keeps the last row's data prediction.
    buffer = torch.empty(5, 3)

    def model(x, t):
        buffer.copy_(elementwise(x, t))
        return buffer

    options = {"solver": "dpm_solver_pp_2m", "steps": 7, "prediction": "x0", "backend": backend}
    assert torch.equal(sample(model, (5, 3), **options), sample(elementwise, (5, 3), **options))


# Compilation --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler: there is no g++")
def test_compile_gives_the_same_samples():
    model = Mlp()
    torch._dynamo.reset()
    try:
        sampler = Sampler(model, (2,), steps=10, compile=True)
        assert sampler.backend == "eager"
        # Compiled code may contract and reorder: some 100 roundings of a state of size 1, as for a split batch.
        torch.testing.assert_close(sampler(6), sample(model, (6, 2), steps=10), atol=1e-5, rtol=0)
        with torch.no_grad():
            model.net[2].bias.add_(1)
        torch.testing.assert_close(sampler(6), sample(model, (6, 2), steps=10), atol=1e-5, rtol=0)
        assert all(parameter.requires_grad for parameter in model.parameters())
    finally:
        torch._dynamo.reset()


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch", [None, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_network_that_is_not_finite_is_reported_with_row_and_time(backend, value, max_batch):
    def model(x, t):
        f = -x
        # One element of one sample, in the row of time 1/2: row 5 of 10.
        f[-1, 0] = torch.where(t[0] <= 0.51, value, f[-1, 0])
        return f

    rows: list[int] = []
    with pytest.raises(NonFiniteError, match=r"NaN or infinity in row 5, at time 0\.5"):
        sample(
            model, (3, 2), steps=10, backend=backend, max_batch=max_batch, callback=lambda row, t, x: rows.append(row)
        )
    assert rows == [0, 1, 2, 3, 4]
    assert issubclass(NonFiniteError, RuntimeError)


@pytest.mark.parametrize("row", [0, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_that_is_not_finite_is_not_blamed_on_the_network(backend, row):
    def overflow(x, t):
        return torch.full_like(x, 3e38 if float(t[0]) == 1 - row / 4 else 0.0)

    def bad_noise(k, x):
        return torch.full_like(x, math.nan if k == row else 0.0)

    message = rf"the state became NaN or infinity in row {row}, at time {1 - row / 4:g}"
    one = torch.ones(4, dtype=torch.float64)
    table = solvers.StepTable(1 - torch.arange(4.0, dtype=torch.float64) / 4, a=one, b=2 * one, d=one)
    with pytest.raises(NonFiniteError, match=message):
        sample(overflow, (3, 2), solver=table, backend=backend)
    with pytest.raises(NonFiniteError, match=message):
        sample(lambda x, t: -x, (3, 2), solver=table, backend=backend, noise=bad_noise)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance_takes_a_network_that_returns_the_same_memory_at_every_call(backend):
    memory = torch.empty(5, 2)

    def model(x, t, y=0.0):
        return torch.add(y - x, t[:, None])

    def static(x, t, y=0.0):
        return memory.copy_(model(x, t, y))

    options = {"steps": 7, "backend": backend, "guidance": 3.0, "model_kwargs": {"y": 1.0}, "uncond_kwargs": {"y": 0.5}}
    assert torch.equal(sample(static, (5, 2), **options), sample(model, (5, 2), **options))


@pytest.mark.parametrize("bad", ["conditional", "unconditional"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_either_network_of_guidance_is_checked(backend, bad):
    labels = {"conditional": torch.zeros(3), "unconditional": torch.zeros(3)}
    labels[bad][1] = math.nan
    with pytest.raises(NonFiniteError, match="row 0, at time 1"):
        sample(
            conditional,
            (3, 2),
            steps=4,
            backend=backend,
            guidance=0.0,
            model_kwargs={"label": labels["conditional"]},
            uncond_kwargs={"label": labels["unconditional"]},
        )


@pytest.mark.parametrize("backend", ["graph", "persistent"])
def test_backends_that_cannot_run_here_name_those_that_can(backend):
    with pytest.raises(ValueError, match=f"backend '{backend}'.*use 'eager' or 'reference'"):
        sample(lambda x, t: x.cumsum(-1), (3, 2), backend=backend)
    with pytest.raises(ValueError, match="'reference' is plain PyTorch; for compile=True use 'eager'"):
        sample(elementwise, (3, 2), backend="reference", compile=True)


# A known closed form ------------------------------------------------------------------------------------------------


def _exact_moments(table, sde, mean, std):
    """Returns mean and std of the solver's output for N(mean, std^2) data and the exact score: a linear recursion.

    Each row maps the slots and z affinely to the new slots, so that their mean and covariance follow exactly.
    """
    m, cov = torch.zeros(table.slots, dtype=torch.float64), torch.zeros(table.slots, table.slots, dtype=torch.float64)
    cov[0, 0] = 1.0
    for k in range(len(table)):
        alpha, sigma = sde.alpha(table.time[k]), sde.sigma(table.time[k])
        slope = -1 / (alpha**2 * std**2 + sigma**2)
        f = slope * table.n[k]  # and -slope alpha mean
        step = table.A[k] + torch.outer(table.b[k], f) + torch.outer(table.e[k], table.p[k] + table.q[k] * f)
        m = step @ m - (table.b[k] + table.e[k] * table.q[k]) * slope * alpha * mean
        cov = step @ cov @ step.T + torch.outer(table.d[k], table.d[k])
    return float(m[0]), float(cov[0, 0].sqrt())


@pytest.mark.parametrize(
    ("solver", "steps", "mean", "std"),
    [("euler_maruyama", 999, 1.0, 1.0), *((solver, 41, -2.0, 0.5) for solver in AFFINE)],
)
def test_gaussian_data_with_the_exact_score_give_the_recursions_moments(solver, steps, mean, std):
    def score(x, t):
        alpha, sigma = SDE.alpha(t)[:, None], SDE.sigma(t)[:, None]
        return -(x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    n = 20_000
    expected_mean, expected_std = _exact_moments(solvers.build(solver, SDE, steps), SDE, mean, std)
    if (steps, mean) == (999, 1.0):  # the published values of the tutorial's grid
        assert (expected_mean, expected_std) == (pytest.approx(1.000632, abs=1e-6), pytest.approx(1.000700, abs=1e-6))
    x = sample(score, (n // 4, 4), solver=solver, steps=steps, backend="eager").double()
    # The output is Gaussian, so the standard errors are std / sqrt(n) and std / sqrt(2 n); 4.5 of them.
    assert abs(x.mean().item() - expected_mean) < 4.5 * expected_std / math.sqrt(n)
    assert abs(x.std().item() - expected_std) < 4.5 * expected_std / math.sqrt(2 * n)


def test_the_public_names_are_there():
    assert fastsde.sample is sample
    assert fastsde.Sampler is Sampler
