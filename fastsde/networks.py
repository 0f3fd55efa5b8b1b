"""Untrained networks in shapes that the field uses, by name, for `fastsde verify` and the benchmarks.

Their weights come from a fixed seed. They predict v, and their last layer is small, so that the score is nearly that of
a standard normal: samples of other untrained networks diverge, and compare nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .checkpoints import Checkpoint
from .extras import require
from .models import Sinusoidal, UNet

__all__ = ["NETWORKS", "DDPMUNet", "FiLM", "Named", "Residual"]

_LAST = 0.5  # what the last layer's weights are multiplied by
_TIMES = 1000.0  # the times that embeddings are made for end there


class _ResidualLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + functional.gelu(self.layer(h))


class Residual(nn.Module):
    """A residual MLP on embeddings of t and of each coordinate, in the shape of tiny-diffusion's."""

    def __init__(self, dim: int = 2, width: int = 128, blocks: int = 3) -> None:
        super().__init__()
        self.shape, self.width, self.blocks = (dim,), width, blocks
        self.time, self.place = Sinusoidal(width, _TIMES), Sinusoidal(width, 25.0)
        self.first = nn.Linear((dim + 1) * width, width)
        self.inner = nn.Sequential(*(_ResidualLayer(width) for _ in range(blocks)))
        self.last = nn.Linear(width, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Maps x ``[B, dim]`` and t ``[B]`` to ``[B, dim]``."""
        embedded = torch.cat((*(self.place(column) for column in x.unbind(1)), self.time(t)), -1)
        f: Tensor = self.last(self.inner(functional.gelu(self.first(embedded.to(self.last.weight.dtype)))))
        return f


class _FiLMLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.film, self.norm, self.layer = nn.Linear(width, 2 * width), nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.film(e).chunk(2, -1)
        out: Tensor = h + self.layer(functional.mish(self.norm(h) * (1 + scale) + shift))
        return out


class FiLM(nn.Module):
    """A residual MLP with LayerNorm, whose layers t and a condition scale and shift (Perez et al. 2017, 1709.07871).

    Score networks of simulation-based inference and policies look like that.
    """

    def __init__(self, dim: int = 3, condition: int = 2, width: int = 128, blocks: int = 2) -> None:
        super().__init__()
        self.shape, self.width, self.blocks = (dim,), width, blocks
        self.embedding = Sinusoidal(width, _TIMES)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.condition, self.first = nn.Linear(condition, width), nn.Linear(dim, width)
        self.inner = nn.ModuleList(_FiLMLayer(width) for _ in range(blocks))
        self.last = nn.Linear(width, dim)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """Maps x ``[B, dim]``, t ``[B]`` and c ``[B, condition]`` to ``[B, dim]``."""
        dtype = self.last.weight.dtype
        e = functional.silu(self.time(self.embedding(t).to(dtype)) + self.condition(c.to(dtype)))
        h = self.first(x)
        for layer in self.inner:
            h = layer(h, e)
        f: Tensor = self.last(h)
        return f


class DDPMUNet(nn.Module):
    """A U-Net of diffusers with attention at its lowest resolution, 6.5 million weights, for images of 32 x 32.

    Raises:
        ImportError: if diffusers is not installed.
    """

    def __init__(self, channels: Sequence[int] = (64, 128, 128), layers: int = 2, side: int = 32) -> None:
        super().__init__()
        diffusers = require("diffusers", extra="diffusers", what="the network ddpm-unet")
        self.shape = (3, side, side)
        above = len(channels) - 1
        self.unet = diffusers.UNet2DModel(
            sample_size=side,
            layers_per_block=layers,
            block_out_channels=tuple(channels),
            down_block_types=("DownBlock2D",) * above + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * above,
        )
        self.last = self.unet.conv_out

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Maps x ``[B, 3, side, side]`` and t ``[B]`` to ``[B, 3, side, side]``."""
        f: Tensor = self.unet(x, _TIMES * t, return_dict=False)[0]
        return f


@dataclass(frozen=True)
class Named:
    """A network by name.

    Args:
        build: makes it, with random weights.
        shape: of one sample.
        condition: the length of the condition ``c`` of a sample, if it takes one.
        last: the name of its last layer.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    condition: int = 0
    last: str = "last"

    def load(self, device: torch.device | str = "cpu") -> Checkpoint:
        """Returns the network, always with the same weights."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(0)  # and no generator of a GPU
            model = self.build().requires_grad_(False).eval()
            model.get_submodule(self.last).weight.mul_(_LAST)  # type: ignore[operator]
        return Checkpoint(model.to(device), prediction="v")

    def conditions(self, n: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Returns the conditions of n samples, each its own: arguments of the network."""
        if not self.condition:
            return {}
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(n, self.condition, generator=generator, dtype=torch.float32, device="cpu")
        return {"c": drawn.to(device)}


NETWORKS = {
    "tutorial-unet": Named(UNet, (1, 28, 28), last="head.1"),
    "residual": Named(Residual, (2,)),
    "film": Named(FiLM, (3,), condition=2),
    "ddpm-unet": Named(DDPMUNet, (3, 32, 32)),
}
