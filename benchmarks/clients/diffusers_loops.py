"""The loops of diffusers' schedulers that are not stepped as the others are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import schedulers
from torch import Tensor

from .case import SHAPE

Network = Callable[..., Tensor]
Run = Callable[[Network], Tensor]
LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def score_ve(correct: bool) -> Run:
    scheduler = diffusers.ScoreSdeVeScheduler(num_train_timesteps=12, correct_steps=1)

    def loop(net: Network) -> Tensor:
        scheduler.set_timesteps(12)
        scheduler.set_sigmas(12)
        x: Tensor = torch.randn(SHAPE) * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            sigma = scheduler.sigmas[i] * torch.ones(SHAPE[0])
            if correct:
                x = scheduler.step_correct(net(x, sigma), x).prev_sample
            x = scheduler.step_pred(net(x, sigma), t, x).prev_sample
        return x

    return loop


def score_vp() -> Run:
    from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler

    scheduler = ScoreSdeVpScheduler()

    def loop(net: Network) -> Tensor:
        scheduler.set_timesteps(12)
        x: Tensor = torch.randn(SHAPE)
        for t in scheduler.timesteps:
            x, _ = scheduler.step_pred(net(x, t * torch.ones(SHAPE[0])), x, t)
        return x

    return loop


def karras_ve() -> Run:
    from diffusers.schedulers.deprecated.scheduling_karras_ve import KarrasVeScheduler

    scheduler = KarrasVeScheduler()

    def predict(net: Network, x: Tensor, sigma: Any) -> Tensor:
        return (sigma / 2) * net((x + 1) / 2, sigma / 2)

    def loop(net: Network) -> Tensor:
        scheduler.set_timesteps(8)
        x: Tensor = torch.randn(SHAPE) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            sigma, after = scheduler.schedule[t], scheduler.schedule[t - 1] if t > 0 else 0
            noisy, raised = scheduler.add_noise_to_input(x, sigma)
            step = scheduler.step(predict(net, noisy, raised), raised, after, noisy)
            if after != 0:
                f = predict(net, step.prev_sample, after)
                step = scheduler.step_correct(f, raised, after, noisy, step.prev_sample, step["derivative"])
            x = step.prev_sample
        return x

    return loop


def repaint() -> Run:
    scheduler = schedulers.RePaintScheduler()
    image = torch.linspace(-1, 1, 96).reshape(SHAPE)[:1].expand(SHAPE)
    mask = torch.ones(SHAPE)
    mask[..., 2:] = 0

    def loop(net: Network) -> Tensor:
        scheduler.set_timesteps(10, 5, 3)
        x, last = torch.randn(SHAPE), scheduler.timesteps[0] + 1
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t), t, x, image, mask).prev_sample if t < last else scheduler.undo_step(x, last)
            last = t
        return x

    return loop


def cogvideox() -> Run:
    scheduler = schedulers.CogVideoXDPMScheduler(**LINEAR)

    def loop(net: Network) -> Tensor:
        scheduler.set_timesteps(12)
        x, old = torch.randn(SHAPE), None
        for i, t in enumerate(scheduler.timesteps):
            before = scheduler.timesteps[i - 1] if i > 0 else None
            x, old = scheduler.step(net(x, t), old, t, before, x, return_dict=False)
        return x

    return loop


def two_steps(name: str) -> Run:
    scheduler = getattr(schedulers, name)()

    def loop(net: Network) -> Tensor:
        scheduler.set_timesteps(2)
        x: Tensor = torch.randn(SHAPE) * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps[:2]:
            x = scheduler.step(net(x, t), t, x).prev_sample
        return x

    return loop


def wuerstchen() -> Run:
    scheduler = schedulers.DDPMWuerstchenScheduler()

    def loop(net: Network) -> Tensor:
        scheduler.set_timesteps(12)
        x: Tensor = torch.randn(SHAPE)
        for t in scheduler.timesteps[:-1]:
            ratio = t.expand(len(x))
            x = scheduler.step(net(x, ratio), ratio, x).prev_sample
        return x

    return loop
