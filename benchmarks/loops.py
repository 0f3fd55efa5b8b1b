"""Other people's loops, as their users call them, with and without `fastsde.accelerate`.

The tutorial's on the swiss roll, a DDPMPipeline of diffusers with a small U-Net, DPM-Solver++(2M) of k-diffusion with
an MLP, an NPSE posterior of sbi, DDPM of azula with an MLP, and a policy that draws actions by diffusers' DDPM. Where
the network takes nearly all of the time, there is little to gain: its share is measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastsde import checkpoints
from fastsde.compat import azula as compat_azula
from fastsde.compat import diffusers as compat_diffusers
from fastsde.compat import k_diffusion as compat_k_diffusion
from fastsde.compat import sbi as compat_sbi

from .clients.case import Loop
from .providers.accelerated import case, direct
from .providers.tutorial import beta_at, integral, step
from .suite.case import LOOP, Case, imported
from .suite.plan import Plan
from .tasks.loop import LoopTask
from .tasks.mlps import ACTIONS, AZULA_WORK, OBSERVED, POLICY_STEPS, POLICY_WORK, Backbone, Joined, Policy
from .tasks.networks import fixed, mlp_work

UNET_CHANNELS, UNET_SIDE = (32, 64), 32
UNET_FLOP = 452_000_000  # per image, of its convolutions without products with padding
POSTERIOR_SHAPE = (1, 3)
POSTERIOR_FLOP = 2 * (3 * 100 + 6 * 100 * 100 + 100 * 3)  # per sample, without what is the same for all samples
_DIM, _HIDDEN = 32, (128, 128)  # of the MLP for k-diffusion
_SIGMA_MIN, _SIGMA_MAX = 0.03, 14.6
_TORCH, _COMPILED = {"noise": "torch"}, {"compile": True}


def cases(plan: Plan) -> Iterator[Case]:
    """Yields the cases of each package. With --quick they have fewer samples and steps, and one size.

    All rows take the same time, so that many points of azula's run a tenth of its thousand.
    """
    if plan.tiny:
        yield from (_tutorial(plan, 5, 20), _pipeline(plan, 1, 3), _k_diffusion(plan, 5, 4))
        yield from (_posterior(plan, 5, 20), _azula(plan, 5, 20, 0.0), _policy(plan, 3))
        return
    yield _tutorial(plan, 1000, 100 if plan.quick else 999)
    yield _pipeline(plan, *((2, 5) if plan.quick else (8, 20)))
    yield _k_diffusion(plan, *((64, 10) if plan.quick else (512, 50)))
    yield _posterior(plan, *((100, 50) if plan.quick else (1000, 500)))
    for n, steps, bound in ((64, 50, 0.0),) if plan.quick else ((64, 1000, 5.0), (4096, 100, 3.5)):
        yield _azula(plan, n, steps, bound)
    for n in (1,) if plan.quick else (1, 256):
        yield _policy(plan, n)


# The tutorial -------------------------------------------------------------------------------------------------------


def generate_samples(network: nn.Module, nsamples: int, steps: int, device: torch.device | str) -> Tensor:
    """Runs the tutorial's loop, with the score from a network that predicts eps, as the shipped one does."""
    x = torch.randn((nsamples, 2), device=device)
    times = torch.linspace(1, 0, steps, device=device)
    for i in range(len(times) - 1):
        t, size = times[i].expand(nsamples, 1), times[i] - times[i + 1]
        score = -network(torch.cat((x, t), -1)).detach() / (-torch.expm1(-integral(t))).sqrt()
        x = step(x, score, beta_at(t), size)
    return x


def _tutorial(plan: Plan, n: int, rows: int) -> Case:
    def build(device: torch.device) -> Loop:
        return Loop(generate_samples, (checkpoints.load("swiss-roll", device).network.net, n, rows + 1, device))

    task = LoopTask(build, plan.device, (n, 2), rows + 1, rows)
    ways = [("", direct, {}), ("", direct, _TORCH)]
    return case(task, "tutorial", "the tutorial's loop", LOOP, ways, *mlp_work())


# diffusers ----------------------------------------------------------------------------------------------------------


def small_unet(diffusers: Any, channels: Sequence[int] = UNET_CHANNELS, side: int = UNET_SIDE) -> nn.Module:
    """Returns an untrained U-Net of diffusers without attention."""
    levels = len(channels)
    unet: nn.Module = diffusers.UNet2DModel(
        sample_size=side,
        layers_per_block=1,
        block_out_channels=tuple(channels),
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        add_attention=False,
    )
    return unet.eval()


def _pipeline(plan: Plan, n: int, steps: int) -> Case:
    def build(device: torch.device) -> Loop:
        diffusers = imported("diffusers", "diffusers")
        unet = fixed(lambda: small_unet(diffusers)).to(device)
        pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        arguments = {"batch_size": n, "num_inference_steps": steps, "output_type": "np"}
        return Loop(pipeline, kwargs=arguments, modules=(unet,))

    def whole(loop: Loop, **options: Any) -> Callable[..., Any]:
        return compat_diffusers.accelerate(loop.call, **options)

    shape = (n, 3, UNET_SIDE, UNET_SIDE)
    task = LoopTask(build, plan.device, shape, steps, steps)  # no draw in the last step
    ways = [("", whole, {}), ("", whole, _TORCH), ("", whole, _COMPILED), ("", whole, _TORCH | _COMPILED)]
    if not plan.has_gpu:
        ways.append(("", whole, {"compile": "openvino"}))
    precision = "TF32" if plan.has_gpu else "fp32"  # PyTorch's default for convolutions
    return case(task, "diffusers", "diffusers' DDPMPipeline", "DDPMPipeline", ways, UNET_FLOP, 0, precision, rounds=8)


# k-diffusion --------------------------------------------------------------------------------------------------------


def _k_diffusion(plan: Plan, n: int, steps: int) -> Case:
    def build(device: torch.device) -> Loop:
        sampling = imported("k_diffusion.sampling", "k-diffusion")
        denoiser = imported("k_diffusion.external", "k-diffusion").VDenoiser(fixed(lambda: Joined(_DIM, _HIDDEN)))
        denoiser.to(device).eval().requires_grad_(False)
        start = fixed(lambda: _SIGMA_MAX * torch.randn(n, _DIM)).to(device)
        sigmas = sampling.get_sigmas_karras(steps, _SIGMA_MIN, _SIGMA_MAX, device=device)
        arguments = {"x": start, "sigmas": sigmas, "disable": True}
        layers = denoiser.inner_model.layers
        return Loop(partial(sampling.sample_dpmpp_2m, denoiser), kwargs=arguments, modules=(layers,), state="x")

    def wrapper(loop: Loop, **options: Any) -> Callable[..., Any]:
        """The denoiser as a whole is the network."""
        (denoiser,) = loop.call.args  # type: ignore[attr-defined]
        return partial(compat_k_diffusion.accelerate(loop.call.func, **options), denoiser)  # type: ignore[attr-defined]

    task = LoopTask(build, plan.device, (n, _DIM), 0, steps)
    ways = [("", direct, {}), ("the wrapper", wrapper, {}), ("the wrapper", wrapper, _COMPILED)]
    flop, _ = mlp_work(_HIDDEN, _DIM)
    what = "k-diffusion's dpmpp_2m on an MLP"
    return case(task, "k-diffusion", what, "sample_dpmpp_2m", ways, flop, sum(_HIDDEN), rounds=30)


# sbi ----------------------------------------------------------------------------------------------------------------


def untrained_posterior(device: torch.device) -> Any:
    """Returns an NPSE posterior of three parameters with sbi's own defaults, standardised by some data."""
    factory = imported("sbi.neural_nets", "sbi")
    posteriors = imported("sbi.inference.posteriors.vector_field_posterior", "sbi")
    theta = torch.randn(500, POSTERIOR_SHAPE[-1]) * torch.tensor([0.5, 1.0, 2.0])
    x = theta[:, :2] + 0.1 * torch.randn(500, 2)
    estimator = factory.posterior_score_nn()(theta, x).to(device)
    width = torch.full(POSTERIOR_SHAPE[-1:], 1e3, device=device)  # so wide that no sample is rejected
    prior = imported("sbi.utils", "sbi").BoxUniform(-width, width, device=str(device))
    posterior = posteriors.VectorFieldPosterior(estimator, prior, sample_with="sde", device=str(device))
    return posterior.set_default_x(torch.tensor([[0.2, -0.4]], device=device))


def _posterior(plan: Plan, n: int, steps: int) -> Case:
    def build(device: torch.device) -> Loop:
        posterior = fixed(lambda: untrained_posterior(device))
        arguments = {"steps": steps, "show_progress_bars": False}
        return Loop(posterior.sample, ((n,),), arguments, (posterior.vector_field_estimator,))

    def whole(loop: Loop, **options: Any) -> Callable[..., Any]:
        sample: Callable[..., Any] = compat_sbi.accelerate(loop.call.__self__, **options).sample  # type: ignore[attr-defined]
        return sample

    task = LoopTask(build, plan.device, (n, *POSTERIOR_SHAPE), steps, steps - 1)
    ways = [("", whole, {}), ("", whole, _TORCH), ("", whole, _COMPILED)]
    rounds, bound = (10, 0.0) if plan.quick else (3, 3.0)
    what = "sbi's NPSE posterior"
    return case(task, "sbi", what, "posterior.sample", ways, POSTERIOR_FLOP, rounds=rounds, at_least=bound)


# azula --------------------------------------------------------------------------------------------------------------


def _azula(plan: Plan, n: int, steps: int, at_least: float) -> Case:
    """Returns the case of azula's first example: points of five numbers by its DDPMSampler."""

    def build(device: torch.device) -> Loop:
        denoise, noise = imported("azula.denoise", "azula"), imported("azula.noise", "azula")
        encoding = imported("azula.nn.layers", "azula").SineEncoding
        backbone = fixed(lambda: Backbone(encoding)).to(device).eval()
        denoiser = denoise.KarrasDenoiser(backbone, noise.VPSchedule()).to(device)
        sampler = imported("azula.sample", "azula").DDPMSampler(denoiser, steps=steps, silent=True, device=device)
        start = fixed(lambda: torch.randn(n, 5)).to(device)
        return Loop(sampler, kwargs={"x": start}, modules=(backbone,), state="x")

    def whole(loop: Loop, **options: Any) -> Callable[..., Any]:
        return compat_azula.accelerate(loop.call, **options)

    task = LoopTask(build, plan.device, (n, 5), steps, steps)
    ways = [("", whole, {}), ("", whole, _TORCH)]
    rounds = 10 if n < 1000 else 5
    what = "azula's DDPMSampler on an MLP"
    return case(task, f"azula-{n}", what, "DDPMSampler", ways, *AZULA_WORK, rounds=rounds, at_least=at_least)


# A policy -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_actions(network: nn.Module, scheduler: Any, observed: Tensor) -> Tensor:
    """Returns a sequence of actions for each observation."""
    actions = torch.randn(len(observed), *ACTIONS, device=observed.device)
    for t in scheduler.timesteps:
        actions = scheduler.step(network(actions, t, observed), t, actions).prev_sample
    return actions


def _policy(plan: Plan, n: int) -> Case:
    def build(device: torch.device) -> Loop:
        scheduler = imported("diffusers", "diffusers").DDPMScheduler(POLICY_STEPS)
        scheduler.set_timesteps(POLICY_STEPS, device=device)
        network = fixed(Policy).to(device).eval()
        observed = fixed(lambda: torch.randn(n, OBSERVED)).to(device)
        return Loop(draw_actions, (network, scheduler, observed))

    steps = POLICY_STEPS
    task = LoopTask(build, plan.device, (n, *ACTIONS), steps, steps)  # no draw in the last step
    ways = [("", direct, {}), ("", direct, _TORCH)]
    what = "policy by diffusers' DDPM"
    at_least = 0.0 if plan.quick else 4.0
    return case(task, f"policy-{n}", what, "the loop", ways, *POLICY_WORK, rounds=30, at_least=at_least)
