"""U-Nets of many shapes, and their inputs, for the tests of the native U-Net."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastsde.models import UNet

TUTORIAL = (1, 28, (32, 64, 128, 256, 256))
ARCHITECTURES: dict[str, tuple[Any, ...]] = {
    "odd, three channels": (3, (9, 14), (16, 32, 48)),
    "one pixel": (1, 1, (16, 16)),
    "wide, with labels": (2, (5, 32), (32, 96, 80), 8, 3),
    "narrow": (1, (17, 1), (16, 16, 32)),
    "many image channels, with films": (17, (3, 6), (32, 16), 4),
}


def unet(*architecture: Any) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet(*architecture)
        for parameter in [] if model.modulation is None else model.modulation.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def inputs_of(model: UNet, batch: int) -> tuple[Tensor, ...]:
    with torch.random.fork_rng():
        torch.manual_seed(batch)
        labels = (torch.randint(0, model.classes + 1, (batch,)),) if model.classes else ()
        return torch.randn(batch, *model.shape), torch.rand(batch), *labels
