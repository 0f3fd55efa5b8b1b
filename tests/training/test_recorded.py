"""Training with a given seed keeps giving the same losses and weights, up to rounding.

The values were recorded before the objective became a table of coefficients; ``python tests/training/test_recorded.py``
prints current ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsde import ops
from fastsde.distributed import Ranks
from fastsde.training import TrainConfig, Trainer, default_config
from fastsde.training.captured import CapturedSteps
from fastsde.training.native_mlp import NativeSteps
from fastsde.training.steps import EagerSteps, Work

STEPS = 6
POINTS = replace(default_config("swiss-roll"), data_size=200, steps=100, batch_size=40, lr_warmup=3)
DIGITS = replace(
    default_config("digits"),
    model={"architecture": "UNet", "image_channels": 1, "image_size": [28, 28], "channels": [2, 3]},
    data_size=20,
    steps=100,
    batch_size=3,
    lr_warmup=3,
)
CONFIGS = {
    "points": POINTS,
    "points, score, likelihood": replace(POINTS, prediction="score", weighting="likelihood", t_min=0.01),
    "points, x0, sigma2": replace(POINTS, prediction="x0", t_min=0.02),
    "digits": DIGITS,
    "digits, v, sigma2": replace(DIGITS, weighting="sigma2"),
}
# For each config the losses of the steps, and the change of the weights (`_change`) in units of the learning rate.
RECORDED: dict[str, tuple[list[float], float]] = {
    "points": ([1.450726, 1.402366, 1.358056, 1.1652, 1.332102, 0.886959], -3.781784),
    "points, score, likelihood": ([26.25978, 12.29729, 21.60371, 19.13255, 17.71751, 12.55989], -2.483773),
    "points, x0, sigma2": ([3.482798, 0.9078296, 3.589777, 0.4339941, 0.8036035, 1.838967], -2.571053),
    "digits": ([1.047501, 1.020205, 0.9896024, 0.9766515, 0.9478897, 0.8999615], 0.5086642),
    "digits, v, sigma2": ([0.6738293, 0.1463134, 0.0008076219, 0.1391024, 0.1137507, 0.1003174], 0.8500529),
}


def _take(config: TrainConfig, make: Callable[[Work], Any], folder: Path) -> tuple[list[float], float]:
    trainer = Trainer(config, folder, device="cpu")
    before = _weights(trainer)
    steps = make(trainer.work())
    losses, first = [], 0
    for count in steps.chunks(STEPS):
        losses += steps.take(first, count).tolist()
        first += count
    return losses, _change(_weights(trainer) - before) / config.lr


def _weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([each.detach().double().flatten() for each in trainer.model.parameters()])


def _change(difference: torch.Tensor) -> float:
    """Returns a sum over all weights, each with its own factor."""
    return float((difference * torch.cos(torch.arange(len(difference)) ** 2)).sum()) / math.sqrt(len(difference))


def _assert_as_recorded(name: str, found: tuple[list[float], float]) -> None:
    losses, change = RECORDED[name]
    assert found[0] == pytest.approx(losses, rel=1e-4)
    assert found[1] == pytest.approx(change, abs=2e-3 * STEPS)


@pytest.mark.parametrize("name", CONFIGS)
def test_eager_steps(name: str, tmp_path: Path) -> None:
    _assert_as_recorded(name, _take(CONFIGS[name], lambda work: EagerSteps(work, Ranks()), tmp_path))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("points")])
def test_native_steps(name: str, tmp_path: Path) -> None:
    if not ops.has_native(torch.device("cpu"), "mlp_training"):
        pytest.skip("no C++ compiler")
    _assert_as_recorded(name, _take(CONFIGS[name], NativeSteps, tmp_path))


@pytest.mark.slow
@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("graphs", ["tape"], indirect=True)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name.startswith("points") else pytest.mark.slow) for name in CONFIGS]
)
def test_captured_steps(name: str, tmp_path: Path) -> None:
    _assert_as_recorded(name, _take(CONFIGS[name], CapturedSteps, tmp_path))


if __name__ == "__main__":
    for name, config in CONFIGS.items():
        losses, change = _take(config, lambda work: EagerSteps(work, Ranks()), Path("unused"))
        print(f'    "{name}": ({[float(f"{loss:.7g}") for loss in losses]}, {change:.7g}),')
