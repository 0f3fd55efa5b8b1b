"""diffusers' networks, in small sizes."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from fastsde.networks import DDPMUNet

from .case import Called, Case

TITLE, PACKAGES = "diffusers", ("diffusers",)


def _called(model: Any, shape: tuple[int, ...], *conditions: Any, names: tuple[str, ...] = ()) -> Called:
    """Returns a model of diffusers, whose conditions have names, as it is called with integer times."""

    def call(x: Tensor, t: Tensor, *given: Any) -> Tensor:
        sample: Tensor = model(x, t, **dict(zip(names, given, strict=True)), return_dict=False)[0]
        return sample

    return Called(model, shape, call, conditions)


def _unet_1d() -> Called:
    """The U-Net of diffuser's trajectories."""
    model = diffusers.UNet1DModel(
        in_channels=14,
        out_channels=14,
        time_embedding_type="positional",
        use_timestep_embedding=True,
        down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
        up_block_types=("UpResnetBlock1D",),
        mid_block_type="MidResTemporalBlock1D",
        out_block_type="OutConv1DBlock",
        block_out_channels=(32, 64),
        act_fn="mish",
    )
    return _called(model, (14, 32))


def _dit() -> Called:
    model = diffusers.DiTTransformer2DModel(2, 16, num_layers=2, sample_size=8)
    return _called(model, (4, 8, 8), torch.tensor([1, 2]), names=("class_labels",))


def _conditional() -> Called:
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
    )
    return _called(model, (4, 8, 8), torch.randn(2, 3, 16), names=("encoder_hidden_states",))


def cases() -> list[Case]:
    return [
        Case("UNet2DModel, 32 x 32", lambda: Called(DDPMUNet(), (3, 32, 32))),
        Case("UNet2DConditionModel", _conditional),
        Case("UNet1DModel", _unet_1d),
        Case("DiTTransformer2DModel", _dit),
    ]
