"""Networks as people write them, and the kinds of modules that they are made of."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CONDITIONED", "LOWERED", "Film", "Images", "Residual", "Sinusoidal", "tame"]


def tame(net: nn.Module) -> nn.Module:
    """Makes the last weights of a network so small that its samples do not diverge."""
    with torch.no_grad():
        for parameter in list(net.parameters())[-2:]:
            parameter.mul_(0.05)
    return net


class Sinusoidal(nn.Module):
    """Transformer's embedding (Vaswani et al. 2017) of a number per sample."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.width, self.scale = width, scale

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        frequencies = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, dtype=torch.float32))
        angles = (t * self.scale).unsqueeze(-1) * frequencies.unsqueeze(0)
        return torch.cat((angles.sin(), angles.cos()), -1)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(width, width), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.layer(x))


class Residual(nn.Module):
    """tiny-diffusion's shape: embeddings of t and of both coordinates, and residual blocks."""

    def __init__(self, width: int = 32, blocks: int = 3) -> None:
        super().__init__()
        self.time, self.first, self.second = Sinusoidal(width), Sinusoidal(width, 25.0), Sinusoidal(width, 25.0)
        layers = [nn.Linear(3 * width, width), nn.GELU(), *(Block(width) for _ in range(blocks)), nn.Linear(width, 2)]
        self.joint = nn.Sequential(*layers)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.joint(torch.cat((self.first(x[:, 0]), self.second(x[:, 1]), self.time(t)), -1))


class Film(nn.Module):
    """Scale and shift from t, a condition and a label, LayerNorm, a residual sum."""

    def __init__(self, dim: int = 3, width: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Sequential(Sinusoidal(16), nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.condition, self.label = nn.Linear(2, width), nn.Embedding(11, width)
        self.first, self.film, self.norm = nn.Linear(dim, width), nn.Linear(width, 2 * width), nn.LayerNorm(width)
        self.last = nn.Linear(width, dim)

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        e = self.embedding(1000 * t)
        e = e if c is None else e + self.condition(c)
        e = e if y is None else e + self.label(y)
        scale, shift = self.film(functional.silu(e)).chunk(2, -1)
        h = self.first(x)
        return self.last(h + functional.mish(self.norm(h) * (1 + scale) + shift))


class Preconditioned(nn.Module):
    """EDM's scales of sigma around a network, and a skip connection of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        sigma = t.double()[:, None]
        c_in, c_skip, c_out = 1 / (sigma**2 + 0.25).sqrt(), 0.25 / (sigma**2 + 0.25), 0.5 * sigma
        f = self.net(torch.cat((c_in.to(x) * x, (sigma.log1p() / 4).to(x)), -1))
        return c_skip.to(x) * x + c_out.to(x) * f


class Images(nn.Module):
    """Small images, flattened, with GroupNorm, weights transposed, and a slice that skips the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(12, 20) / 4), nn.GroupNorm(4, 20)
        self.last = nn.Linear(20, 12)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = functional.leaky_relu(self.norm(x.flatten(1) @ self.weight), 0.2)
        h = torch.addcmul(h, h, t[:, None], value=0.5)
        return (self.last(h) + x.permute(0, 2, 1, 3).flip(-1).reshape(len(x), -1)).reshape(x.shape)


class Fourier(nn.Module):
    """Random Fourier features, one number of t for the whole batch, RMSNorm, weight norm, and layers in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(8))
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 16))
        self.time, self.norm, self.last = nn.Linear(16, 16), nn.RMSNorm(16), nn.Linear(16, 4)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = torch.zeros(2 * len(self.frequencies), dtype=self.frequencies.dtype)
        angles[0::2] = torch.sin(6 * t[0] * self.frequencies)
        angles[1::2] = torch.cos(6 * t[0] * self.frequencies)
        h = self.act(self.first(x) + self.time(angles))
        return self.last(self.drop(self.norm(h)))


class Functions(nn.Module):
    """The functions that have no module."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        mean, spread = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
        y = (x - mean) / (spread + 1e-3).sqrt()
        y = y + x.clamp(-1, 1) - 0.3 * x.abs() + torch.rsqrt(x**2 + 1) * x**3 / (1 + x.square() ** 2)
        y = (
            y * torch.exp(-x.square())
            + (0.5 - x) * torch.erf(x)
            + 2 / (1.5 + torch.cos(x))
            + torch.sigmoid(x * t[:, None])
        )
        y = (
            y
            + functional.softplus(x, beta=2)
            + functional.elu(x, 0.7)
            + functional.relu(x)
            - x.sum(-1, keepdim=True) / 9
        )
        return functional.logsigmoid(y) * torch.stack((x[:, 0], x[:, 2], -x[:, 1]), 1).reciprocal().clamp(-2, 2)


class BatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 3))
        nn.init.normal_(self.net[1].running_mean)
        nn.init.uniform_(self.net[1].running_var, 0.5, 2.0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat((x, t[:, None]), -1))


class Repeated(nn.Module):
    """A layer whose inputs are one unit, several times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(functional.silu(self.first(x) + t[:, None]).expand(-1, 3))


LOWERED: dict[str, tuple[Any, tuple[int, ...]]] = {
    "residual": (Residual, (2,)),
    "film": (Film, (3,)),
    "preconditioned": (Preconditioned, (2,)),
    "images": (Images, (2, 3, 2)),
    "fourier": (Fourier, (4,)),
    "functions": (Functions, (3,)),
    "batch norm": (BatchNorm, (3,)),
    "one unit repeated": (Repeated, (2,)),
    "a function of t alone": (lambda: lambda x, t: t[:, None].expand(len(x), 2).sin(), (2,)),
    "the state": (lambda: lambda x, t: x, (5,)),
    "a number": (lambda: lambda x, t: -x * t, ()),
}

N = 7
CONDITIONED: dict[str, dict[str, Any]] = {
    "each its own": {"c": torch.randn(N, 2, generator=torch.Generator().manual_seed(1))},
    "all the same": {"c": torch.ones(1, 2).expand(N, 2)},
    "labels": {"y": torch.arange(N)},
    "both": {"c": torch.ones(N, 2), "y": torch.arange(N) % 3},
}
