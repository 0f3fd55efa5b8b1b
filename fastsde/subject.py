"""What is sampled from: a network, a checkpoint, or the name of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from . import checkpoints
from .checkpoints import Checkpoint
from .reference import Model
from .sde import VPSDE

__all__ = ["Subject", "resolve"]


class Subject(NamedTuple):
    """A network, the shape of its samples, and how it was trained."""

    model: Model
    sample_shape: Sequence[int]
    sde: VPSDE
    prediction: str


def resolve(
    model: str | Path | Checkpoint | Model,
    sample_shape: Sequence[int] | None,
    sde: VPSDE | None,
    prediction: str | None,
    device: torch.device | str | None,
) -> Subject:
    """The subject that the arguments of `fastsde.Sampler` name, where None is what was not given.

    Args:
        model: a network; a `Checkpoint`; or its file, the folder of a training run or the name of a shipped model,
            which is loaded to ``device``, by default CUDA where there is one, else the CPU.

    Raises:
        TypeError: for a model that is none of these.
        ValueError: for a network without a sample_shape, or another shape, SDE or prediction than the checkpoint's.
        FileNotFoundError: where there is no such file.
    """
    if isinstance(model, (str, Path)):
        model = checkpoints.load(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not isinstance(model, Checkpoint):
        if not callable(model):
            raise TypeError(
                f"model must be callable as model(x, t), a Checkpoint, or the name or path of one, got "
                f"{type(model).__name__}"
            )
        if sample_shape is None:
            raise ValueError("sample_shape must be given with a network of your own, got None")
        return Subject(
            model, sample_shape, VPSDE() if sde is None else sde, "score" if prediction is None else prediction
        )
    shape = None if sample_shape is None else tuple(sample_shape)
    own = {"sample_shape": (shape, model.shape), "sde": (sde, model.sde), "prediction": (prediction, model.prediction)}
    for name, (given, known) in own.items():
        if given is not None and given != known:
            raise ValueError(f"{name} of the checkpoint is {known}, got {given}: leave it out")
    return Subject(model.model, model.shape, model.sde, model.prediction)
