"""How good the recipes are on the swiss roll: ``python -m fastsde.benchmarks.recipes``.

Each is trained on 100,000 points and judged by the mean sliced 1-Wasserstein distance of 10,000 samples to fresh data,
beside that of two sets of fresh data, for three seeds of the samples.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fastsde.openmp import wait_passively

if __name__ == "__main__":
    wait_passively()  # before torch is loaded

from fastsde.training import Trainer
from fastsde.training.recipes import RECIPES

from .quality import report, swiss_roll_distance

POINTS, SEEDS = 100_000, (0, 1, 2)
SOLVERS = {  # the papers' own samplers, or their deterministic second-order one
    "default": ("euler_maruyama", 999),
    "tutorial": ("euler_maruyama", 999),
    "ddpm": ("ddpm", 999),
    "edm": ("heun", 99),
    "flow": ("heun", 99),
}


def judge(recipe: str, steps: int | None = None) -> dict[str, Any]:
    """Trains a recipe and returns its distances by seed."""
    config = replace(RECIPES[recipe]("swiss-roll"), data_size=POINTS)
    config = config if steps is None else replace(config, steps=steps)
    solver, rows = SOLVERS[recipe]
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Trainer(config, Path(folder) / "run").train()
    seconds = time.time() - started
    found = [swiss_roll_distance(checkpoint, seed=seed, solver=solver, steps=rows) for seed in SEEDS]
    distances = {name: [round(each[name], 5) for each in found] for name in found[0]}
    return {"solver": solver, "rows": rows, "steps": config.steps, "training_s": round(seconds, 1), **distances}


@click.command()
@click.option("--steps", type=click.IntRange(1), help="Training steps, instead of the recipe's.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to keep the figures as JSON.")
def main(steps: int | None, out: Path | None) -> None:
    """Train and judge every recipe; prints the figures as JSON."""
    report({"points": POINTS, "recipes": {name: judge(name, steps) for name in RECIPES}}, out)


if __name__ == "__main__":
    main()
