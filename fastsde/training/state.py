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
from .config import TrainConfig

__all__ = ["check_same_run", "config_of", "initial_model", "restore", "saved_config", "steps_of", "tensors_of"]


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


def initial_model(config: TrainConfig, start: Checkpoint | None) -> Any:
    """Returns the network with the weights of ``start``, or of the seed; torch's random state is left unchanged."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(config.seed)  # only that of the CPU, where the weights are made
        model: Any = models.from_config(config.model)
    if start is not None:
        sigma_data = config.sigma_data if config.preconditioning == "edm" else None
        for name, theirs, ours in (
            ("model", start.network.config, model.config),
            ("prediction", start.prediction, config.prediction),
            ("sigma_data", start.sigma_data, sigma_data),
            ("sde", start.sde, config.sde),
        ):
            if theirs != ours:
                raise ValueError(
                    f"init must have the {name} of the run, {ours}, got {theirs}: give the run the same one"
                )
        model.load_state_dict(start.network.state_dict())
    return model


def check_same_run(config: TrainConfig, saved: TrainConfig, step: int, directory: Path) -> None:
    """Raises ValueError if a run that has reached ``step`` cannot go on with another config."""
    theirs, ours = _json(saved), _json(config)
    for name in (each.name for each in fields(TrainConfig)):
        had, has = theirs[name], ours[name]
        # A run with a constant learning rate may be taken further; a cosine depends on where it ends.
        may_grow = name == "steps" and saved.lr_schedule == "constant" and has >= step
        if had != has and not may_grow and name not in ("checkpoint_every", "log_every"):
            raise ValueError(
                f"the run in {directory} has {name}={had!r}, got {has!r}: resume it with its own config, or "
                f"start another run from its weights (init)"
            )


def tensors_of(model: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns all of a run's tensors by name; ``model.*`` are the weights to sample from."""
    sampled = model if ema is None else ema
    tensors = {f"model.{name}": value for name, value in sampled.state_dict().items()}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors.update({f"adam.{kind}.{name}": value for kind, value in state.items()})
        if ema is not None:
            tensors[f"weights.{name}"] = parameter
    return tensors


def restore(
    tensors: dict[str, Tensor],
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    has_steps: bool,
) -> None:
    """Inverts `tensors_of`. Raises KeyError if a tensor is missing.

    Args:
        has_steps: whether steps have been taken; before the first one Adam has no state.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"weights.{name}" if ema is not None else f"model.{name}"])
            if has_steps:
                averages = {
                    kind: torch.empty_like(parameter).copy_(tensors[f"adam.{kind}.{name}"])  # in its layout
                    for kind in ("exp_avg", "exp_avg_sq")
                }
                step = tensors[f"adam.step.{name}"].to(parameter.device)
                optimizer.state[parameter] = {"step": step, **averages}
        if ema is not None:
            for name, parameter in ema.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
