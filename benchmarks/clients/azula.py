"""azula: its samplers, called as they are, with the denoiser and the noise schedules that it offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from azula import denoise, noise, sample
from azula.guidance import cfg, dps, repaint

from .case import SHAPE, Case, Loop, StandIn, start

TITLE, PACKAGES = "azula", ("azula",)

STEPS = 10

# The sampler without its suffix, its options, and the schedule without its suffix.
SAMPLERS: list[tuple[str, dict[str, Any], str]] = [
    ("DDPM", {}, "VP"),
    ("DDPM", {}, "Cosine"),
    ("DDIM", {}, "VP"),
    ("DDIM", {"eta": 0.7}, "VP"),
    ("Euler", {}, "Rectified"),
    ("Euler", {}, "VE"),
    ("Heun", {}, "Rectified"),
    ("Heun", {}, "Decay"),
    ("Ito", {}, "VP"),
    ("Ito", {"eta": 0.5, "temperature": 0.9}, "VP"),
    ("zAB", {"order": 3}, "VP"),
    ("vAB", {"order": 2}, "Rectified"),
    ("zEAB", {"order": 3}, "VP"),
    ("xEAB", {"order": 3}, "VP"),
    ("REAB", {"order": 2}, "VP"),
    ("PC", {"corrections": 2, "delta": 0.05}, "VP"),
]


def denoiser_of(network: StandIn, schedule: str = "VP", wrapper: str = "Karras") -> Any:
    return getattr(denoise, f"{wrapper}Denoiser")(network, getattr(noise, f"{schedule}Schedule")())


def sampler(name: str, options: dict[str, Any], schedule: str, wrapper: str = "Karras") -> Case:
    """Returns the case of ``sampler(x)``, where x is what ``sampler.init`` draws."""

    def make(dtype: torch.dtype) -> Loop:
        network = StandIn().to(dtype)
        denoiser = denoiser_of(network, schedule, wrapper)
        loop = getattr(sample, f"{name}Sampler")(denoiser, steps=STEPS, silent=True, **options)
        return Loop(loop, (start(dtype),), modules=(network,), state="x")

    label = ", ".join(f"{key}={value}" for key, value in options.items())
    wrapping = "" if wrapper == "Karras" else f", {wrapper}Denoiser"
    return Case(f"{name} {label}".rstrip() + f" ({schedule}{wrapping})", make)


def from_init() -> Case:
    """Returns the case of a whole use: the sampler draws its own start."""

    def make(dtype: torch.dtype) -> Loop:
        network = StandIn().to(dtype)
        ddpm = sample.DDPMSampler(denoiser_of(network), steps=STEPS, silent=True)

        def loop() -> Any:
            return ddpm(ddpm.init(SHAPE, mean=torch.tensor(0.1), var=torch.tensor(0.5)))

        return Loop(loop, modules=(network,))

    return Case("DDPM, with its init", make)


def guided() -> Case:
    """Returns the case of classifier-free guidance, for a network with labels."""

    def make(dtype: torch.dtype) -> Loop:
        network = StandIn().to(dtype)
        denoiser = cfg.CFGDenoiser(denoiser_of(network))
        ddim = sample.DDIMSampler(denoiser, steps=STEPS, silent=True)

        def loop(x: torch.Tensor) -> Any:
            return ddim(x, positive={"y": torch.tensor([1.0, 2.0])}, negative={"y": torch.zeros(2)}, guidance=1.5)

        return Loop(loop, (start(dtype),), modules=(network,), state="x")

    return Case("DDIM, classifier-free guidance", make)


def conditional(name: str, build: Callable[[Any, torch.Tensor], Any]) -> Case:
    """Returns the case of a sampler that is given an observation."""

    def make(dtype: torch.dtype) -> Loop:
        network = StandIn().to(dtype)
        observed = start(torch.float32, scale=0.5)
        return Loop(build(denoiser_of(network), observed), (start(dtype),), modules=(network,), state="x")

    return Case(name, make)


def repainting(denoiser: Any, observed: torch.Tensor) -> Any:
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[..., 2:] = False
    return repaint.RePaintSampler(denoiser, observed, mask, iterations=2, steps=STEPS, silent=True)


def by_gradients(denoiser: Any, observed: torch.Tensor) -> Any:
    return dps.DPSSampler(denoiser, observed, lambda x: x, steps=STEPS, silent=True)


def cases() -> list[Case]:
    return [
        *(sampler(*one) for one in SAMPLERS),
        sampler("DDIM", {}, "VP", wrapper="Simple"),
        from_init(),
        guided(),
        conditional("RePaint (mask per element)", repainting),
        conditional("DPS, by gradients through the network", by_gradients),
    ]
