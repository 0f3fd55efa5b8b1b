"""Training: a recipe and its data."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
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
    """``steps`` steps of training on data that lie on the device."""

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
        """A new network and its optimizer, always the same."""
        config = config or self.config
        with tempfile.TemporaryDirectory() as folder:  # which it writes to while it trains, and it does not
            trainer = Trainer(config, Path(folder) / "run", device=self.device, dataset=self.dataset)
        return Work(config, trainer.model, trainer.ema, trainer.optimizer, trainer.dataset, self.device)

    def network(self, model: nn.Module) -> Callable[..., Tensor]:
        """The model as the tutorial calls it, with x ``[B, d]`` and t ``[B, 1]``."""
        shape = self.dataset.shape

        def network(x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                f: Tensor = model(x.reshape(-1, *shape), t[:, 0])
            return f.reshape(x.shape)

        return network


def prove_weights(
    recipe: Recipe, kind: Callable[[Work], Any], config: TrainConfig, run: Run, losses: Tensor
) -> Figures:
    """After some steps the weights are those of eager ones, by the tolerance of tests/test_captured_training.py."""
    points = len(recipe.dataset.shape) == 1
    share = 0.2 if recipe.config.precision == "bf16" else 1e-3 if points else 1e-2
    count = 33 if points else 8
    weights = []
    with fp32_products(torch.backends.cudnn, "ieee"):  # rounding in TF32 is no small share of Adam's step
        for make, each in ((kind, config), (partial(EagerSteps, here=Ranks()), recipe.config)):
            work = recipe.work(each)
            taker, first = make(work), 0
            for length in taker.chunks(count):
                taker.take(first, length)
                first += length
            weights.append(torch.cat([weight.detach().flatten() for weight in work.model.parameters()]))
    error = float((weights[0] - weights[1]).abs().max())
    return {**check("a weight", error, count * recipe.config.lr * share), **prove_finite(run, losses)}


def prove_finite(run: Run, losses: Tensor) -> Figures:
    """Steps that are the reference's own, or whose loss has been checked, have come to a loss."""
    loss = float(losses.float().mean())
    check("the loss", 0.0 if math.isfinite(loss) else math.inf, 0.0)
    return {"loss": loss}
