"""denoising-diffusion-pytorch: the ``sample`` methods of its diffusions, whose network is the stand-in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import denoising_diffusion_pytorch as ddp
import torch
from denoising_diffusion_pytorch import classifier_free_guidance, repaint, simple_diffusion
from torch import Tensor, nn

from .case import SHAPE, Case, LearnedVariance, StandIn, held

TITLE, PACKAGES = "denoising-diffusion-pytorch", ("denoising-diffusion-pytorch",)

Build = Callable[[Any], Callable[..., Any]]


class Unet(StandIn):
    """Has the attributes by which the diffusions know a U-Net of theirs."""

    channels = out_dim = 3
    self_condition = False
    random_or_learned_sinusoidal_cond = False


class ContinuousUnet(Unet):
    random_or_learned_sinusoidal_cond = True


class SelfConditioned(Unet):
    """Starts without a condition."""

    self_condition = True

    def forward(self, x: Tensor, t: Any = 0.0, *more: Any, **named: Any) -> Tensor:
        condition = more[0] if more and more[0] is not None else torch.zeros_like(x)
        return super().forward(x, t, condition)


class SelfConditionedContinuous(SelfConditioned):
    random_or_learned_sinusoidal_cond = True


class LearnedUnet(LearnedVariance, Unet):
    out_dim = 6


class GuidedUnet(Unet):
    """Runs twice a step, with labels and without."""

    def forward_with_cond_scale(
        self, x: Tensor, t: Tensor, classes: Tensor, cond_scale: float, rescaled_phi: float
    ) -> tuple[Tensor, Tensor]:
        labelled, free = self(x, t, classes.float()), self(x, t)
        return free + (labelled - free) * cond_scale, free


def gaussian(*, keep: bool = False, **options: Any) -> Build:
    """Returns what builds the sampler of 20 steps of `GaussianDiffusion`."""

    def build(net: nn.Module) -> Callable[..., Any]:
        diffusion = ddp.GaussianDiffusion(net, image_size=4, timesteps=20, **options)
        return partial(diffusion.sample, SHAPE[0], return_all_timesteps=keep)

    return build


def of(cls: Any, *, method: str = "sample", call: dict[str, Any] | None = None, **options: Any) -> Build:
    """Returns what builds the sampler of another diffusion."""

    def build(net: nn.Module) -> Callable[..., Any]:
        return partial(getattr(cls(net, image_size=4, **options), method), batch_size=SHAPE[0], **(call or {}))

    return build


def repainted(net: nn.Module) -> Callable[..., Any]:
    mask = torch.ones(SHAPE)
    mask[..., 2:] = 0
    known = torch.linspace(0, 1, 96).reshape(SHAPE)
    diffusion = repaint.GaussianDiffusion(net, image_size=4, timesteps=12)
    return partial(diffusion.sample, gt=known, mask=mask, resample_iter=2, resample_jump=3, resample_every=5)


def guided(**options: Any) -> Build:
    def build(net: nn.Module) -> Callable[..., Any]:
        diffusion = classifier_free_guidance.GaussianDiffusion(net, image_size=4, timesteps=20, **options)
        return partial(diffusion.sample, torch.tensor([1, 3]), cond_scale=3.0)

    return build


def one_dimensional(net: nn.Module) -> Callable[..., Any]:
    return partial(ddp.GaussianDiffusion1D(net, seq_length=8, timesteps=20).sample, batch_size=2)


def cases() -> list[Case]:
    ddim: dict[str, Any] = {"sampling_timesteps": 10}
    continuous: dict[str, Any] = {"num_sample_steps": 12}
    return [
        *(held(f"GaussianDiffusion {kind}", gaussian(objective=kind), Unet) for kind in ("pred_noise", "pred_x0")),
        held("GaussianDiffusion pred_v, sigmoid", gaussian(), Unet),
        held("GaussianDiffusion cosine, all states", gaussian(beta_schedule="cosine", keep=True), Unet),
        held("GaussianDiffusion, self-conditioned", gaussian(), SelfConditioned),
        held("GaussianDiffusion DDIM", gaussian(objective="pred_noise", **ddim), Unet),
        held("GaussianDiffusion DDIM, eta=0.7", gaussian(ddim_sampling_eta=0.7, **ddim), Unet),
        held("GaussianDiffusion DDIM, self-conditioned", gaussian(**ddim), SelfConditioned),
        held("GaussianDiffusion1D", one_dimensional, Unet),
        held(
            "LearnedGaussianDiffusion",
            of(ddp.LearnedGaussianDiffusion, timesteps=20, objective="pred_noise"),
            LearnedUnet,
        ),
        held("ContinuousTimeGaussianDiffusion", of(ddp.ContinuousTimeGaussianDiffusion, **continuous), ContinuousUnet),
        held(
            "ContinuousTimeGaussianDiffusion, not clipped",
            of(ddp.ContinuousTimeGaussianDiffusion, clip_sample_denoised=False, noise_schedule="cosine", **continuous),
            ContinuousUnet,
        ),
        held(
            "VParamContinuousTimeGaussianDiffusion",
            of(ddp.VParamContinuousTimeGaussianDiffusion, **continuous),
            ContinuousUnet,
        ),
        held("ElucidatedDiffusion", of(ddp.ElucidatedDiffusion, **continuous), ContinuousUnet),
        held(
            "ElucidatedDiffusion, not clamped",
            of(ddp.ElucidatedDiffusion, call={"clamp": False}, S_churn=0, **continuous),
            ContinuousUnet,
        ),
        held(
            "ElucidatedDiffusion, self-conditioned",
            of(ddp.ElucidatedDiffusion, **continuous),
            SelfConditionedContinuous,
        ),
        held(
            "ElucidatedDiffusion, DPM-Solver++",
            of(ddp.ElucidatedDiffusion, method="sample_using_dpmpp", **continuous),
            ContinuousUnet,
        ),
        held("simple diffusion, v", of(simple_diffusion.GaussianDiffusion, **continuous), Unet),
        held("RePaint (mask per element)", repainted, Unet),
        held("classifier-free guidance", guided(), GuidedUnet),
        held("classifier-free guidance, DDIM", guided(**ddim), GuidedUnet),
    ]
