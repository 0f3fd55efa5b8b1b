"""k-diffusion's network for images, and its denoisers around an MLP."""

from __future__ import annotations

from k_diffusion.external import VDenoiser
from k_diffusion.layers import Denoiser
from k_diffusion.models import ImageDenoiserModelV1

from ..tasks.mlps import Joined
from .case import Called, Case

TITLE, PACKAGES = "k-diffusion", ("k-diffusion",)


def _image() -> Called:
    model = ImageDenoiserModelV1(3, 32, depths=(1, 1), channels=(32, 64), self_attn_depths=(False, True))
    return Called(model, (3, 16, 16))


def cases() -> list[Case]:
    return [
        Case("ImageDenoiserModelV1", _image),
        Case("VDenoiser, MLP of 2 x 128", lambda: Called(VDenoiser(Joined(32, (128, 128))), (32,))),
        Case("Denoiser (EDM's preconditioning), the same", lambda: Called(Denoiser(Joined(32, (128, 128))), (32,))),
    ]
