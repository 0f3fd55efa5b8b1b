"""k-diffusion: its ``sample_*`` functions, called as they are, and its wrappers around networks.

The samplers that use a Brownian tree by default have it replaced (fastsde/tracing/brownian.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import k_diffusion as k
import torch
from torch import Tensor, nn

from .case import Case, Loop, StandIn, start

TITLE, PACKAGES = "k-diffusion", ("k-diffusion",)

SIGMA_MIN, SIGMA_MAX, STEPS = 0.03, 14.6, 12
CHURN = {"s_churn": 4.0, "s_noise": 1.003}

# The sampler without its prefix, and its options.
SAMPLERS: list[tuple[str, dict[str, Any]]] = [
    ("euler", {}),
    ("euler", CHURN),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.5}),
    ("heun", {}),
    ("heun", CHURN),
    ("dpm_2", {}),
    ("dpm_2", CHURN),
    ("dpm_2_ancestral", {}),
    ("lms", {}),
    ("lms", {"order": 3}),
    ("dpmpp_2s_ancestral", {}),
    ("dpmpp_sde", {}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"solver_type": "heun"}),
    ("dpmpp_3m_sde", {}),
]


def sampler(name: str, options: dict[str, Any]) -> Case:
    def make(dtype: torch.dtype) -> Loop:
        sigmas = k.sampling.get_sigmas_karras(STEPS, SIGMA_MIN, SIGMA_MAX)
        arguments = (StandIn(), start(dtype, scale=SIGMA_MAX), sigmas)
        return Loop(getattr(k.sampling, f"sample_{name}"), arguments, {"disable": True} | options, state="x")

    label = ", ".join(f"{key}={value}" for key, value in options.items())
    return Case(f"{name} {label}".rstrip(), make)


def dpm(name: str, label: str, *steps: int, **options: Any) -> Case:
    """Returns the case of a sampler that is given a range of sigmas instead of their list."""

    def make(dtype: torch.dtype) -> Loop:
        arguments = (StandIn(), start(dtype, scale=SIGMA_MAX), SIGMA_MIN, SIGMA_MAX, *steps)
        return Loop(getattr(k.sampling, f"sample_{name}"), arguments, {"disable": True} | options, state="x")

    return Case(f"{name} {label}".rstrip(), make)


def wrapped(name: str, wrap: Callable[[nn.Module], nn.Module]) -> Case:
    """Returns the case of a sampler with a denoiser that wraps the network, so that the loop holds the latter."""

    def make(dtype: torch.dtype) -> Loop:
        network = StandIn()
        denoiser = wrap(network)
        sigmas = k.sampling.get_sigmas_karras(STEPS, SIGMA_MIN, SIGMA_MAX)

        def loop(x: Tensor) -> Any:
            return k.sampling.sample_dpmpp_2m(denoiser, x, sigmas, disable=True)

        return Loop(loop, (start(dtype, scale=SIGMA_MAX),), modules=(network,), state="x")

    return Case(f"dpmpp_2m with {name}", make)


def with_callback() -> Case:
    def make(dtype: torch.dtype) -> Loop:
        def loop(model: nn.Module, x: Tensor, sigmas: Tensor) -> list[Tensor]:
            kept: list[Tensor] = []
            k.sampling.sample_heun(model, x, sigmas, callback=lambda d: kept.append(d["denoised"]), disable=True)
            return kept

        sigmas = k.sampling.get_sigmas_karras(STEPS, SIGMA_MIN, SIGMA_MAX)
        return Loop(loop, (StandIn(), start(dtype, scale=SIGMA_MAX), sigmas), state="x")

    return Case("heun, a callback that keeps what is denoised", make)


def cases() -> list[Case]:
    cumulated = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    return [
        *(sampler(name, options) for name, options in SAMPLERS),
        dpm("dpm_fast", "", 14),
        dpm("dpm_fast", "eta=1.0", 14, eta=1.0),
        dpm("dpm_adaptive", ""),
        wrapped("DiscreteEpsDDPMDenoiser", lambda net: k.external.DiscreteEpsDDPMDenoiser(net, cumulated, False)),
        wrapped("VDenoiser", k.external.VDenoiser),
        with_callback(),
    ]
