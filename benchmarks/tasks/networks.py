"""The networks to sample from, and the minimum work of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastsde import models
from fastsde.checkpoints import Checkpoint
from fastsde.conditions import Condition

Built = TypeVar("Built")
DIGITS = (1, 28, 28)
CHANNELS = (32, 64, 128, 256, 256)  # of the tutorial's U-Net
UNET_KERNELS = 11  # one per convolution
DDPM_FLOP = 2_675_000_000  # per image of `fastsde.networks.DDPMUNet`, without products with padding
DDPM_KERNELS = 40  # one per convolution, without those that run beside others


def unet_work(channels: Sequence[int] = CHANNELS, size: int = 28, images: int = 1) -> tuple[int, int]:
    """Returns (FLOP, special functions) per sample of `fastsde.models.UNet`, without products with padding.

    A 3x3 convolution has 3 h - 2 taps along a side of h pixels. A transposed one of stride 2 has 3 h - 1 along a side
    of h pixels if the output has 2 h, and 3 h - 2 if it has 2 h - 1. A LogSigmoid takes an exponential and a logarithm.
    """
    sides = [size]
    for _ in channels[1:]:
        sides.append((sides[-1] + 1) // 2)
    inputs = (images + 1, *channels[:-1])
    layers = [((3 * h - 2) ** 2, i, o) for h, i, o in zip(sides, inputs, channels, strict=True)]
    activations = sum(h * h * o for h, o in zip(sides, channels, strict=True))
    signal = channels[-1]
    for level in range(len(channels) - 2, -1, -1):
        taps = 3 * sides[level + 1] - 1 - sides[level] % 2
        layers.append((taps**2, signal, channels[level]))
        activations += sides[level] ** 2 * channels[level]
        signal = 2 * channels[level]
    layers += [((3 * size - 2) ** 2, signal, channels[0]), ((3 * size - 2) ** 2, channels[0], images)]
    activations += size * size * channels[0]
    return sum(2 * taps * i * o for taps, i, o in layers), 2 * activations


def mlp_work(hidden: Sequence[int] = (64, 64, 64), dimensions: int = 2) -> tuple[int, int]:
    """Returns (FLOP, special functions) per sample of `fastsde.models.MLP`."""
    widths = (dimensions + 1, *hidden, dimensions)
    return 2 * sum(i * o for i, o in pairwise(widths)), 2 * sum(hidden)


def residual_work(dim: int = 2, width: int = 128, blocks: int = 3) -> tuple[int, int]:
    """Returns (FLOP, special functions) per sample of `fastsde.networks.Residual`.

    The embedding of t is the same for all samples, and so is its part of the first layer. Each element of the others is
    a sine or a cosine, and a GELU takes an exponential.
    """
    return 2 * width * (dim * width + blocks * width + dim), width * (dim + 1 + blocks)


def film_work(dim: int = 3, width: int = 128, blocks: int = 2) -> tuple[int, int]:
    """Returns (FLOP, special functions) per sample of `fastsde.networks.FiLM`.

    What follows from t or from the condition alone is known before, but not from both together: SiLU of their sum, and
    the scales and shifts. A LayerNorm takes a root and a Mish an exponential and a logarithm.
    """
    return 2 * width * (2 * dim + 3 * blocks * width), width + blocks * (1 + 2 * width)


def unet_training_work() -> tuple[int, int]:
    """Returns (FLOP, special functions) per sample of a training step of the tutorial's U-Net.

    All layers except the first also compute the gradient of their input.
    """
    flop, specials = unet_work()
    return 3 * flop - 2 * (3 * 28 - 2) ** 2 * 2 * CHANNELS[0], specials


def mlp_training_work() -> tuple[int, int]:
    """Returns the same for the swiss roll's MLP."""
    flop, specials = mlp_work()
    return 3 * flop - 2 * 3 * 64, specials


class Unknown(nn.Module):
    """A network whose structure fastsde does not recognize, like a user's own."""

    def __init__(self, inside: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.inside, self.shape = nn.ModuleList([inside]), shape

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        f: Tensor = self.inside[0](x, t)
        return f


def fixed(build: Callable[[], Built]) -> Built:
    """Returns what is built from random numbers, the same in each run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def fresh(architecture: Callable[[], nn.Module]) -> Checkpoint:
    """Returns one of the tutorial's networks before training; it predicts the score."""
    return Checkpoint(fixed(architecture), prediction="score")


def random_unet(width: int, known: bool = True) -> Checkpoint:
    """Returns an untrained U-Net that is ``width`` times as wide as the tutorial's and predicts v."""
    model: nn.Module = fixed(lambda: models.UNet(channels=[width * each for each in CHANNELS]))
    return Checkpoint(model if known else Unknown(model, DIGITS), prediction="v")


def small_digits(device: torch.device) -> Checkpoint:
    """Returns a small untrained U-Net for digits of 8 x 8 pixels and their labels, which predicts v."""
    model = fixed(lambda: models.UNet(1, 8, (16, 16), embedding=16, classes=10)).to(device)
    return Checkpoint(model, prediction="v", conditions={"label": Condition(classes=10, null=10)})


def random_mlp(width: int) -> Checkpoint:
    """Returns an untrained MLP for points that predicts v."""
    return Checkpoint(fixed(lambda: models.MLP(2, (width,) * 3)), prediction="v")
