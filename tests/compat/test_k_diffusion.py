"""`fastsde.compat.k_diffusion` against k-diffusion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from libraries import Field, assert_close, library, seeded
from torch import Tensor, nn

from fastsde import TraceError
from fastsde.compat.k_diffusion import accelerate, sample

k = library("k_diffusion")

SIGMAS = k.sampling.get_sigmas_karras(8, 0.03, 14.6)
X = 14.6 * torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
TREES = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")  # that draw from a Brownian tree by default


class Guided(nn.Module):
    """Classifier-free guidance around a denoiser, as k-diffusion's users write it."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor, scale: float) -> Tensor:
        both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), y=torch.cat([y, torch.zeros_like(y)]))
        labelled, free = both.chunk(2)
        return free + scale * (labelled - free)


DDPM = k.external.DiscreteEpsDDPMDenoiser(Field(), torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0), False)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler", {}),
        ("euler", {"s_churn": 4.0, "s_noise": 1.003}),
        ("euler_ancestral", {"eta": 0.5}),
        ("heun", {}),
        ("dpm_2", {}),
        ("dpm_2_ancestral", {}),
        ("lms", {}),
        ("dpmpp_2s_ancestral", {}),
        ("dpmpp_2m", {}),
        *((name, {"noise_sampler": lambda sigma, sigma_next: torch.randn_like(X)}) for name in TREES),
    ],
)
def test_samplers_return_k_diffusions_numbers(name: str, options: dict[str, Any]) -> None:
    theirs = seeded(getattr(k.sampling, f"sample_{name}"), Field(), X, SIGMAS, disable=True, **options)
    assert_close(seeded(sample, name, Field(), X, SIGMAS, noise="torch", disable=True, **options), theirs)


@pytest.mark.parametrize("denoiser", [DDPM, k.external.VDenoiser(Field())], ids=["DDPM", "v"])
def test_wrappers_are_networks(denoiser: nn.Module) -> None:
    fast = accelerate(k.sampling.sample_dpmpp_2m)
    assert_close(fast(denoiser, X, SIGMAS, disable=True), k.sampling.sample_dpmpp_2m(denoiser, X, SIGMAS, disable=True))
    assert fast.traced.table is not None
    assert fast.traced.slots == 2


def test_guidance_by_a_module_and_by_a_function() -> None:
    guided, labels = Guided(k.external.VDenoiser(Field())), torch.linspace(-1, 1, len(X))
    theirs = k.sampling.sample_heun(guided, X, SIGMAS, extra_args={"y": labels, "scale": 2.0}, disable=True)
    assert_close(sample("heun", guided, X, SIGMAS, extra_args={"y": labels, "scale": 2.0}, disable=True), theirs)
    closure = lambda x, sigma: guided(x, sigma, y=labels, scale=2.0)  # noqa: E731
    assert_close(sample("heun", closure, X, SIGMAS, disable=True), theirs)


def test_a_sampler_that_is_given_a_range_of_sigmas() -> None:
    theirs = k.sampling.sample_dpm_fast(Field(), X, 0.03, 14.6, 7, disable=True)
    assert_close(sample("dpm_fast", Field(), X, 0.03, 14.6, 7, disable=True), theirs)


@pytest.mark.parametrize("name", TREES)
def test_brownian_trees_are_replaced_by_the_contract_and_said_so(name: str) -> None:
    fast, net = accelerate(name, seed=3), Field()
    first = fast(net, X, SIGMAS, disable=True)
    assert "Brownian tree, which is replaced" in fast.explain()
    torch.testing.assert_close(fast(net, X, SIGMAS, disable=True), first, rtol=0, atol=0)
    with pytest.raises(ValueError, match="Brownian tree"):
        accelerate(name, noise="torch")(net, X, SIGMAS, disable=True)


def test_a_seed_of_the_contract_is_reproducible() -> None:
    net = Field()
    first, again = (sample("euler_ancestral", net, X, SIGMAS, seed=7, disable=True) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, sample("euler_ancestral", net, X, SIGMAS, seed=8, disable=True))


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(TraceError, match="sampling"):
        sample("dpm_adaptive", Field(), X, 0.03, 14.6, disable=True)
    kept: list[Tensor] = []
    with pytest.raises(TraceError, match="callback"):
        sample("euler", Field(), X, SIGMAS, callback=lambda d: kept.append(d["x"]), disable=True)
    with pytest.raises(ValueError, match=r"function must be one of .*dpmpp_2m.*'dpmpp_9'"):
        sample("dpmpp_9", Field(), X, SIGMAS)
