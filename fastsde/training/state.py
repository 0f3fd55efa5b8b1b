"""The state of a run: its config, network, optimizer and moving average, as tensors and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoints, models
from ..checkpoints import Checkpoint
from ..factories import make
from .config import TrainConfig
from .importance import ImportanceTimes

__all__ = [
    "check_same_run",
    "check_trainable",
    "config_of",
    "initial_model",
    "restore",
    "saved_config",
    "start_from",
    "steps_of",
    "tensors_of",
]

# What may differ in a resumed run, since it does not change the weights.
_FREE = ("checkpoint_every", "log_every", "sample_every", "workers")


def saved_config(checkpoint: str | Path) -> TrainConfig:
    """Returns the config of the run that wrote a checkpoint.

    Raises:
        ValueError: for a checkpoint that no run can resume from.
    """
    return config_of(checkpoints.read(checkpoint)[1], checkpoint)


def config_of(metadata: dict[str, Any], path: str | Path) -> TrainConfig:
    if not metadata.get("resumable"):
        raise ValueError(f"{path} has a network, but not what training needs to resume")
    try:
        return TrainConfig.from_dict(metadata["record"]["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was written by another version of fastsde: {error}") from error


def _json(config: TrainConfig) -> dict[str, Any]:
    """Returns a config as read from a checkpoint, with lists instead of tuples."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values


def steps_of(start: Checkpoint) -> int:
    """Returns how many steps a checkpoint was trained for, as far as its free-form record says."""
    steps = (start.record.get(name, 0) for name in ("step", "earlier_steps"))
    return sum(each for each in steps if isinstance(each, int))


def initial_model(config: TrainConfig) -> nn.Module:
    """Returns the network that a config describes, with the weights of the seed; PyTorch's random state is unchanged.

    Raises:
        ValueError: for a config without a network.
    """
    if config.model == "":
        raise ValueError("model must be given to the Trainer, or named in the config, got neither")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(config.seed)  # only that of the CPU, where the weights are made
        return make(config.model) if isinstance(config.model, str) else models.from_config(config.model)


def check_trainable(model: nn.Module) -> None:
    """Raises ValueError for a network that has no parameters to train, or has other than fp32 ones."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if not trained:
        raise ValueError(f"model must have parameters to train, got a {type(model).__name__} without any")
    for name, parameter in trained.items():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"model must have its parameters in fp32, got {name} in {parameter.dtype}: convert it by "
                f"model.float(), and train with precision='bf16' for speed"
            )


def start_from(model: nn.Module, config: TrainConfig) -> Checkpoint:
    """Loads the weights of the checkpoint ``config.init`` into a network, and returns the checkpoint.

    Raises:
        ValueError: if it is of another network, prediction, preconditioning or process.
    """
    architecture = getattr(model, "config", None) if type(model) in (models.MLP, models.UNet) else None
    start = checkpoints.load(config.init, model=model if architecture is None else None)
    sigma_data = config.sigma_data if config.preconditioning == "edm" else None
    for name, theirs, ours in (
        ("model", start.architecture, architecture),
        ("prediction", start.prediction, config.prediction),
        ("sigma_data", start.sigma_data, sigma_data),
        ("sde", start.sde, config.sde),
    ):
        if theirs != ours:
            raise ValueError(f"init must have the {name} of the run, {ours}, got {theirs}: give the run the same one")
    if start.network is not model:
        model.load_state_dict(start.network.state_dict())
    return start


def check_same_run(config: TrainConfig, saved: TrainConfig, step: int, directory: Path) -> None:
    """Raises ValueError if a run that has reached ``step`` cannot go on with another config."""
    theirs, ours = _json(saved), _json(config)
    for name in (each.name for each in fields(TrainConfig)):
        had, has = theirs[name], ours[name]
        # A run with a constant learning rate may be taken further; a cosine depends on where it ends.
        may_grow = name == "steps" and saved.lr_schedule == "constant" and has >= step
        if had != has and not may_grow and name not in _FREE:
            raise ValueError(
                f"the run in {directory} has {name}={had!r}, got {has!r}: resume it with its own config, or "
                f"start another run from its weights (init)"
            )


def tensors_of(
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    importance: ImportanceTimes | None = None,
) -> dict[str, Tensor]:
    """Returns all of a run's tensors by name; ``model.*`` are the weights to sample from."""
    tensors = {f"model.{name}": value for name, value in _state(model if ema is None else ema).items()}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors.update({f"adam.{kind}.{name}": value for kind, value in state.items()})
    if ema is not None:
        tensors.update({f"weights.{name}": value for name, value in _state(model).items()})
    if importance is not None:
        tensors.update({f"importance.{name}": value for name, value in importance.tensors().items()})
    return tensors


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and buffers of a network by name."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def restore(
    tensors: dict[str, Tensor],
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    importance: ImportanceTimes | None = None,
) -> None:
    """Inverts `tensors_of`. Raises KeyError if a tensor is missing."""
    with torch.no_grad():
        for name, value in _state(model).items():
            value.copy_(tensors[f"weights.{name}" if ema is not None else f"model.{name}"])
        if ema is not None:
            for name, value in _state(ema).items():
                value.copy_(tensors[f"model.{name}"])
        for name, parameter in model.named_parameters():
            if f"adam.step.{name}" in tensors:  # not before the first step, nor of a parameter without a gradient
                averages = {
                    kind: torch.empty_like(parameter).copy_(tensors[f"adam.{kind}.{name}"])  # in its layout
                    for kind in ("exp_avg", "exp_avg_sq")
                }
                step = tensors[f"adam.step.{name}"].to(parameter.device)
                optimizer.state[parameter] = {"step": step, **averages}
        if importance is not None:
            for name, value in importance.tensors().items():
                value.copy_(tensors[f"importance.{name}"])
