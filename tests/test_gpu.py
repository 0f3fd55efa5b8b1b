"""Parity on a CUDA device with the CPU: ``python -m pytest -m gpu``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastsde
from fastsde import NonFiniteError, checkpoints, noise, reference
from fastsde.models import MLP
from fastsde.training import Trainer, default_config

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def full_fp32() -> Iterator[None]:
    # PyTorch runs fp32 convolutions in TF32 by default, which is 2^-11 off a call.
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("shape", [(), (1,), (63,), (1000,), (2**16 + 17,)])
def test_noise_is_that_of_the_cpu(shape: tuple[int, ...]) -> None:
    keys = noise.sample_keys(3, 4)
    cuda = noise.sample_keys(3, 4, device="cuda")
    assert torch.equal(cuda.cpu(), keys)
    assert torch.equal(noise.bits(cuda, 5, shape, 1).cpu(), noise.bits(keys, 5, shape, 1))
    assert torch.equal(noise.uniform(cuda, 5, shape, 1).cpu(), noise.uniform(keys, 5, shape, 1))
    torch.testing.assert_close(noise.normal(cuda, 5, shape).cpu(), noise.normal(keys, 5, shape), rtol=0, atol=4e-6)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("solver", ["euler_maruyama", "ddim", "dpm_solver_pp_2m", "heun"])
def test_samples_are_those_of_the_cpu(backend: str, solver: str) -> None:
    checkpoint = checkpoints.load("swiss-roll")
    options = {"prediction": checkpoint.prediction, "solver": solver, "steps": 99, "seed": 5}
    cpu = fastsde.sample(checkpoint.model, (257, 2), backend="reference", **options)
    cuda = fastsde.sample(checkpoint.model.cuda(), (257, 2), backend=backend, **options)
    # 99 steps that each round the state, of order 1, and contract towards the data.
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


@pytest.mark.parametrize("backend", ["reference", "eager"])
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
        # Adam divides by the root of a second moment, so that rounding moves a weight by a share of lr a step.
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=40 * config.lr * 0.05)
    Trainer(config, tmp_path / "cuda", device="cuda", resume=True).train(progress=False)


def test_the_reference_steps_where_its_tensors_are() -> None:
    keys = noise.sample_keys(0, 3, device="cuda")
    x_t, t = reference.perturb(torch.rand(3, 5, device="cuda"), keys, 2, fastsde.VPSDE())
    assert x_t.is_cuda
    assert t.is_cuda
