"""The state of a run: its config, network, optimizer and moving average, as tensors and JSON."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoints, models
from ..checkpoints import Checkpoint
from ..conditions import Condition, from_dicts
from ..factories import make
from .config import TrainConfig
from .importance import ImportanceTimes

__all__ = [
    "check_same_data",
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

    A `Trainer` that is given no network imports the function that ``config.model`` names, if it is a string: check that
    of a file that you do not trust.

    Args:
        checkpoint: the checkpoint of a run's folder.

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
    """Raises ValueError for a network that cannot be trained.

    It must have parameters to train, all in fp32 and with a shape.
    """
    for name, each in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(each):
            raise ValueError(f"model must have all its shapes, got {name} of a lazy layer: call it once before")
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
    # Into a copy: a loaded network is in evaluation mode.
    start = checkpoints.load(config.init, model=copy.deepcopy(model) if architecture is None else None)
    sigma_data = config.sigma_data if config.preconditioning == "edm" else None
    for name, theirs, ours in (
        ("model", start.architecture, architecture),
        ("prediction", start.prediction, config.prediction),
        ("sigma_data", start.sigma_data, sigma_data),
        ("sde", start.sde, config.sde),
    ):
        if theirs != ours:
            raise ValueError(f"init must have the {name} of the run, {ours}, got {theirs}: give the run the same one")
    model.load_state_dict(start.network.state_dict())
    return start


def check_same_run(config: TrainConfig, saved: TrainConfig, step: int, directory: Path) -> None:
    """Raises ValueError if a run that has reached ``step`` cannot go on with another config."""
    theirs, ours = _json(saved), _json(config)
    for name in (each.name for each in fields(TrainConfig)):
        had, has = theirs[name], ours[name]
        # A run may be taken further, except with a cosine, which depends on where it ends.
        may_grow = name == "steps" and saved.lr_schedule != "cosine" and has >= step
        if had != has and not may_grow and name not in _FREE:
            raise ValueError(
                f"the run in {directory} has {name}={had!r}, got {has!r}: resume it with its own config, or "
                f"start another run from its weights (init)"
            )


def check_same_data(
    conditions: Mapping[str, Condition], shape: Sequence[int], metadata: Mapping[str, Any], path: str | Path
) -> None:
    """Raises ValueError if a run cannot go on with data whose samples or conditions are others than before."""
    had = {"samples of shape": metadata.get("shape"), "conditions": from_dicts(metadata.get("conditions", {}))}
    for name, has in (("samples of shape", list(shape)), ("conditions", dict(conditions))):
        if had[name] is not None and had[name] != has:
            raise ValueError(f"dataset must have the {name} of the run in {path}, {had[name]}, got {has}")


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


def _copy(tensors: dict[str, Tensor], prefix: str, model: nn.Module) -> None:
    """Copies the tensors whose names start with ``prefix`` to a network, which must have exactly these."""
    state = _state(model)
    theirs = {name.removeprefix(prefix): each.shape for name, each in tensors.items() if name.startswith(prefix)}
    missing = [f"{prefix}{name}" for name in state if name not in theirs]
    if missing:
        raise KeyError(", ".join(missing))
    odd = [name for name in theirs if name not in state or state[name].shape != theirs[name]]
    if odd:
        raise ValueError(f"model must be that of the run, got another one: {', '.join(odd)} differ")
    for name, value in state.items():
        value.copy_(tensors[f"{prefix}{name}"])


def restore(
    tensors: dict[str, Tensor],
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    importance: ImportanceTimes | None = None,
) -> None:
    """Inverts `tensors_of`.

    Raises:
        KeyError: if a tensor is missing.
        ValueError: if the network is not that of the run.
    """
    with torch.no_grad():
        _copy(tensors, "model." if ema is None else "weights.", model)
        if ema is not None:
            _copy(tensors, "model.", ema)
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
