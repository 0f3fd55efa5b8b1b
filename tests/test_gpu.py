"""Parity on a CUDA device with the CPU, memory, streams and threads: ``python -m pytest -m gpu``.

On a GPU, tests/test_graph.py and tests/training/test_captured.py run with CUDA's own graphs, too.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastsde
from fastsde import NonFiniteError, checkpoints, noise, ops, reference, solvers
from fastsde.models import MLP, UNet
from fastsde.objective import Objective
from fastsde.training import Trainer, default_config
from fastsde.training.captured import CapturedSteps

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("full_fp32")]


@pytest.mark.parametrize("shape", [(), (1,), (63,), (1000,), (2**16 + 17,)])
def test_noise_is_that_of_the_cpu(shape: tuple[int, ...]) -> None:
    keys = noise.sample_keys(3, 4)
    cuda = noise.sample_keys(3, 4, device="cuda")
    assert torch.equal(cuda.cpu(), keys)
    assert torch.equal(noise.bits(cuda, 5, shape, 1).cpu(), noise.bits(keys, 5, shape, 1))
    assert torch.equal(noise.uniform(cuda, 5, shape, 1).cpu(), noise.uniform(keys, 5, shape, 1))
    torch.testing.assert_close(noise.normal(cuda, 5, shape).cpu(), noise.normal(keys, 5, shape), rtol=0, atol=4e-6)


@pytest.mark.parametrize("backend", ["reference", "eager", "graph", "persistent"])
@pytest.mark.parametrize("solver", ["euler_maruyama", "ddim", "dpm_solver_pp_2m", "heun"])
def test_samples_are_those_of_the_cpu(backend: str, solver: str) -> None:
    checkpoint = checkpoints.load("swiss-roll")
    options = {"prediction": checkpoint.prediction, "solver": solver, "steps": 99, "seed": 5}
    cpu = fastsde.sample(checkpoint.model, (257, 2), backend="reference", **options)
    cuda = fastsde.sample(checkpoint.model.cuda(), (257, 2), backend=backend, **options)
    # 99 steps, each of which rounds the state, of order 1, and contracts towards the data.
    torch.testing.assert_close(cuda.cpu(), cpu, rtol=0, atol=1e-4)


def test_the_eager_engine_does_not_synchronise_between_rows() -> None:
    def callback(row: int, time: float, x: torch.Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error" if row < 19 else "default")

    sampler = fastsde.Sampler(MLP().cuda(), (2,), steps=20)
    sampler(64)
    try:
        assert sampler(64, callback=callback).isfinite().all()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["eager", "graph", "persistent"])
def test_streams_do_not_disturb_each_other(backend: str) -> None:
    model = MLP().cuda()
    sampler = fastsde.Sampler(model, (2,), steps=50, backend=backend)
    expected = [sampler(500, seed=seed) for seed in range(4)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for seed, stream in enumerate(streams):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(sampler(500, seed=seed))
    torch.cuda.synchronize()
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["eager", "graph", "persistent"])
def test_the_device_of_the_model_is_used_whatever_the_current_one_is(backend: str) -> None:
    model = MLP().to("cuda:1")
    with torch.cuda.device(0):
        x = fastsde.sample(model, (64, 2), steps=20, backend=backend)
        assert torch.cuda.current_device() == 0
    assert x.device == torch.device("cuda:1")
    torch.testing.assert_close(x.cpu(), fastsde.sample(model.cpu(), (64, 2), steps=20), rtol=1e-5, atol=1e-2)


def test_auto_is_persistent_for_an_mlp_and_graph_for_the_rest() -> None:
    assert fastsde.Sampler(MLP().cuda(), (2,)).backend == "persistent"
    assert fastsde.Sampler(UNet().cuda(), (1, 28, 28)).backend == "graph"


@pytest.mark.alone
def test_more_than_2_to_the_31_elements() -> None:
    n, size = 2049, 2**20  # the offsets of the last sample need 64 bits
    if torch.cuda.mem_get_info()[0] < 5 * n * size * 4:
        pytest.skip("needs 43 GB of free memory on the GPU")
    table = solvers.euler_maruyama(fastsde.VPSDE(), [1.0, 0.5])
    x, f = torch.ones(n, size, device="cuda"), torch.zeros(n, size, device="cuda")
    keys = noise.sample_keys(0, n, device="cuda")
    (out,), _ = ops.Stepper(table, x, keys)(0, [x], f)
    (expected,) = reference.solver_step((x[-2:],), f[-2:], table, 0, keys=keys[-2:])
    torch.testing.assert_close(out[-2:], expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("backend", ["reference", "eager", "graph"])
def test_a_network_that_breaks_is_reported_with_its_row(backend: str) -> None:
    def broken(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.where(t[:, None] < 0.55, torch.nan, x)

    with pytest.raises(NonFiniteError, match=r"row 5, at time 0\.5"):
        fastsde.sample(broken, (8, 2), steps=10, device="cuda", backend=backend)


def test_bf16_and_fp32_networks_agree_to_the_rounding_of_bf16() -> None:
    model = MLP().cuda()
    full = fastsde.sample(model, (64, 2), steps=5)
    half = fastsde.sample(model, (64, 2), steps=5, dtype=torch.bfloat16)
    assert half.dtype == torch.float32
    assert (full - half).abs().max() <= 5 * 2**-7 * full.abs().max()


def test_training_draws_the_data_of_the_cpu_and_resumes(tmp_path: Path) -> None:
    config = replace(default_config("swiss-roll"), steps=40, checkpoint_every=20, log_every=10)
    Trainer(config, tmp_path / "cpu").train(progress=False)
    before = torch.cuda.get_rng_state()
    trainer = Trainer(config, tmp_path / "cuda", device="cuda")
    trainer.train(progress=False)
    assert torch.equal(before, torch.cuda.get_rng_state())
    weights = [checkpoints.load(tmp_path / name).model.state_dict() for name in ("cpu", "cuda")]
    for name, value in weights[0].items():
        # Adam divides by the root of a second moment, so that rounding moves a weight by a share of lr per step.
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=40 * config.lr * 0.05)
    Trainer(config, tmp_path / "cuda", device="cuda", resume=True).train(progress=False)


def test_the_reference_steps_where_its_tensors_are() -> None:
    keys = noise.sample_keys(0, 3, device="cuda")
    _, k, z = reference.training_draws(keys, 2, 7, (5,), Objective())
    noised = reference.perturb(torch.rand(3, 5, device="cuda"), keys, 2, k)
    assert torch.equal(noised.z, z)
    assert all(each.is_cuda for each in (k, *noised))


def test_a_unet_in_channels_last_copies_nothing_there() -> None:
    model = UNet(channels=(8, 16, 16)).cuda().to(memory_format=torch.channels_last)
    seen: list[torch.Tensor] = []
    for layer in (*model.encoder, *model.decoder, *model.head):
        layer.register_forward_hook(lambda layer, args, output: seen.extend((args[0], output)))
    model(torch.randn(2, 1, 28, 28, device="cuda"), torch.rand(2, device="cuda")).square().sum().backward()
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in seen)
    assert all(each.grad is not None and each.grad.stride() == each.stride() for each in model.parameters())


# Graphs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes waiting for the device an error, from the first replay until the status is read at the end."""
    from fastsde.engines.graph import Trajectory

    start, check = Trajectory._start, ops.check_status

    def starts(self: Trajectory, *args: object) -> None:
        torch.cuda.set_sync_debug_mode("error")
        start(self, *args)

    def checks(*args: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        check(*args)

    monkeypatch.setattr(Trajectory, "_start", starts)
    monkeypatch.setattr(ops, "check_status", checks)
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("trajectory", [None, 30])
def test_a_graph_run_does_not_synchronise(trajectory: int | None) -> None:
    sampler = fastsde.Sampler(UNet().cuda(), (1, 28, 28), steps=99, backend="graph")
    ops.device_table(sampler.table, sampler.device)  # copied from the host once
    for seed in range(3):
        sampler(4, seed=seed, trajectory=trajectory)


def test_a_thousand_calls_take_no_more_memory_and_a_dead_model_frees_its_own() -> None:
    fastsde.sample(MLP().cuda(), (100, 2), steps=60, backend="graph")  # what libraries keep for the stream
    gc.collect()
    empty = torch.cuda.memory_allocated()
    model = MLP().cuda()
    sampler = fastsde.Sampler(model, (2,), steps=60, backend="graph")
    sampler(100)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for seed in range(1000):
        sampler(100, seed=seed, first_sample=seed)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    for batch in range(1, 40):
        sampler(batch)
    assert torch.cuda.memory_allocated() <= before[0] + 4 * 2**20  # at most four captures are kept
    del sampler, model
    gc.collect()
    assert torch.cuda.memory_allocated() == empty


def test_threads_share_a_sampler_and_capture_beside_each_other() -> None:
    models = [MLP().cuda() for _ in range(3)]
    expected = {
        (i, seed): fastsde.sample(model, (300, 2), steps=60, seed=seed, backend="eager")
        for i, model in enumerate(models)
        for seed in range(8)
    }
    samplers = [fastsde.Sampler(model, (2,), steps=60, backend="graph") for model in models]
    found: dict[tuple[int, int], torch.Tensor] = {}

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i, sampler in enumerate(samplers):
                found[i, seed] = sampler(300, seed=seed)
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "graph"])
def test_a_unet_gives_the_samples_of_the_reference(backend: str, dtype: torch.dtype | None, compile: bool) -> None:
    checkpoint = checkpoints.load("mnist", device="cuda")
    options = {"prediction": checkpoint.prediction, "steps": 20, "solver": "ddim", "seed": 3}
    expected = fastsde.sample(checkpoint.model, (5, 1, 28, 28), backend="reference", **options)
    rounded = fastsde.sample(checkpoint.model, (5, 1, 28, 28), backend="reference", dtype=dtype, **options)
    x = fastsde.sample(checkpoint.model, (5, 1, 28, 28), backend=backend, dtype=dtype, compile=compile, **options)
    # At most twice PyTorch's own error in that dtype, plus a small constant.
    error, own = (float((value - expected).square().mean().sqrt()) for value in (x, rounded))
    assert error <= 2 * own + 1e-4


def test_a_capture_that_fails_leaves_cuda_as_it_was() -> None:
    def waits(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.randn_like(x) if float(t[0]) > 2 else -x

    def fail() -> None:
        with pytest.warns(RuntimeWarning, match="'eager' takes over"):
            fastsde.sample(waits, (64, 2), steps=30, device="cuda")

    fail()

    def memory() -> tuple[int, int]:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    before = memory()
    for _ in range(20):
        fail()
    assert memory() <= before
    assert torch.randn(5, device="cuda").isfinite().all()  # the generator is no longer capturing
    model = MLP().cuda()
    x = fastsde.sample(model, (64, 2), steps=30, backend="graph")
    torch.testing.assert_close(x, fastsde.sample(model, (64, 2), steps=30, backend="eager"), rtol=1e-5, atol=1e-3)


@pytest.mark.alone
def test_memory_that_runs_out_halves_the_batch() -> None:
    model = MLP().cuda()
    free = torch.cuda.mem_get_info()[0]

    def hungry(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        torch.empty(len(x) * (free // 100), dtype=torch.uint8, device=x.device)  # 150 samples do not fit
        return model(x, t)

    expected = fastsde.sample(model, (400, 2), steps=30, backend="graph")
    x = fastsde.sample(hungry, (400, 2), steps=30, device="cuda", max_batch="auto")
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-3)


def test_captured_steps_do_not_synchronise_and_take_no_more_memory(tmp_path: Path) -> None:
    config = replace(default_config("swiss-roll"), steps=10_000)
    trainer = Trainer(config, tmp_path, device="cuda")
    work = trainer.work()
    captured = CapturedSteps(work)
    for step in range(3):
        captured.take(step, 1)
    captured.take(3, 50)
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(100):
            losses = captured.take(53 + 50 * i, 50)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()
    del losses
    assert torch.cuda.memory_allocated() <= before
