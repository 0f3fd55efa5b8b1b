"""Bits per dimension of MNIST's test digits: ``python -m fastsde.benchmarks.likelihood``.

With labels and without, with the standard error over the digits; and what steps, the solver, the start time and the
number of probes change, each on the same few digits.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import click

from fastsde.openmp import wait_passively

if __name__ == "__main__":
    wait_passively()  # before torch is loaded

from torch import Tensor

import fastsde
from fastsde import checkpoints, data, noise
from fastsde.checkpoints import Checkpoint
from fastsde.likelihood.divergence import DEQUANTISATION_STEP

from .quality import report

STEPS = {"rk4": (20, 40, 80, 160), "heun": (40, 80, 160)}
PROBES = (1, 4, 16)


def estimate(values: Tensor) -> dict[str, float]:
    """Returns the mean over the digits and its standard error."""
    return {
        "mean": round(float(values.mean()), 4),
        "standard_error": round(float(values.std()) / len(values) ** 0.5, 4),
    }


def study(checkpoint: Checkpoint, images: Tensor, labels: Tensor, steps: int) -> dict[str, Any]:
    """Returns what steps, start time and probes do to the mean over a few digits, given their labels."""

    def bits(**options: Any) -> Tensor:
        return fastsde.bits_per_dim(checkpoint, images, model_kwargs={"label": labels}, max_batch=50, **options)

    by_steps = {
        solver: {str(each): round(float(bits(solver=solver, steps=each).mean()), 4) for each in counts}
        for solver, counts in STEPS.items()
    }
    by_start = {f"{t:g}": round(float(bits(t_start=t, steps=steps).mean()), 4) for t in (1e-5, 1e-4, 1e-3)}
    # The probes of two seeds on the same dequantised digits differ by their own noise alone.
    low, high = checkpoint.value_range or (-1.0, 1.0)
    u = noise.uniform(noise.sample_keys(0, len(images)), DEQUANTISATION_STEP, images.shape[1:], noise.STREAM_OTHER)
    y, elements = low + (high - low) * (images + u) / 256, math.prod(images.shape[1:])
    by_probes = {}
    for count in PROBES:
        options: dict[str, Any] = {"model_kwargs": {"label": labels}, "steps": steps, "probes": count, "max_batch": 50}
        first, second = (
            fastsde.log_prob(checkpoint, y, seed=seed, **options) / elements / math.log(2) for seed in (0, 1)
        )
        by_probes[str(count)] = {
            "mean": round(8 - math.log2(high - low) - float(first.mean()), 4),
            "std_of_a_digit": round(float((first - second).square().mean() / 2) ** 0.5, 4),
        }
    return {"digits": len(images), "by_steps": by_steps, "by_t_start": by_start, "by_probes": by_probes}


@click.command()
@click.option("--model", default="mnist", show_default=True, help="The shipped model, or another checkpoint of digits.")
@click.option("--data", "root", help="The folder of MNIST.  [default: data]")
@click.option("-n", default=200, show_default=True, help="How many digits, from the start of the test set.")
@click.option("--few", default=20, show_default=True, help="How many of them the studies of steps and probes take.")
@click.option("--steps", default=100, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Where to keep the figures as JSON.")
def main(model: str, root: str | None, n: int, few: int, steps: int, out: Path | None) -> None:
    """Measure the bits per dimension of test digits; prints the figures as JSON."""
    started = time.time()
    checkpoint = checkpoints.load(model)
    images, labels = (each[:n] for each in data.mnist_files(root or data.DEFAULT_ROOT, train=False))
    how: dict[str, Any] = {"steps": steps, "max_batch": 50, "progress": True}
    given = fastsde.bits_per_dim(checkpoint, images, model_kwargs={"label": labels}, **how)
    seconds = time.time() - started
    none = fastsde.bits_per_dim(checkpoint, images, **how)
    result = {
        "subject": model,
        "n": len(images),
        "solver": "rk4",
        "steps": steps,
        "t_start": checkpoint.sde.t_min,
        "bits_per_dim_given_labels": estimate(given),
        "bits_per_dim_without_labels": estimate(none),
        "seconds_given_labels": round(seconds, 1),
        "study": study(checkpoint, images[:few], labels[:few], steps),
        "trained_steps": checkpoint.record["step"] + checkpoint.record.get("earlier_steps", 0),
        "seconds": round(time.time() - started, 1),
    }
    report(result, out)


if __name__ == "__main__":
    main()
