"""Networks that papers and tutorials write out, each written anew in the shape that its users know."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastsde import models
from fastsde.networks import FiLM, Residual
from fastsde.sde import EDM

from ..tasks.mlps import ACTIONS, OBSERVED, Joined, Policy
from .case import Called, Case

TITLE, PACKAGES = "Written out in examples", ()


class Columns(nn.Module):
    """An MLP of x and t as columns, with any activation: torchcfm's and flow_matching's examples."""

    def __init__(self, width: int, activation: Callable[[], nn.Module], hidden: int = 3, dim: int = 2) -> None:
        super().__init__()
        inner = [layer for _ in range(hidden - 1) for layer in (nn.Linear(width, width), activation())]
        self.net = nn.Sequential(nn.Linear(dim + 1, width), activation(), *inner, nn.Linear(width, dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        f: Tensor = self.net(torch.cat((x, t.reshape(-1, 1).expand(len(x), 1)), -1))
        return f


class Fourier(nn.Module):
    """Random Fourier features of t, added after each layer, and a division by sigma: Song's toy score network."""

    def __init__(self, dim: int = 2, width: int = 128) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(30 * torch.randn(width // 2), requires_grad=False)
        self.embed, self.first, self.last = nn.Linear(width, width), nn.Linear(dim, width), nn.Linear(width, dim)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.dense = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = 2 * torch.pi * t[:, None] * self.frequencies[None, :]
        e = nn.functional.silu(self.embed(torch.cat((angles.sin(), angles.cos()), -1)))
        h = self.first(x)
        for layer, dense in zip(self.inner, self.dense, strict=True):
            h = nn.functional.silu(layer(h) + dense(e))
        sigma = ((25.0 ** (2 * t) - 1) / (2 * torch.log(torch.tensor(25.0)))).sqrt()
        f: Tensor = self.last(h) / sigma[:, None]
        return f


class Attention(nn.Module):
    """A token for each coordinate, and one layer of self-attention."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, width), nn.Linear(width, 1)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(torch.stack((x, t[:, None].expand_as(x)), -1))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        f: Tensor = self.last(h).squeeze(-1)
        return f


def cases() -> list[Case]:
    return [
        Case("SDE tutorial, MLP of the swiss roll", lambda: Called(models.MLP(), (2,))),
        Case("SDE tutorial, U-Net of MNIST", lambda: Called(models.UNet(), (1, 28, 28))),
        Case("tiny-diffusion, residual MLP with embeddings", lambda: Called(Residual(), (2,))),
        Case("torchcfm's examples, MLP with SELU", lambda: Called(Columns(64, nn.SELU), (2,))),
        Case("flow_matching's examples, MLP with SiLU", lambda: Called(Columns(512, nn.SiLU, 4), (2,))),
        Case("rectified flow's toy, MLP with Tanh", lambda: Called(Columns(100, nn.Tanh, 2), (2,))),
        Case("score_sde's toy, MLP with Fourier features", lambda: Called(Fourier(), (2,))),
        Case("MLP with FiLM, LayerNorm and a condition", lambda: Called(FiLM(), (3,), conditions=(torch.randn(2, 2),))),
        Case("diffusion policy, MLP with Mish", _policy),
        Case("EDM's preconditioning of an MLP", _preconditioned),
        Case("a token a coordinate, self-attention", lambda: Called(Attention(), (4,))),
    ]


def _policy() -> Called:
    """The policy, whose times are integers."""
    policy = Policy()
    observed = torch.randn(2, OBSERVED)
    return Called(policy, ACTIONS, lambda x, t, given: policy(x, t.long(), given), (observed,))


def _preconditioned() -> Called:
    return Called(models.Preconditioned(Joined(2, (64, 64)), EDM(), 0.5), (2,))
