"""The graph engine: what is captured once, what is captured again, and that samples agree with the reference.

Without a GPU the calls of CUDA are replaced by those of tests/cuda_graphs.py, whose replays run no host code.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tables import history_table, network, random_table, states_near
from torch import Tensor, nn

import fastsde
from fastsde import VPSDE, NonFiniteError, Sampler, StepTable, noise, solvers
from fastsde.engines import CaptureError, graph
from fastsde.engines.chunks import MAX_CHUNK, chunks
from fastsde.models import MLP
from fastsde.recorder import Recorder
from fastsde.request import Request

SOLVERS = {"euler_maruyama": "score", "ddpm": "eps", "ddim": "eps", "dpm_solver_pp_2m": "v", "heun": "score"}


class Net(nn.Module):
    """A smooth network of x, t and a condition, whose calls on the host are counted."""

    def __init__(self, dim: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0
        self.eval()

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None, scale: float = 1.0) -> Tensor:
        self.calls += 1
        f = self.dropout(torch.tanh(self.linear(x))) * scale - x + t[:, None]
        return f if shift is None else f + shift


def assert_same(ours: Tensor, theirs: Tensor, rows: int, largest: float = 10.0) -> None:
    # Each row rounds the state, or numbers as large as ``largest``, a few times; noise differs by at most 4e-6.
    scale = max(largest, float(theirs.abs().max())) if theirs.numel() else 1.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=rows * (8 * scale * 2**-24 + 4e-6))


@pytest.fixture
def short(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses graphs of few rows, so that short runs replay several of them."""
    monkeypatch.setattr("fastsde.engines.chunks._MIN_CHUNK", 3)
    monkeypatch.setattr("fastsde.engines.chunks.MAX_CHUNK", 5)


def both(model: Any, shape: tuple[int, ...], **options: Any) -> tuple[Any, Any]:
    return tuple(fastsde.sample(model, shape, backend=backend, **options) for backend in ("graph", "reference"))


# Chunks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [None, 1, 16, 97, 100, 999, 5000])
@pytest.mark.parametrize("steps", [1, 2, 19, 20, 50, 51, 97, 250, 997, 999, 1000, 5003])
def test_chunks_add_up_and_stop_where_they_must(steps: int, every: int | None) -> None:
    lengths = chunks(steps, every)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    assert ends[-1] == steps
    assert all(1 <= length <= MAX_CHUNK for length in lengths)
    assert len(set(lengths)) <= 4
    if every is not None:
        assert set(range(every, steps + 1, every)) <= set(ends)


def test_the_tutorials_999_steps_are_27_replays_of_one_graph() -> None:
    assert chunks(999) == [37] * 27
    assert chunks(1000) == [50] * 20
    assert len(set(chunks(997))) == 2


# Samples ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("steps", [1, 5, 13])
@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_are_those_of_the_reference(solver: str, steps: int) -> None:
    options: dict[str, Any] = {"solver": solver, "steps": steps, "prediction": SOLVERS[solver], "seed": steps}
    clip = 1.5 if solver not in ("euler_maruyama", "heun") else None
    # Before it is clipped, the data prediction from eps is 1 / alpha times the state: 150 times in the first row.
    largest = 10.0 if clip is None else 500.0
    torch.manual_seed(0)  # few steps with other weights may amplify a difference
    assert_same(*both(Net(), (7, 3), clip=clip, **options), steps, largest)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(
    "dtype", [None, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float16))]
)
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (63, 3), *(pytest.param(each, marks=pytest.mark.slow) for each in ((2, 1000), (1, 2**11 + 17)))],
    ids=str,
)
def test_odd_shapes_and_low_precision(shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    ours, theirs = both(lambda x, t: torch.sin(x) - x, shape, steps=6, dtype=dtype, solver="ddpm", prediction="eps")
    assert ours.dtype == torch.float32
    if dtype is None:
        assert_same(ours, theirs, 6)
    else:  # a state that rounds differently can round the network's input to the next number of the dtype
        largest = max(10.0, float(theirs.abs().max()))
        assert (ours - theirs).abs().max() <= 6 * 2 * largest * torch.finfo(dtype).eps
        assert not torch.equal(ours, fastsde.sample(lambda x, t: torch.sin(x) - x, shape, steps=6, solver="ddpm"))


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("shape", [(0, 3), (4, 0)], ids=str)
def test_nothing_becomes_nothing(shape: tuple[int, ...]) -> None:
    def conditioned(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return y[:, None] * x

    assert fastsde.sample(lambda x, t: -x, shape, steps=3, backend="graph").shape == shape
    y = torch.ones(shape[0])
    options: dict[str, Any] = {"model_kwargs": {"y": y}, "guidance": 2.0, "uncond_kwargs": {"y": 0 * y}}
    x, states = fastsde.sample(conditioned, shape, steps=3, backend="graph", trajectory=1, **options)
    assert x.shape == shape
    assert states.shape == (4, *shape)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("every", [1, *(pytest.param(every, marks=pytest.mark.slow) for every in (3, 20)), 7])
def test_trajectories_keep_the_same_states(every: int) -> None:
    (ours, states), (theirs, expected) = both(Net(), (4, 3), steps=13, trajectory=every)
    assert_same(ours, theirs, 13)
    assert_same(states, expected, 13)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("every", [4, 13])
@pytest.mark.parametrize("slots", [3, *(pytest.param(slots, marks=pytest.mark.slow) for slots in (5, 8))])
def test_slots_are_found_again_after_each_replay(slots: int, every: int) -> None:
    """Slots that swap places are elsewhere after a graph if its rows are not a multiple of the rotation."""
    for table in (history_table(slots, 13), random_table(slots, 13, seed=2, clip=1.5)):
        keys = fastsde.noise.sample_keys(1, 4, device=torch.get_default_device())
        expected = states_near(table, keys, (3,))
        for _ in range(2):  # the second run begins with the slots where the first left them
            options: dict[str, Any] = {"solver": table, "seed": 1, "trajectory": every}
            x, states = fastsde.sample(network, (4, 3), backend="graph", **options)
            for ours, near in zip(states, expected[::every], strict=True):
                near.check(ours)
            expected[-1].check(x)


def test_conditions_and_guidance_come_from_device_memory(graphs: Any) -> None:
    model, options = Net(), {"solver": "ddim", "prediction": "eps", "steps": 8}
    samplers = [Sampler(model, (3,), guidance=2.0, backend=backend, **options) for backend in ("graph", "reference")]
    for seed in range(3):
        conditions = {"shift": torch.randn(5, 3), "scale": 0.5}
        ours, theirs = (
            sampler(5, seed=seed, model_kwargs=conditions, uncond_kwargs={"shift": torch.zeros(5, 3)})
            for sampler in samplers
        )
        assert_same(ours, theirs, 8)
    assert len(graphs.recorded) == 1
    samplers[0](5, model_kwargs={"shift": torch.randn(5, 3), "scale": 0.25}, uncond_kwargs={})  # a number is a constant
    assert len(graphs.recorded) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("graphs")
def test_x_init_and_keys_and_split_batches() -> None:
    x_init, keys = torch.randn(10, 3), [5, 5, 1, 2, 3, 4, 2**64 - 1, 0, 8, 9]
    before = x_init.clone()
    ours, theirs = both(Net(), (10, 3), steps=5, x_init=x_init, keys=keys, max_batch=4)
    assert_same(ours, theirs, 5)
    assert torch.equal(x_init, before)


# What is captured again, and what is not ----------------------------------------------------------------------------


def test_new_seeds_samples_and_table_values_need_no_capture(graphs: Any) -> None:
    model = Net()
    tables = [solvers.euler_maruyama(VPSDE(), torch.linspace(1, end, 6)) for end in (0.0, 0.1, 0.2)]
    sampler = Sampler(model, (3,), solver=tables[0], backend="graph")
    results = [sampler(4, seed=seed, first_sample=seed) for seed in range(3)]
    calls = model.calls
    kept = [result.clone() for result in results]
    for table in tables:
        assert_same(*both(model, (4, 3), solver=table, seed=7), 5)
    assert len(graphs.recorded) == 1
    assert model.calls == calls + 15  # of the reference only
    assert all(torch.equal(*pair) for pair in zip(results, kept, strict=True))  # results are not static memory


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.linear.weight.data.mul_(1.5),
        lambda model: torch.nn.utils.vector_to_parameters(torch.randn(12), model.parameters()),
        lambda model: setattr(model.linear, "weight", nn.Parameter(torch.randn(3, 3))),
        lambda model: model.load_state_dict(Net().state_dict()),
        lambda model: setattr(model, "linear", nn.Linear(3, 3)),
    ],
)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        pytest.param(lambda m: lambda x, t: m(x, t), marks=pytest.mark.slow),
        pytest.param(lambda m: functools.partial(m, scale=1.0), marks=pytest.mark.slow),
    ],
)
def test_weights_are_seen_in_place_and_where_they_move(
    graphs: Any, change: Callable[[nn.Module], object], wrap: Callable[[nn.Module], Any]
) -> None:
    model = Net()
    sampler = Sampler(wrap(model), (3,), steps=5, backend="graph")
    before = sampler(4)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    change(model)
    moved = pointers != [parameter.data_ptr() for parameter in model.parameters()]
    after = sampler(4)
    assert not torch.equal(before, after)
    assert_same(after, fastsde.sample(model, (4, 3), steps=5, backend="reference"), 5)
    assert len(graphs.recorded) == 1 + moved


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda model: setattr(model, "scale", 5.0), id="a number"),
        pytest.param(
            lambda model: model.linear.register_forward_hook(lambda module, args, output: 2 * output),
            id="a hook",
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda model: setattr(model, "table", torch.ones(3)), id="a tensor", marks=pytest.mark.slow),
        pytest.param(lambda model: setattr(model, "forward", lambda x, t: -x), id="a forward", marks=pytest.mark.slow),
    ],
)
def test_what_a_model_computes_with_is_seen_to_change(graphs: Any, change: Callable[[nn.Module], object]) -> None:
    class Scaled(Net):
        scale, table = 1.0, torch.zeros(3)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x, t) * self.scale + self.table.to(x.device)

    model = Scaled()
    before = fastsde.sample(model, (4, 3), steps=5, backend="graph")
    assert torch.equal(fastsde.sample(model, (4, 3), steps=5, backend="graph"), before)
    assert len(graphs.recorded) == 1
    change(model)
    ours, theirs = both(model, (4, 3), steps=5)
    assert not torch.equal(ours, before)
    assert_same(ours, theirs, 5)
    assert len(graphs.recorded) == 2


@pytest.mark.usefixtures("graphs")
def test_captures_of_one_device_are_not_those_of_another() -> None:
    table, keys = solvers.euler_maruyama(VPSDE(), torch.linspace(1, 0, 6)), noise.sample_keys(0, 4)
    form = graph.Form.of(Sampler(Net(), (3,), backend="graph")._network, Request((4, 3), table, keys))
    assert form.device == keys.device
    assert dataclasses.replace(form, device=torch.device("cuda:7")) != form


@pytest.mark.slow
@pytest.mark.usefixtures("graphs")
def test_a_copy_in_another_dtype_sees_weights_that_change() -> None:
    model = Net()
    sampler = Sampler(model, (3,), steps=5, backend="graph", dtype=torch.bfloat16)
    before = sampler(4)
    model.linear.weight.data.neg_()
    after = sampler(4)
    assert not torch.equal(before, after)
    assert torch.equal(after, Sampler(model, (3,), steps=5, backend="graph", dtype=torch.bfloat16)(4))


@pytest.mark.slow
def test_what_a_capture_holds_fast_makes_another(graphs: Any) -> None:
    model, options = Net(), {"solver": "ddim", "prediction": "eps"}
    changes: list[dict[str, Any]] = [{}, {"steps": 6}, {"clip": 1.0}, {"clip": 2.0}, {"dtype": torch.bfloat16}]
    for i, change in enumerate(changes):
        for _ in range(2):
            fastsde.sample(model, (4, 3), backend="graph", **{"steps": 5, **options, **change})
        assert len(graphs.recorded) == i + 1
    fastsde.sample(model, (5, 3), backend="graph", steps=5, **options)  # another batch
    assert len(graphs.recorded) == len(changes) + 1
    model.eval()
    torch.use_deterministic_algorithms(True)
    try:
        fastsde.sample(model, (5, 3), backend="graph", steps=5, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(graphs.recorded) == len(changes) + 2


@pytest.mark.usefixtures("graphs")
def test_a_capture_in_inference_mode_can_be_used_outside() -> None:
    sampler = Sampler(Net(), (3,), steps=3, backend="graph")
    with torch.inference_mode():
        inside = sampler(4)
    assert torch.equal(sampler(4), inside)


@pytest.mark.slow
@pytest.mark.usefixtures("graphs")
def test_autocast_around_a_call_is_that_of_the_capture() -> None:
    model = Net()
    sampler = Sampler(model, (3,), steps=5, backend="graph")
    full, kind = sampler(4), torch.get_default_device().type
    for _ in range(2):
        with torch.autocast(kind, dtype=torch.bfloat16):
            rounded = sampler(4)
        assert not torch.equal(rounded, full)
        assert (rounded - full).abs().max() < 0.1 * full.abs().max()
        assert torch.equal(sampler(4), full)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the network has Dropout in training mode")
def test_training_mode_is_seen(graphs: Any) -> None:
    model = Net().eval()
    sampler = Sampler(model, (3,), steps=3, backend="graph")
    assert torch.equal(sampler(4), sampler(4))
    model.train()
    assert not torch.equal(sampler(4), sampler(4))  # dropout draws anew in each replay
    assert len(graphs.recorded) == 2


@pytest.mark.slow
def test_few_captures_are_kept_and_none_outlives_its_model(graphs: Any) -> None:
    model = Net()
    sampler = Sampler(model, (3,), steps=2, backend="graph")
    for n in range(1, 9):
        sampler(n)
    kept = sampler._network.kept.trajectories
    assert [form.shape[0] for form in kept] == [5, 6, 7, 8]
    sampler(5)
    assert next(reversed(kept)).shape[0] == 5  # used last
    assert len(graphs.recorded) == 8
    for every in range(1, 12):
        Sampler(model, (3,), steps=12, backend="graph")(1, trajectory=every)
    assert all(len(trajectory._graphs) <= 8 for trajectory in kept.values())
    dead = [weakref.ref(trajectory) for trajectory in kept.values()]
    del model, sampler, kept
    gc.collect()
    assert all(reference() is None for reference in dead)


@pytest.mark.slow
def test_the_cache_outlives_a_sampler_and_can_be_released(graphs: Any) -> None:
    model = Net()
    for _ in range(3):
        sampler = Sampler(model, (3,), steps=3, backend="graph")
        sampler(4)
    assert len(graphs.recorded) == 1
    graph.release(sampler._network)
    sampler(4)
    assert len(graphs.recorded) == 2


# Failures -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("bad", [torch.nan, pytest.param(torch.inf, marks=pytest.mark.slow)])
def test_a_network_that_breaks_is_reported_with_its_row_and_the_next_run_is_right(bad: float) -> None:
    model, row = Net(), 8
    at = torch.linspace(1, 0, 14)[row].item()

    def breaks(x: Tensor, t: Tensor, limit: Tensor) -> Tensor:
        return torch.where((t < limit)[:, None], bad, model(x, t))

    sampler = Sampler(breaks, (3,), steps=13, backend="graph")
    limits = torch.zeros(4)
    limits[2] = at + 1e-4
    with pytest.raises(NonFiniteError, match=rf"the network returned NaN or infinity in row {row}, at time {at:g}"):
        sampler(4, model_kwargs={"limit": limits})
    expected = fastsde.sample(model, (4, 3), steps=13, backend="reference")
    assert_same(sampler(4, model_kwargs={"limit": torch.zeros(4)}), expected, 13)


@pytest.mark.usefixtures("graphs")
def test_a_state_that_breaks_is_not_blamed_on_the_network() -> None:
    ones = torch.ones(5, dtype=torch.float64, device="cpu")  # tables are on the CPU, whatever the default device is
    table = StepTable(ones, a=torch.where(torch.arange(5, device="cpu") % 5 % 3 > 0, 1e38, ones))
    with pytest.raises(NonFiniteError, match="the state became NaN or infinity in row 2, at time 1"):
        fastsde.sample(lambda x, t: x, (3, 2), solver=table, backend="graph")


class Waits(Net):
    """A network that reads the device on the host."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) if float(t[0]) > 0.5 else -x


def test_a_network_that_cannot_be_captured_is_refused_or_runs_eagerly_with_a_warning(graphs: Any) -> None:
    model = Waits()
    with pytest.raises(CaptureError, match=r"backend 'graph': it cannot be captured .*; use 'eager' or 'auto'"):
        fastsde.sample(model, (4, 3), steps=5, backend="graph")
    sampler = Sampler(model, (3,), steps=5)
    assert sampler.backend == "graph"
    with pytest.warns(RuntimeWarning, match="does not run with backend 'graph', so 'eager' takes over: it cannot be"):
        x = sampler(4)
    assert sampler.backend == "eager"
    expected = fastsde.sample(model, (4, 3), steps=5, backend="reference")
    assert_same(x, expected, 5)
    assert_same(sampler(4), expected, 5)  # without another warning, which would be an error here
    assert_same(fastsde.sample(model, (4, 3), steps=5), expected, 5)
    assert len(graphs.recorded) == 0


@pytest.mark.usefixtures("short")
def test_an_exception_leaves_a_sampler_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    sampler = Sampler(model, (3,), steps=13, backend="graph")
    expected = sampler(4)
    advance, states = Recorder.advance, []

    def interrupted(self: Any, rows: int, count: int, x: Tensor) -> None:
        states.append(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr("fastsde.recorder.Recorder.advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampler(4)
    monkeypatch.setattr("fastsde.recorder.Recorder.advance", advance)
    assert torch.equal(sampler(4), expected)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Sampler(model, (5,), steps=3, backend="graph")(4)
    assert torch.equal(sampler(4), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("graphs")
def test_threads_wait_for_each_other() -> None:
    model = Net()
    sampler = Sampler(model, (3,), steps=6, backend="graph")
    expected = [fastsde.sample(model, (4, 3), steps=6, seed=seed, backend="reference") for seed in range(4)]
    found: dict[int, Tensor] = {}
    # The process has only one tape (tests/cuda_graphs.py), so the graph is recorded before the threads begin.
    sampler(4)
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: sampler(4, seed=seed)})) for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert_same(found[seed], expected[seed], 6)


@pytest.mark.slow
def test_a_thread_that_records_a_new_length_warms_up_first(graphs: Any) -> None:
    model = Net()
    sampler = Sampler(model, (3,), steps=6, backend="graph")
    expected, calls = sampler(4), model.calls
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(sampler(4, trajectory=4)[0]))
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0)
    assert len(graphs.recorded) == 3
    assert model.calls == calls + 1 + 4 + 2  # a row, and the rows of both graphs


# Choice -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("graphs")
def test_auto_takes_graphs_for_what_is_no_mlp_and_eager_where_the_host_is_needed() -> None:
    assert Sampler(Net(), (3,)).backend == "graph"
    assert Sampler(MLP(), (2,)).backend == "persistent"
    assert Sampler(MLP(), (2,), guidance=2.0).backend == "persistent"
    assert Sampler(Net(), (3,), dtype=torch.float64).backend == "reference"
    seen: list[int] = []
    fastsde.sample(Net(), (2, 3), steps=3, callback=lambda row, time, x: seen.append(row))
    assert seen == [0, 1, 2]
    for option in ("noise", "callback"):
        with pytest.raises(
            ValueError, match=rf"backend 'graph' replays rows as CUDA graphs and does not support {option};"
        ):
            fastsde.sample(Net(), (2, 3), steps=3, backend="graph", **{option: lambda *args: args[-1]})


def test_without_a_gpu_it_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"backend 'graph' needs Triton and a CUDA GPU, got device cpu; use 'eager'"):
        Sampler(Net(), (3,), backend="graph")
