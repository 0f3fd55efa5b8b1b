"""azula's networks and denoisers, and an MLP as the backbone of its first example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from azula.denoise import KarrasDenoiser
from azula.nn.layers import SineEncoding
from azula.nn.unet import UNet
from azula.nn.vit import ViT
from azula.noise import VPSchedule
from torch import Tensor, nn

from ..tasks.mlps import Backbone
from .case import Called, Case

TITLE, PACKAGES = "azula", ("azula",)


class Modulated(nn.Module):
    """A network of azula with an encoding of t as its modulation."""

    def __init__(self, build: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.encoding, self.net = SineEncoding(32), build(mod_features=32)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        f: Tensor = self.net(x, self.encoding(t))
        return f


def _denoiser() -> Called:
    denoiser: Any = KarrasDenoiser(Backbone(SineEncoding), VPSchedule())
    return Called(denoiser, (5,), lambda x, t: denoiser(x, t).mean)


def _unet() -> Called:
    return Called(Modulated(lambda **more: UNet(3, 3, hid_channels=(16, 32), hid_blocks=(1, 1), **more)), (3, 16, 16))


def _vit() -> Called:
    build = Modulated(lambda **more: ViT(3, 3, hid_channels=32, hid_blocks=2, attention_heads=2, patch_size=4, **more))
    return Called(build, (3, 16, 16))


def cases() -> list[Case]:
    return [
        Case("MLP of 3 x 256, SineEncoding", lambda: Called(Backbone(SineEncoding), (5,))),
        Case("the same in a KarrasDenoiser", _denoiser),
        Case("UNet", _unet),
        Case("ViT", _vit),
    ]
