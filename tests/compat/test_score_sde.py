"""`fastsde.compat.score_sde` against the paper's algorithms, written here with one number per step (arXiv:2011.13456).

There is no package to compare with; the draws are in the repository's order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from libraries import assert_close, seeded
from torch import Tensor, nn

import fastsde
from fastsde import TraceError
from fastsde.compat.score_sde import Discretized, get_pc_sampler, get_sampling_fn

SHAPE, STEPS, EPS, SNR = (3, 2, 4, 4), 24, 1e-3, 0.16
VP, VE = fastsde.VPSDE(), fastsde.VESDE(sigma_min=0.1, sigma_max=5.0)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) * (1 + 0.1 * torch.sin(labels.float()))[:, None, None, None]


class RepositorysVP:
    """A process as the repository's users write them: for images, and with its attributes."""

    N, T = STEPS, 1

    def __init__(self) -> None:
        self.discrete_betas = torch.linspace(0.1 / STEPS, 20 / STEPS, STEPS)
        self.alphas = 1 - self.discrete_betas
        self.sqrt_1m_alphas_cumprod = torch.sqrt(1 - torch.cumprod(self.alphas, 0))

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        beta = 0.1 + t * 19.9
        return -0.5 * beta[:, None, None, None] * x, beta.sqrt()

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        log_mean = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
        return torch.exp(log_mean[:, None, None, None]) * x, torch.sqrt(1 - torch.exp(2 * log_mean))

    def prior_sampling(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(*shape)

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        beta = self.discrete_betas.to(x.device)[(t * (self.N - 1) / self.T).long()]
        return torch.sqrt(1 - beta)[:, None, None, None] * x - x, torch.sqrt(beta)


class Numbers:
    """What the algorithms need at a time, as numbers."""

    def __init__(self, is_vp: bool, t: float, continuous: bool) -> None:
        self.i = int(t * (STEPS - 1))
        if is_vp:
            betas = [(0.1 + (20 - 0.1) * k / (STEPS - 1)) / STEPS for k in range(STEPS)]
            self.drift, self.squared = -0.5 * (0.1 + 19.9 * t), 0.1 + 19.9 * t
            self.std = math.sqrt(1 - math.exp(-(0.1 * t + 0.5 * 19.9 * t**2)))
            self.beta, self.keep = betas[self.i], math.sqrt(1 - betas[self.i])
            self.alpha, self.step = 1 - self.beta, self.beta
            products = math.prod(1 - beta for beta in betas[: int(t * (STEPS - 1)) + 1])
            self.label = t * 999 if continuous else t * (STEPS - 1)
            self.scale = -1 / (self.std if continuous else math.sqrt(1 - products))
        else:
            sigmas = [0.1 * 50 ** (k / (STEPS - 1)) for k in range(STEPS)]
            self.std, self.drift = 0.1 * 50**t, 0.0
            self.squared, self.keep, self.alpha, self.scale = self.std**2 * 2 * math.log(50), 1.0, 1.0, 1.0
            now, before = sigmas[self.i], sigmas[self.i - 1] if self.i else 0.0
            self.step, self.ancestral = now**2 - before**2, before * math.sqrt(now**2 - before**2) / now
            self.label = self.std if continuous else round((1 - t) * (STEPS - 1))


def reference(predictor: str, corrector: str, is_vp: bool, flow: bool, continuous: bool) -> Callable[..., Tensor]:
    def loop(net: nn.Module) -> Tensor:
        x = mean = torch.randn(SHAPE) * (1.0 if is_vp else 5.0)
        for t in torch.linspace(1, EPS, STEPS).tolist():
            at = Numbers(is_vp, t, continuous)
            labels = torch.full(SHAPE[:1], at.label)

            def score(x: Tensor, at: Numbers = at, labels: Tensor = labels) -> Tensor:
                return at.scale * net(x, labels)

            for _ in range(corrector != "none"):
                slope, z = score(x), torch.randn(SHAPE)
                ratio = SNR * at.std
                if corrector == "langevin":
                    ratio = SNR * z.flatten(1).norm(dim=1).mean() / slope.flatten(1).norm(dim=1).mean()
                size = ratio**2 * 2 * at.alpha
                x = x + size * slope + math.sqrt(2 * size) * z
            share, s = (0.5 if flow else 1.0), score(x)
            z = 0.0 * torch.randn(SHAPE) if flow else torch.randn(SHAPE)
            if predictor == "euler_maruyama":
                mean = x - (at.drift * x - share * at.squared * s) / STEPS
                x = mean + math.sqrt(at.squared / STEPS) * z
            elif predictor == "reverse_diffusion":
                mean = (2 - at.keep) * x + share * at.step * s
                x = mean + math.sqrt(at.step) * z
            else:
                mean = (x + at.step * s) / at.keep
                x = mean + (math.sqrt(at.step) if is_vp else at.ancestral) * z
        return mean

    return torch.no_grad()(loop)


PREDICTORS = ("euler_maruyama", "reverse_diffusion", "ancestral_sampling")
CASES = [
    *itertools.product(PREDICTORS, ("none", "ald"), ("vp", "ve"), (False,), (True,)),
    *itertools.product(PREDICTORS[:2], ("none",), ("vp", "ve"), (True,), (True,)),
    *itertools.product(PREDICTORS[1:], ("langevin",), ("vp", "ve"), (False,), (False,)),
]


@pytest.mark.parametrize(
    ("predictor", "corrector", "kind", "flow", "continuous"),
    [pytest.param(*case, marks=[pytest.mark.slow] if case[2] == "vp" else []) for case in CASES],
)
def test_samplers_are_the_papers(predictor: str, corrector: str, kind: str, flow: bool, continuous: bool) -> None:
    net = Network()
    theirs = seeded(reference(predictor, corrector, kind == "vp", flow, continuous), net)
    for sde in (Discretized(VP if kind == "vp" else VE, STEPS), *([RepositorysVP()] if kind == "vp" else [])):
        sampler = get_pc_sampler(
            sde, SHAPE, predictor, corrector, None, SNR, 1, flow, continuous, eps=EPS, noise="torch",
            replay=corrector == "langevin",
        )  # fmt: skip
        ours, calls = seeded(sampler, net)
        assert_close(ours, theirs, 2e-4)  # 1 / std in fp32, next to numbers of Python
        assert calls == STEPS * 2
        assert corrector == "langevin" or sampler.loop.traced.table is not None


@pytest.mark.parametrize("sde", [fastsde.SubVPSDE(), fastsde.CosineVPSDE()], ids=["sub_vp", "cosine"])
def test_other_processes(sde: Any) -> None:
    sampler = get_pc_sampler(Discretized(sde, STEPS), SHAPE, "reverse_diffusion", "ald", seed=3)
    ours, _ = sampler(Network())
    assert torch.isfinite(ours).all()
    assert sampler.loop.traced.slots == 1


def test_a_configuration_and_a_seed() -> None:
    config = SimpleNamespace(
        sampling=SimpleNamespace(
            method="pc", predictor="ancestral_sampling", corrector="none", snr=SNR, n_steps_each=1,
            probability_flow=False, noise_removal=False,
        ),
        training=SimpleNamespace(continuous=True),
        device="cpu",
    )  # fmt: skip
    net, sde = Network(), Discretized(VP, STEPS)
    samplers = [get_sampling_fn(config, sde, SHAPE, lambda x: (x + 1) / 2, EPS, seed=seed) for seed in (7, 7, 8)]
    first, again, other = (sampler(net)[0] for sampler in samplers)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    plain = get_pc_sampler(sde, SHAPE, "ancestral_sampling", denoise=False, eps=EPS, seed=7)
    assert torch.equal(plain(net)[0].add(1).div(2), first)
    config.sampling.method = "ode"
    with pytest.raises(ValueError, match="method must be 'pc', got 'ode'"):
        get_sampling_fn(config, sde, SHAPE, lambda x: x, EPS)


def test_what_is_no_table_is_refused() -> None:
    sde = Discretized(VP, STEPS)
    with pytest.raises(TraceError, match="replay"):
        get_pc_sampler(sde, SHAPE, "euler_maruyama", "langevin")(Network())
    with pytest.raises(ValueError, match="ancestral_sampling needs a VP or VE process"):
        get_pc_sampler(Discretized(fastsde.SubVPSDE(), STEPS), SHAPE, "ancestral_sampling")
    with pytest.raises(ValueError, match="corrector must be one of langevin, ald, none, got 'mala'"):
        get_pc_sampler(sde, SHAPE, corrector="mala")
