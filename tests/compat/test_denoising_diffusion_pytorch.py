"""`fastsde.compat.denoising_diffusion_pytorch` against denoising-diffusion-pytorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from libraries import assert_close, library, seeded
from torch import Tensor, nn

from fastsde import TraceError
from fastsde.compat.denoising_diffusion_pytorch import accelerate

ddp = library("denoising_diffusion_pytorch")


class Network(nn.Module):
    """A small network with the attributes by which the diffusions know theirs."""

    channels = out_dim = 2
    self_condition = False
    random_or_learned_sinusoidal_cond = False

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        x = x if condition is None else x + 0.2 * condition
        return torch.tanh(self.layer(x)) * (1 + 0.1 * torch.sin(t.float()))[:, None, None, None]


class SelfConditioned(Network):
    self_condition = True


class Continuous(Network):
    random_or_learned_sinusoidal_cond = True


class LearnedVariance(Network):
    out_dim = 4

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        f = super().forward(x, t)
        return torch.cat([f, 0.1 * f], dim=1)


def gaussian(net: nn.Module | None = None, **options: Any) -> Any:
    return ddp.GaussianDiffusion(net or Network(), image_size=4, **{"timesteps": 20, **options})


def one_dimensional() -> Any:
    class Network1D(Network):
        def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
            return super().forward(x[:, :, None], t[:, None][:, 0])[:, :, 0]

    return ddp.GaussianDiffusion1D(Network1D(), seq_length=8, timesteps=20)


CASES = {
    "noise": lambda: gaussian(objective="pred_noise"),
    "v": gaussian,
    "DDIM": lambda: gaussian(sampling_timesteps=8),
    "DDIM, eta": lambda: gaussian(sampling_timesteps=8, ddim_sampling_eta=0.7, objective="pred_x0"),
    "self-conditioned": lambda: gaussian(SelfConditioned()),
    "1D": one_dimensional,
    "Elucidated": lambda: ddp.ElucidatedDiffusion(Continuous(), image_size=4, channels=2, num_sample_steps=10),
    "Continuous": lambda: ddp.ContinuousTimeGaussianDiffusion(
        Continuous(), image_size=4, channels=2, num_sample_steps=10
    ),
}


@pytest.fixture(autouse=True)
def _quietly(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Its progress bars cannot be switched off."""
    yield
    capsys.readouterr()


@pytest.mark.parametrize("name", CASES)
def test_diffusions_return_the_librarys_numbers(name: str) -> None:
    theirs = CASES[name]()
    fast = accelerate(theirs, noise="torch")
    assert_close(seeded(fast.sample, batch_size=3), seeded(theirs.sample, batch_size=3))
    if name == "self-conditioned":  # the network has two inputs that depend on the state
        assert "It is no table" in fast.sample.explain()
    else:
        assert fast.sample.traced.table is not None


def test_all_states() -> None:
    theirs = gaussian(sampling_timesteps=8)
    ours = seeded(accelerate(theirs, noise="torch").sample, 3, return_all_timesteps=True)
    assert_close(ours, seeded(theirs.sample, 3, return_all_timesteps=True))
    assert ours.shape == (3, 9, 2, 4, 4)


def test_learned_variances_are_replayed_on_request() -> None:
    theirs = ddp.LearnedGaussianDiffusion(LearnedVariance(), image_size=4, timesteps=10, objective="pred_noise")
    with pytest.raises(TraceError, match="replay"):
        accelerate(theirs).sample(batch_size=3)
    fast = accelerate(theirs, noise="torch", replay=True)
    assert_close(seeded(fast.sample, batch_size=3), seeded(theirs.sample, batch_size=3))


def test_its_own_unet() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ddp.Unet(dim=8, dim_mults=(1, 2), channels=2)
    theirs = gaussian(net, timesteps=6)
    assert_close(
        seeded(accelerate(theirs, noise="torch").sample, batch_size=2), seeded(theirs.sample, batch_size=2)
    )  # fmt: skip


def test_it_is_used_as_the_diffusion_and_a_seed_is_reproducible() -> None:
    theirs = gaussian()
    fast = accelerate(theirs, seed=7)
    assert fast.num_timesteps == 20
    assert fast.model is theirs.model
    first = fast.sample(batch_size=3)
    assert torch.equal(first, fast.sample(batch_size=3))
    assert torch.equal(first, fast.p_sample_loop((3, 2, 4, 4)))
    assert not torch.equal(first, fast.with_options(seed=8).sample(batch_size=3))
    assert "20 network calls" in fast.sample.explain()


def test_what_is_no_diffusion_is_refused() -> None:
    with pytest.raises(TypeError, match="diffusion must have a method sample"):
        accelerate(Network())
