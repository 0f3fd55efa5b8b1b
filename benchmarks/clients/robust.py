"""What else a loop may do in a step, from PyTorch's own tools to reading the state on the host."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .case import SHAPE, Case, Loop, StandIn, case

TITLE, PACKAGES = "own loop, rarer things", ()

TIMES = torch.linspace(1, 0, 6)

Network = Callable[..., Tensor]
Step = Callable[[Tensor, Tensor, float], Any]


def plain(x: Tensor, f: Tensor, size: float) -> Tensor:
    return x + size * f + 0.1 * torch.randn_like(x)


def loop_of(step: Step = plain, dtype: torch.dtype | None = None) -> Callable[[Network], Tensor]:
    """Returns five steps of ``step(x, f, size)``."""

    def loop(net: Network) -> Tensor:
        x = torch.randn(SHAPE, dtype=dtype)
        for t, after in pairwise(TIMES):
            x = step(x, net(x, t), float(after - t))
        return x

    return loop


def then(change: Callable[[Tensor], Any]) -> Callable[[Network], Tensor]:
    """Returns the loop in which something is done to the state after each step."""
    return loop_of(lambda x, f, size: change(plain(x, f, size)))


def reading(read: Callable[[Tensor], Any]) -> Callable[[Network], Tensor]:
    """Returns the loop in which the state is read after each step, and goes on as it is."""

    def step(x: Tensor, f: Tensor, size: float) -> Tensor:
        x = plain(x, f, size)
        read(x)
        return x

    return loop_of(step)


def by_distribution(validate: bool) -> Step:
    def step(x: Tensor, f: Tensor, size: float) -> Tensor:
        normal = torch.distributions.Normal(x + size * f, torch.full(SHAPE, 0.1), validate_args=validate)
        drawn: Tensor = normal.sample()
        return drawn

    return step


def by_generator(x: Tensor, f: Tensor, size: float) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return x + size * f + 0.1 * torch.randn(SHAPE, generator=generator, dtype=x.dtype)


def one_generator(net: Network) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SHAPE, generator=generator)
    for t, after in pairwise(TIMES):
        x = x + (after - t) * net(x, t) + 0.1 * torch.randn(SHAPE, generator=generator)
    return x


def foreach(x: Tensor, f: Tensor, size: float) -> Tensor:
    (scaled,) = torch._foreach_mul([f], size)
    moved: Tensor = torch._foreach_add([x], [scaled])[0]
    return moved


def output_in_place(x: Tensor, f: Tensor, size: float) -> Tensor:
    f.mul_(size).add_(x)
    f.clamp_(-3.0, 3.0).add_(0.01)
    return f


def through_a_view(x: Tensor, f: Tensor, size: float) -> Tensor:
    x = x + size * f
    x[:, 0].mul_(0.5)
    x.view(len(x), -1)[:, -4:] += 1.0
    return x


def rearranged(x: Tensor, f: Tensor, size: float) -> Tensor:
    from einops import rearrange

    flat = rearrange(x, "b c h w -> b (h w) c") + size * rearrange(f, "b c h w -> b (h w) c")
    return rearrange(flat, "b (h w) c -> b c h w", h=4)


def weighted(x: Tensor, f: Tensor, size: float) -> Tensor:
    weights = torch.tensor([0.5, 1.5])[:, None, None, None]
    return x + size * weights * f


def to_zero(x: Tensor) -> Tensor:
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[..., 0] = True
    x[mask] = 0
    return x


def with_out(x: Tensor, f: Tensor, size: float) -> Tensor:
    out = torch.empty(SHAPE)
    torch.add(x, f, alpha=size, out=out)
    return out


def half(net: Network) -> Tensor:
    x = torch.randn(SHAPE).to(torch.bfloat16)
    for t, after in pairwise(TIMES):
        x = (x + (after - t) * net(x, t)).to(torch.bfloat16)
    return x


def inference(net: Network) -> Tensor:
    with torch.inference_mode():
        return loop_of()(net)


def grad_enabled(net: Network) -> Tensor:
    with torch.enable_grad():
        return loop_of()(net)


def postfix(net: Network) -> Tensor:
    x = torch.randn(SHAPE)
    bar = tqdm(list(pairwise(TIMES)), disable=True)
    for t, after in bar:
        x = plain(x, net(x, t), float(after - t))
        bar.set_postfix(mean=f"{x.mean():.3f}")
    return x


def scripted() -> Callable[[Network], Tensor]:
    def advance(x: Tensor, f: Tensor, size: float) -> Tensor:
        return x + size * f

    return loop_of(torch.jit.script(advance))


def compiled() -> Callable[[Network], Tensor]:
    return loop_of(torch.compile(lambda x, f, size: x + size * f, backend="eager"))


def not_reset() -> Case:
    """Returns the case of a scheduler that keeps its last prediction from one run to the next."""
    kept: list[Tensor] = []

    def step(x: Tensor, f: Tensor, size: float) -> Tensor:
        before = kept.pop() if kept else f
        kept.append(f)
        return x + size * (1.5 * f - 0.5 * before)

    return Case("a scheduler not reset", lambda dtype: Loop(loop_of(step), (StandIn(),)))


def cases() -> list[Case]:
    return [
        case("x.clone() a step", then(torch.clone)),
        case("float64 state", loop_of(dtype=torch.float64)),
        case("bfloat16 state", half),
        case("generator argument", one_generator),
        case("a generator reseeded in each step", loop_of(by_generator)),
        case("distributions.Normal", loop_of(by_distribution(False))),
        case("distributions.Normal, validated", loop_of(by_distribution(True))),
        case("enable_grad", grad_enabled),
        case("inference_mode inside", inference),
        case("in place on the network's output", loop_of(output_in_place)),
        case("in place through a view", loop_of(through_a_view)),
        case("torch.add(out=)", loop_of(with_out)),
        case("x[mask] = 0", then(to_zero)),
        case("per-sample weights", loop_of(weighted)),
        *([case("einops/rearrange there and back", loop_of(rearranged))] if find_spec("einops") else []),
        case("vmap over the batch", loop_of(lambda x, f, size: torch.vmap(lambda a, b: a + size * b)(x, f))),
        case("jit.script'd step", scripted()),
        case("torch.compile'd step", compiled()),
        case("foreach", loop_of(foreach)),
        case("average pooling", then(lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0))),
        case("mean subtracted", then(lambda x: x - x.mean((1, 2, 3), keepdim=True))),
        case("deepcopy of the state", then(copy.deepcopy)),
        case("x.cpu().numpy() a step", reading(lambda x: x.cpu().numpy())),
        case("x.tolist()", reading(lambda x: x.tolist())),
        case("tqdm postfix of a mean", postfix),
        case("random.random()", then(lambda x: x * (1 + 0.01 * random.random()))),
        not_reset(),
    ]
