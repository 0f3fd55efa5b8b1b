"""Configs of training: through JSON and back, learning rates, and wrong fields by name."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsde.data import Dataset
from fastsde.models import MLP
from fastsde.sde import EDM
from fastsde.training import TrainConfig, Trainer


def test_every_field_of_a_config_survives_json() -> None:
    config = TrainConfig(
        "images/", "package.module:make", image_size=64, flip=True, workers=2, condition_dropout=0.1, accumulation=4,
        weight_decay=0.01, clip_norm=1.0, sample_every=500, lr_schedule="inverse_sqrt", lr_warmup=10,
        times="importance", pixel_range=(0.0, 1.0), sde=EDM(0.01, 30.0), prediction="x0", data_size=100,
    )  # fmt: skip
    assert TrainConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
    assert config.learning_rate(9) == config.lr
    assert config.learning_rate(39) == pytest.approx(config.lr / 2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "networks", "model must be an architecture .* or 'package.module:function', got 'networks'"),
        ("model", 3, "model must be an architecture .a dict. or a name, got int"),
        ("accumulation", 257, "accumulation must be at most the batch_size, 256, got 257"),
        ("workers", -1, "workers must be at least 0, got -1"),
        ("clip_norm", 0.0, "clip_norm must be positive and finite, got 0.0"),
        ("weight_decay", float("nan"), "weight_decay must be at least 0 and finite, got nan"),
        ("condition_dropout", 1.0, r"condition_dropout must be in \[0, 1\), got 1.0"),
        ("flip", 1, "flip must be True or False, got 1"),
        ("image_size", 0, "image_size must be at least 1, got 0"),
        ("lr_schedule", "linear", "lr_schedule must be one of constant, cosine, inverse_sqrt, got 'linear'"),
        ("times", "sometimes", "times must be one of uniform, lognormal, importance, got 'sometimes'"),
    ],
)
def test_wrong_fields_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        TrainConfig(**{"data": "own", "model": "", field: value})


def test_flips_and_pictures_need_images(tmp_path: Path) -> None:
    options: list[tuple[dict[str, Any], str]] = [
        ({"flip": True}, "flip must be False"),
        ({"sample_every": 2}, "sample_every must be 0"),
    ]
    for given, message in options:
        config, data = TrainConfig("own", "", **given), Dataset("own", torch.randn(4, 3))
        with pytest.raises(ValueError, match=rf"{message}.* samples of shape \[3\]"):
            Trainer(config, tmp_path, model=MLP(3), dataset=data)
