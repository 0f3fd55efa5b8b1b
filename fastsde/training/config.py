"""The config that determines a training run."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Any

import torch

from .. import models
from ..objective import Objective
from ..sde import VPSDE, Process, from_dict, to_dict
from ..validation import check_bool, check_instance, check_int, check_number, check_range
from ..vocabulary import LR_SCHEDULES, PRECISIONS

__all__ = ["TrainConfig"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run is a function of, besides the library versions and the device.

    Args:
        data: the data set: "swiss-roll", "digits" or "mnist", a file or folder (`fastsde.data.load`), or a name of your
            own, for a data set that the `Trainer` is given.
        model: the architecture, as `fastsde.models.from_config` takes it; "package.module:make" for a network of your
            own, which this function makes; or "" for one that the `Trainer` is given.
        data_size: how many points or images, or None for the default (`fastsde.data.load`).
        image_size: the height and width that the images of a folder are cropped and scaled to.
        pixel_range: what black and white of uint8 images are mapped to (floats are trained on as they are).
        flip: whether each image is mirrored from left to right in half of the steps.
        workers: the processes that load a data set that is not in memory; 0 loads it between the steps.
        prediction: what the network predicts (`fastsde.objective.Objective`).
        weighting: of the loss (`fastsde.objective.Objective`).
        condition_dropout: the share of samples whose conditions are replaced by "no condition", which guidance needs;
            for networks that take conditions.
        steps: the number of steps, below 2^28.
        batch_size: the samples in each step, of all ranks together.
        accumulation: the parts that a batch is cut into, whose gradients are added: the same step, up to rounding, in
            less memory.
        lr: Adam's learning rate.
        lr_schedule: "constant"; "cosine", which falls along a half cosine to zero at the last step; or "inverse_sqrt",
            which falls as the inverse square root of the step.
        lr_warmup: the steps over which the learning rate first rises, linearly.
        weight_decay: of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); 0 for Adam.
        clip_norm: the largest norm of the gradient, which is scaled down to it, or None.
        ema_decay: the decay of the moving average of the weights, which is sampled from; 0 keeps none. It starts lower,
            at (1 + step) / (10 + step), so that the first weights are forgotten.
        preconditioning: "none" or "edm", with which the prediction is "x0" (`fastsde.objective.Objective`).
        sigma_data: the standard deviation of the data, for "edm".
        times: the distribution of the training times: "uniform", "lognormal", or "importance", which follows the
            history of the loss.
        t_min: the smallest training time.
        t_max: the largest training time, by default that of the process.
        time_mean: the mean of ln t of "lognormal" times.
        time_std: the standard deviation of ln t of "lognormal" times.
        precision: "fp32" (on a GPU, PyTorch's convolutions then use TF32), or "bf16" for the network under autocast.
        compile: whether the network runs through ``torch.compile``.
        seed: in [0, 2^63), for the weights, the data order, the times and the noise.
        init: a checkpoint (a path or the name of a shipped model) whose weights to start from, or "" for fresh ones.
        checkpoint_every: steps between checkpoints. One that is due less than ten seconds after the previous one waits
            until then, except at the last step and on an interrupt.
        log_every: steps between log lines, which are written together every two seconds.
        sample_every: steps between pictures of samples in the run's folder; 0 for none.
        sde: the process, one of `fastsde.sde.PROCESSES`, so that a checkpoint can hold its name.

    Raises:
        TypeError, ValueError: for a field of the wrong type, or out of range.
    """

    data: str
    model: dict[str, Any] | str
    data_size: int | None = None
    image_size: int | None = None
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    flip: bool = False
    workers: int = 0
    prediction: str = "eps"
    weighting: str = "sigma2"
    condition_dropout: float = 0.0
    steps: int = 100_000
    batch_size: int = 256
    accumulation: int = 1
    lr: float = 1e-3
    lr_schedule: str = "cosine"
    lr_warmup: int = 0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    ema_decay: float = 0.999
    preconditioning: str = "none"
    sigma_data: float = 0.5
    times: str = "uniform"
    t_min: float = 1e-4
    t_max: float | None = None
    time_mean: float = -1.2
    time_std: float = 1.2
    precision: str = "fp32"
    compile: bool = False
    seed: int = 0
    init: str = ""
    checkpoint_every: int = 1000
    log_every: int = 100
    sample_every: int = 0
    sde: Process = field(default_factory=VPSDE)

    def __post_init__(self) -> None:
        for name, kind in (("data", str), ("init", str)):
            check_instance(name, getattr(self, name), kind)
        if isinstance(self.model, dict):
            with torch.device("meta"):  # nothing is allocated, and nothing drawn
                models.from_config(self.model)
        elif not isinstance(self.model, str):
            raise TypeError(f"model must be an architecture (a dict) or a name, got {type(self.model).__name__}")
        elif self.model and ":" not in self.model:
            raise ValueError(f"model must be an architecture (a dict) or 'package.module:function', got {self.model!r}")
        for name, choices in (("lr_schedule", LR_SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        check_int("steps", self.steps, 1, 2**28)  # the noise contract has 28 bits for the step
        for name in ("batch_size", "accumulation", "checkpoint_every", "log_every"):
            check_int(name, getattr(self, name), 1)
        for name in ("lr_warmup", "workers", "sample_every"):
            check_int(name, getattr(self, name), 0)
        for name in ("data_size", "image_size"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        if self.accumulation > self.batch_size:
            raise ValueError(f"accumulation must be at most the batch_size, {self.batch_size}, got {self.accumulation}")
        check_int("seed", self.seed, 0, 2**63)
        check_range("pixel_range", self.pixel_range)
        check_bool("compile", self.compile), check_bool("flip", self.flip)
        check_number("lr", self.lr, "positive and finite", _is_positive)
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, "positive and finite", _is_positive)
        check_number("weight_decay", self.weight_decay, "at least 0 and finite", lambda decay: 0 <= decay < math.inf)
        check_number("ema_decay", self.ema_decay, "in [0, 1)", lambda decay: 0 <= decay < 1)
        check_number("condition_dropout", self.condition_dropout, "in [0, 1)", lambda rate: 0 <= rate < 1)
        to_dict(self.sde)  # refuses a process that a checkpoint cannot name
        if float(self.sde.alpha(self.sde.t_max)) == 0 and self.prediction in ("score", "eps"):
            raise ValueError(
                f"prediction must be 'flow', 'v' or 'x0' for {self.sde!r}, got {self.prediction!r}: samples start "
                f"where alpha is 0, and there it says nothing about x_0"
            )
        check_instance("objective", self.objective, Objective)  # which checks its own fields

    @cached_property
    def objective(self) -> Objective:
        """What the network learns, and at which times."""
        return Objective(**{each.name: getattr(self, each.name) for each in fields(Objective)})

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        if step < self.lr_warmup:
            return self.lr * (step + 1) / self.lr_warmup
        if self.lr_schedule == "constant":
            return self.lr
        if self.lr_schedule == "inverse_sqrt":
            return self.lr * math.sqrt(max(1, self.lr_warmup) / (step + 1))
        done = (step - self.lr_warmup) / max(1, self.steps - self.lr_warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def ema_decay_at(self, step: int) -> float:
        """Returns the decay of the moving average in a step."""
        return min(self.ema_decay, (1 + step) / (10 + step))

    @property
    def architecture(self) -> str:
        """The architecture's name, or that of the function that makes a network of your own, or ""."""
        return self.model if isinstance(self.model, str) else str(self.model["architecture"])

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Inverts ``dataclasses.asdict``, also after a JSON round trip. Fields with a default may be left out.

        Raises:
            TypeError, ValueError: for fields that are missing, unknown, of the wrong type or out of range.
        """
        check_instance("values", values, dict)
        known = {each.name: each.default is MISSING and each.default_factory is MISSING for each in fields(cls)}
        missing = [name for name, required in known.items() if required and name not in values]
        unknown = [name for name in values if name not in known]
        if missing or unknown:
            raise ValueError(f"values must have the fields of a TrainConfig: missing {missing}, unknown {unknown}")
        sde, pixel_range = from_dict(values.get("sde", {})), values.get("pixel_range", cls.pixel_range)
        return cls(**{**values, "sde": sde, "pixel_range": check_range("pixel_range", pixel_range)})


def _is_positive(value: float) -> bool:
    return 0 < value < math.inf
