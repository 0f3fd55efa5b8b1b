"""Resolves what the arguments of a sampler name: a network or checkpoint, a table, a device."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from . import checkpoints, solvers
from .adaptive import AdaptiveSolver
from .checkpoints import Checkpoint
from .engines.inspection import device_of
from .guidance import Guidance
from .inverse import ClassifierGuidance, Measurement
from .models import shape_of
from .randomness import Seed
from .reference import Model, NoiseFunction, RowHook
from .sde import PROCESSES, VPSDE, Process, check_process
from .solvers import StepTable
from .validation import check_device, check_int, check_shape

__all__ = [
    "TABLE_DEFAULTS",
    "CallOptions",
    "ModelLike",
    "SampleOptions",
    "Subject",
    "TableOptions",
    "make_device",
    "make_table",
    "resolve",
]

ModelLike = Model | Checkpoint | str | Path
"""A network, or what has one: a checkpoint, a checkpoint file, the folder of a run, or the name of a shipped model."""

TABLE_DEFAULTS = {
    "t_start": None,
    "t_end": None,
    "spacing": None,
    "rho": None,
    "prediction": None,
    "clip": None,
    "eta": None,
    "solver_options": None,
    "denoise": False,
    "resamples": 1,
    "jump": 10,
}


class CallOptions(TypedDict, total=False):
    """The options of a sampler's call, for type checkers only."""

    seed: Seed
    first_sample: int
    keys: Tensor | Sequence[int] | None
    x_init: Tensor | None
    noise: NoiseFunction | None
    model_kwargs: Mapping[str, Any] | None
    uncond_kwargs: Mapping[str, Any] | None
    mask: Tensor | None
    known: Tensor | None
    measurement: Measurement | None
    callback: RowHook | None
    progress: bool


class TableOptions(TypedDict, total=False):
    """The options that a table is built from, besides process, solver, steps and prediction."""

    t_start: float | None
    t_end: float | None
    spacing: str | None
    rho: float | None
    clip: float | None
    eta: float | None
    solver_options: Mapping[str, Any] | None
    denoise: bool
    resamples: int
    jump: int


class SampleOptions(CallOptions, TableOptions, total=False):
    """The options of `sample`, for type checkers only."""

    sde: Process | None
    solver: str | StepTable | AdaptiveSolver
    steps: int
    prediction: str | None
    prior_std: float | None
    dtype: torch.dtype | None
    device: torch.device | str | None
    guidance: float | Tensor | Guidance | ClassifierGuidance | None
    backend: str
    compile: bool | str
    max_batch: int | str | None
    differentiable: bool


class Subject(NamedTuple):
    """A network, the shape of its samples, and how it was trained.

    Args:
        checkpoint: what the network comes from, or None.
    """

    model: Model
    sample_shape: Sequence[int]
    sde: Process
    prediction: str
    checkpoint: Checkpoint | None = None


def resolve(
    model: ModelLike,
    sample_shape: Sequence[int] | None,
    sde: Process | None,
    prediction: str | None,
    device: torch.device | str | None,
) -> Subject:
    """Returns the subject that the arguments of `fastsde.Sampler` name; None stands for an argument not given.

    Args:
        model: a network; a `Checkpoint`; or a checkpoint file, the folder of a training run or the name of a shipped
            model, which is loaded to ``device``, by default CUDA if available, else the CPU.

    Raises:
        TypeError: for a model that is none of these.
        ValueError: for a network without a sample_shape, or a shape, SDE or prediction other than the checkpoint's.
        FileNotFoundError: if the checkpoint does not exist.
    """
    if sde is not None:
        check_process("sde", sde)
    if isinstance(model, (str, Path)):
        model = checkpoints.load(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not isinstance(model, Checkpoint):
        if isinstance(model, type):
            raise TypeError(f"model must be a network, got the class {model.__name__}: give an instance of it")
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
    has_shape = shape_of(model.model) is not None or model.sample_shape is not None
    shape = model.shape if has_shape else sample_shape
    if shape is None:
        raise ValueError("sample_shape must be given with a checkpoint that does not know it, got None")
    given_shape = None if sample_shape is None else check_shape("sample_shape", sample_shape)
    own = {"sample_shape": (given_shape, tuple(shape)), "sde": (sde, model.sde)}
    for name, (given, known) in {**own, "prediction": (prediction, model.prediction)}.items():
        if given is not None and given != known:
            raise ValueError(f"{name} of the checkpoint is {known}, got {given}: give the checkpoint's or omit it")
    return Subject(model.model, shape, model.sde, model.prediction, model)


class _Options(dict[str, Any]):
    """A builder's options as a cache key that distinguishes types, since an order of 2.0 is an error."""

    def _key(self) -> tuple[tuple[str, type, Any], ...]:
        return tuple((name, type(value), value) for name, value in self.items())

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Options) and self._key() == other._key()


_named_table = functools.lru_cache(maxsize=32, typed=True)(solvers.build)


def make_table(solver: str | StepTable, sde: Process, steps: int, **options: Any) -> StepTable:
    """Returns the table of a named solver, or the table given as ``solver``."""
    if isinstance(solver, str):
        options["t_end"] = 0.0 if options["t_end"] is None else options["t_end"]
        if isinstance(own := options["solver_options"], Mapping):
            options["solver_options"] = own = _Options(own)
        values = (*options.values(), *(own.values() if isinstance(own, _Options) else ()))
        # A user's own process may have changed, or equal a different one: it may hold more than its fields.
        is_known = type(sde) in PROCESSES.values() and all(isinstance(value, Hashable) for value in values)
        is_known = is_known and not torch.compiler.is_compiling()  # it bypasses the cache, with a warning
        make = _named_table if is_known else solvers.build
        return make(solver, sde, steps, **options)
    if not isinstance(solver, StepTable):
        raise TypeError(
            f"solver must be a name or a StepTable, or AdaptiveODE or GottaGoFast, got {type(solver).__name__}"
        )
    for name, default in TABLE_DEFAULTS.items():
        if options[name] != default:
            raise ValueError(f"{name} is part of the StepTable given as solver: leave it out, got {options[name]!r}")
    if check_int("steps", steps, 1) not in (999, len(solver)):
        raise ValueError(f"the StepTable given as solver has {len(solver)} rows, got steps={steps}")
    return solver


def make_device(device: torch.device | str | None, model: Model) -> torch.device:
    """Returns the given device; without one the network's own; if it has none, PyTorch's default."""
    own = device_of(model)
    default = own or torch.empty(0).device  # PyTorch's default
    asked = default if device is None else check_device(device)
    if own is not None and own != asked:
        raise ValueError(f"device is {asked}, but the model is on {own}: move it with model.to({str(asked)!r})")
    if asked.type == "meta":
        raise ValueError("device must hold data, got meta")
    return asked
