"""denoising-diffusion-pytorch's U-Nets."""

from __future__ import annotations

from denoising_diffusion_pytorch import Unet, Unet1D

from .case import Called, Case

TITLE, PACKAGES = "denoising-diffusion-pytorch", ("denoising-diffusion-pytorch",)


def cases() -> list[Case]:
    return [
        Case("Unet, 32 x 32", lambda: Called(Unet(32, dim_mults=(1, 2)), (3, 32, 32))),
        Case("Unet1D", lambda: Called(Unet1D(16, dim_mults=(1, 2), channels=4), (4, 32))),
    ]
