"""Configs for the data sets: this package's own, and the tutorial's."""

from __future__ import annotations

from dataclasses import replace

from .config import TrainConfig

__all__ = ["default_config", "tutorial_config"]

_MLP = {"architecture": "MLP", "shape": [2], "hidden": [64, 64, 64], "activation": "LogSigmoid"}
_UNET = {"architecture": "UNet", "image_channels": 1, "image_size": [28, 28], "channels": [32, 64, 128, 256, 256]}


def default_config(data: str) -> TrainConfig:
    """Returns this package's recipe for a data set, chosen for the quality of the samples.

    Raises:
        ValueError: for an unknown data set.
    """
    if data == "swiss-roll":
        return TrainConfig(data, _MLP, steps=120_000, batch_size=256, lr=1e-3, ema_decay=0.9995)
    if data in ("digits", "mnist"):
        return TrainConfig(
            data,
            _UNET,
            prediction="v",
            weighting="target",
            steps=375_000,
            batch_size=64,
            lr=1e-3,
            lr_warmup=500,
            ema_decay=0.999,
        )
    raise ValueError(f"data must be one of swiss-roll, digits, mnist, got {data!r}")


def tutorial_config(data: str) -> TrainConfig:
    """Returns the tutorial's recipe: its network, exact objective (score, lambda = sigma^2), Adam at 3e-4, no EMA."""
    config = replace(
        default_config(data),
        prediction="score",
        weighting="sigma2",
        lr=3e-4,
        lr_schedule="constant",
        lr_warmup=0,
        ema_decay=0.0,
        pixel_range=(0.0, 1.0),
    )
    return replace(config, steps=600_000) if data == "swiss-roll" else config
