"""The task of training: a recipe and its data."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsde import data
from fastsde.distributed import Ranks
from fastsde.reference import load_batch
from fastsde.training import TrainConfig, Trainer
from fastsde.training.steps import EagerSteps, Work

from ..suite.case import check
from ..suite.measure import Figures, Run, fp32_products


@dataclass(frozen=True)
class Recipe:
    """``steps`` training steps on data that are on the device."""

    config: TrainConfig
    load: Callable[[], data.Dataset]
    device: torch.device
    steps: int

    @cached_property
    def dataset(self) -> data.Dataset:
        return self.load().to(self.device)

    @cached_property
    def x_0(self) -> Tensor:
        """The data as fp32 ``[N, d]``."""
        return load_batch(self.dataset.x, None, self.dataset.scale, self.dataset.shift).flatten(1)

    def work(self, config: TrainConfig | None = None) -> Work:
        """Returns a new network and its optimizer, always with the same initial weights."""
        config = config or self.config
        with tempfile.TemporaryDirectory() as folder:  # the trainer writes there only while it trains
            trainer = Trainer(config, Path(folder) / "run", device=self.device, dataset=self.dataset)
        return trainer.work()

    def network(self, model: nn.Module) -> Callable[..., Tensor]:
        """Returns the model with the tutorial's signature: x ``[B, d]`` and t ``[B, 1]``."""
        shape = self.dataset.shape

        def network(x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                f: Tensor = model(x.reshape(-1, *shape), t[:, 0])
            return f.reshape(x.shape)

        return network


def eager(work: Work) -> EagerSteps:
    """Returns steps of the network itself, without native kernels."""
    return EagerSteps(replace(work, native=False), Ranks())


def prove_weights(
    recipe: Recipe, kind: Callable[[Work], Any], config: TrainConfig, run: Run, losses: Tensor
) -> Figures:
    """Checks that each parameter after some steps agrees with that of eager steps, in the root mean square.

    The largest error of a weight says little: with a gradient that is nothing but rounding, Adam moves a weight by as
    much as with any other, in either direction. The tolerances are those of tests/training/test_captured.py.
    """
    points = len(recipe.dataset.shape) == 1
    share = 0.2 if recipe.config.precision == "bf16" else 1e-3 if points else 1e-2
    count = 33 if points else 8
    weights = []
    with fp32_products(torch.backends.cudnn, "ieee"):  # rounding to TF32 can change Adam's steps considerably
        for make, each in ((kind, config), (eager, recipe.config)):
            work = recipe.work(each)
            taker, first = make(work), 0
            for length in taker.chunks(count):
                taker.take(first, length)
                first += length
            weights.append([weight.detach() for weight in work.model.parameters()])
    error = max(float((ours - theirs).square().mean().sqrt()) for ours, theirs in zip(*weights, strict=True))
    return {**check("a parameter", error, count * recipe.config.lr * share), **prove_finite(run, losses)}


def prove_finite(run: Run, losses: Tensor) -> Figures:
    """Checks only that the loss is finite, for steps that are the reference or have been checked otherwise."""
    loss = float(losses.float().mean())
    check("the loss", 0.0 if math.isfinite(loss) else math.inf, 0.0)
    return {"loss": loss}
