"""The training loop: a run is a function of its `TrainConfig`, and resumes to the very same weights."""

from __future__ import annotations

from .config import TrainConfig
from .recipes import (
    config_for,
    ddpm_config,
    default_config,
    edm_config,
    flow_config,
    tutorial_config,
)
from .state import saved_config
from .trainer import Trainer

__all__ = [
    "TrainConfig",
    "Trainer",
    "config_for",
    "ddpm_config",
    "default_config",
    "edm_config",
    "flow_config",
    "saved_config",
    "tutorial_config",
]
