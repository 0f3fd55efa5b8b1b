"""Configs for the data sets: this package's own, the tutorial's, and those of three papers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..data.dataset import Dataset
from ..data.streamed import StreamedDataset
from ..sde import EDM, RectifiedFlow
from .config import TrainConfig

__all__ = ["RECIPES", "config_for", "ddpm_config", "default_config", "edm_config", "flow_config", "tutorial_config"]

_MLP = {"architecture": "MLP", "shape": [2], "hidden": [64, 64, 64], "activation": "LogSigmoid"}
_UNET = {"architecture": "UNet", "image_channels": 1, "image_size": [28, 28], "channels": [32, 64, 128, 256, 256]}
_CHANNELS = (1, 3, 4)
_CONDITIONAL = {**_UNET, "embedding": 48, "classes": 10}  # as many weights as 5 MB hold in fp16


def default_config(data: str) -> TrainConfig:
    """Returns this package's recipe for a data set, chosen for the quality of the samples.

    Args:
        data: "swiss-roll", "digits" or "mnist".

    Raises:
        ValueError: for an unknown data set.
    """
    if data == "swiss-roll":
        return TrainConfig(data, _MLP, data_size=100_000, steps=120_000, batch_size=256, lr=1e-3, ema_decay=0.9995)
    if data in ("digits", "mnist"):
        return TrainConfig(
            data,
            _CONDITIONAL,
            prediction="v",
            weighting="target",
            condition_dropout=0.2,
            steps=375_000,
            batch_size=64,
            lr=1e-3,
            lr_warmup=500,
            ema_decay=0.999,
        )
    raise ValueError(f"data must be one of swiss-roll, digits, mnist, got {data!r}")


def ddpm_config(data: str) -> TrainConfig:
    """Returns the objective of DDPM (Ho et al. 2020, arXiv:2006.11239, eq. 14): eps, at uniform times.

    Args:
        data: "swiss-roll", "digits" or "mnist".
    """
    return replace(default_config(data), prediction="eps", weighting="sigma2")


def edm_config(data: str) -> TrainConfig:
    """Returns the objective of EDM (Karras et al. 2022, arXiv:2206.00364, table 1): its process, preconditioning, loss
    weight and log-normal noise levels.

    Args:
        data: "swiss-roll", "digits" or "mnist".
    """
    return replace(
        default_config(data),
        sde=EDM(),
        prediction="x0",
        weighting="target",
        preconditioning="edm",
        sigma_data=0.7 if data == "swiss-roll" else 0.5,
        times="lognormal",
        t_min=EDM().sigma_min,
    )


def flow_config(data: str) -> TrainConfig:
    """Returns flow matching on straight lines (Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023, 2209.03003).

    Args:
        data: "swiss-roll", "digits" or "mnist".
    """
    return replace(default_config(data), sde=RectifiedFlow(), prediction="flow", weighting="target")


def config_for(dataset: Dataset | StreamedDataset, data: str, model: str | None = None) -> TrainConfig:
    """Returns a recipe for data of your own, with their conditions.

    The network is a `fastsde.models.UNet` for images, and a `fastsde.models.MLP` for anything else.

    Images may be stored as ``[C, H, W]`` or ``[H, W, C]``, of 1, 3 or 4 channels, and in uint8 as ``[H, W]``.

    Args:
        dataset: the data.
        data: the name of the data in the config.
        model: "package.module:make", or "", for a network of your own.

    Raises:
        ValueError: if these networks do not take the conditions of the data.
    """
    described, shape = dataset.described, _image_shape(dataset)
    dropout = 0.1 if described else 0.0
    recipe = default_config("mnist" if shape else "swiss-roll")
    recipe = replace(recipe, data=data, data_size=None, condition_dropout=dropout)
    if model is not None:
        return replace(recipe, model=model)
    label, vector = described.get("label"), described.get("condition")
    classes = 0 if label is None else label.classes
    size = 0 if vector is None or shape or len(vector.shape) != 1 else vector.shape[0]
    used = {name for name, each in (("label", classes), ("condition", size)) if each}
    if described.keys() - used:
        takes = (
            "a UNet takes 'label', integers" if shape else "an MLP takes 'label', integers, and 'condition', vectors"
        )
        raise ValueError(
            f"the conditions of the data must be those of the network ({takes}), got "
            f"{', '.join(sorted(described.keys() - used))}: rename them, or train a network of your own (model)"
        )
    if shape:
        unet = {**_UNET, "image_channels": shape[0], "image_size": shape[1:], "embedding": 48, "classes": classes}
        return replace(recipe, model=unet)
    mlp: dict[str, Any] = {**_MLP, "shape": list(dataset.shape), "hidden": [128, 128, 128], "activation": "SiLU"}
    return replace(recipe, model={**mlp, "classes": classes, "condition": size})


def _image_shape(dataset: Dataset | StreamedDataset) -> list[int]:
    """Returns the shape [C, H, W] of images, which may be stored in another layout; [] for other data."""
    shape = list(dataset.shape)
    if len(shape) == 2 and dataset.dtype == torch.uint8:
        return [1, *shape]
    if len(shape) != 3:
        return []
    return [shape[2], *shape[:2]] if shape[2] in _CHANNELS and shape[0] not in _CHANNELS else shape


def tutorial_config(data: str) -> TrainConfig:
    """Returns the tutorial's recipe: its network, exact objective (score, lambda = sigma^2), Adam at 3e-4, no EMA.

    Args:
        data: "swiss-roll", "digits" or "mnist".
    """
    config = replace(
        default_config(data),
        model=_MLP if data == "swiss-roll" else _UNET,
        data_size=None,
        condition_dropout=0.0,
        prediction="score",
        weighting="sigma2",
        lr=3e-4,
        lr_schedule="constant",
        lr_warmup=0,
        ema_decay=0.0,
        pixel_range=(0.0, 1.0),
    )
    return replace(config, steps=600_000) if data == "swiss-roll" else config


RECIPES: dict[str, Callable[[str], TrainConfig]] = {
    "default": default_config,
    "tutorial": tutorial_config,
    "ddpm": ddpm_config,
    "edm": edm_config,
    "flow": flow_config,
}
