"""Loops as people write them themselves: six Euler steps of a flow, and what is often done to the state in between."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .case import SHAPE, Case, Loop, StandIn, case

TITLE, PACKAGES = "own loop", ()

TIMES = torch.linspace(1, 0, 7)
LABELS = torch.tensor([1.0, 3.0])

Network = Callable[..., Tensor]


def euler(
    between: Callable[[Tensor, Tensor], Any] | None = None, noise: Callable[[Tensor], Any] = torch.randn_like
) -> Callable[[Network], Tensor]:
    """Returns the loop; ``between(x, t)`` returns the next state, or None to stop."""

    def loop(net: Network) -> Tensor:
        x = torch.randn(SHAPE)
        for t, after in pairwise(TIMES):
            x = x + (after - t) * net(x, t) + 0.1 * noise(x)
            if between is not None:
                y = between(x, t)
                if y is None:
                    break
                x = y
        return x

    return loop


def predicting(predict: Callable[[Network, Tensor, Tensor], Tensor]) -> Callable[[Network], Tensor]:
    """Returns the loop in which ``predict(net, x, t)`` makes one prediction of one call of the network or of more."""

    def loop(net: Network) -> Tensor:
        x = torch.randn(SHAPE)
        for t, after in pairwise(TIMES):
            x = x + (after - t) * predict(net, x, t)
        return x

    return loop


def one_batch(net: Network, x: Tensor, t: Tensor, *, rescale: float = 0.0) -> Tensor:
    """Guides, and rescales as Lin et al. 2023 do, arXiv:2305.08891: to the spread of the labelled prediction."""
    free, labelled = net(torch.cat([x] * 2), t, torch.cat([torch.zeros(2), LABELS])).chunk(2)
    guided = free + 3.0 * (labelled - free)
    if not rescale:
        return guided
    dims = (1, 2, 3)
    factor = labelled.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return rescale * guided * factor + (1 - rescale) * guided


def two_calls(net: Network, x: Tensor, t: Tensor) -> Tensor:
    free, labelled = net(x, t, torch.zeros(2)), net(x, t, LABELS)
    return free + 3.0 * (labelled - free)


def time_as_channel(net: Network, x: Tensor, t: Tensor) -> Tensor:
    return net(torch.cat([x, t.expand(len(x), 1, *x.shape[2:])], 1))[:, :3]


def autocast(net: Network, x: Tensor, t: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return net(x, t)


def gradient(net: Network, x: Tensor, t: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        f = net(x, t)
        (slope,) = torch.autograd.grad(f.square().sum(), x)
    return f + 0.1 * slope


def in_place(net: Network) -> Tensor:
    x = torch.randn(SHAPE)
    for t, after in pairwise(TIMES):
        x += (after - t) * net(x, t)
        x.mul_(0.98).add_(torch.randn_like(x), alpha=0.1)
    return x


def list_of_states(net: Network) -> list[Tensor]:
    states = [torch.randn(SHAPE)]
    for t, after in pairwise(TIMES):
        states.append(states[-1] + (after - t) * net(states[-1], t))
    return states


def buffer_of_states(net: Network) -> Tensor:
    x = torch.randn(SHAPE)
    states = x.new_empty(len(TIMES), *SHAPE)
    states[0] = x
    for i, (t, after) in enumerate(pairwise(TIMES)):
        states[i + 1] = states[i] + (after - t) * net(states[i], t)
    return states


def logs_norms(net: Network) -> Tensor:
    norms = []
    x = torch.randn(SHAPE)
    for t, after in pairwise(TIMES):
        x = x + (after - t) * net(x, t)
        norms.append(x.flatten(1).norm(dim=1))
    return x


def inpainting(x: Tensor, t: Tensor) -> Tensor:
    mask = torch.ones(SHAPE)
    mask[..., 2:] = 0
    known = torch.linspace(-1, 1, 96).reshape(SHAPE)
    return mask * ((1 - t) * known + t * torch.randn_like(x)) + (1 - mask) * x


def inpainting_by_index(x: Tensor, t: Tensor) -> Tensor:
    x[:, :, :2] = (1 - t) * torch.linspace(-1, 1, 48).reshape(2, 3, 2, 4)
    return x


def by_percentile(x: Tensor, t: Tensor) -> Tensor:
    """Clamps as Saharia et al. 2022 do, arXiv:2205.11487."""
    bound = torch.quantile(x.abs().flatten(1), 0.95, dim=1).clamp(min=1.0)[:, None, None, None]
    return x.clamp(-bound, bound) / bound


def mixed_channels(x: Tensor, t: Tensor) -> Tensor:
    matrix = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.9, 0.1], [0.1, 0.0, 0.9]], dtype=x.dtype)
    return torch.einsum("ij,bjhw->bihw", matrix, x)


def latents() -> Case:
    """Returns the case of latent diffusion: guidance in one batch, and a decoder at the end."""

    class Decoder(StandIn):
        def forward(self, x: Tensor, t: Any = 0.0, *more: Any, **named: Any) -> Tensor:
            return super().forward(x).repeat_interleave(2, -1).repeat_interleave(2, -2)

    def make(dtype: torch.dtype) -> Loop:
        net, decoder = StandIn(), Decoder()

        def loop() -> Tensor:
            z = predicting(one_batch)(net)
            return (decoder(z / 0.18215) / 2 + 0.5).clamp(0, 1)

        return Loop(loop, modules=(net, decoder))

    return Case("latent diffusion with guidance, two networks", make)


def cases() -> list[Case]:
    return [
        case("plain", euler()),
        case("under no_grad", torch.no_grad()(euler())),
        case("in place", in_place),
        case("list of states", list_of_states),
        case("buffer of states", buffer_of_states),
        case("logs a norm", logs_norms),
        case("empty().normal_()", euler(noise=lambda x: torch.empty(SHAPE).normal_())),
        case("guidance, one batch", predicting(one_batch)),
        case("guidance, two calls", predicting(two_calls)),
        case("guidance, rescaled", predicting(partial(one_batch, rescale=0.7))),
        case("time as a channel", predicting(time_as_channel)),
        case("autocast", predicting(autocast)),
        latents(),
        case("inpainting mask", euler(inpainting)),
        case("inpainting by index", euler(inpainting_by_index)),
        case("flips the image", euler(lambda x, t: x.flip(-1))),
        case("channel mixing 3 x 3", euler(mixed_channels)),
        case("clamp by percentile", euler(by_percentile)),
        case("x ** 2", euler(lambda x, t: x - 0.01 * x**2)),
        case("stops on a value", euler(lambda x, t: None if x.norm() < 1 else x)),
        case("a gradient", predicting(gradient)),
        case("uniform noise", euler(noise=lambda x: torch.rand_like(x) - 0.5)),
        case("noise by numpy", euler(noise=lambda x: torch.from_numpy(np.random.randn(*SHAPE)).to(x.dtype))),  # noqa: NPY002
    ]
