"""``fastsde likelihood``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..vocabulary import SPACINGS, TRACES
from .common import PATH, load_checkpoint, reports_errors, suffix, takes_factory
from .observed import conditions_of, load_data, takes_data

if TYPE_CHECKING:
    from torch import Tensor


@click.command()
@click.argument("model")
@takes_data
@takes_factory
@click.option(
    "--solver",
    type=click.Choice(("rk4", "heun", "adaptive")),
    default="rk4",
    show_default=True,
    help="Solver of the probability flow.",
)
@click.option("--steps", type=click.IntRange(1), help="Number of network calls.  [default: 100]")
@click.option("--tolerance", type=float, help="Of the adaptive solver, relative and absolute.  [default: 1e-5]")
@click.option("--spacing", type=click.Choice(SPACINGS), help="Spacing of the times.  [default: log_snr]")
@click.option("--t-start", type=float, help="Time that the data are taken to be at.  [default: the process's t_min]")
@click.option(
    "--trace", type=click.Choice(TRACES), default="auto", show_default=True, help="auto: exact up to 32 elements."
)
@click.option("--probes", type=click.IntRange(1), default=1, show_default=True, help="Of Hutchinson's trace estimate.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of dequantisation and probes.")
@click.option("--device", help="Such as cpu or cuda:0.  [default: cuda if available, else cpu]")
@click.option("--compile", is_flag=True, help="Run the network through torch.compile.")
@click.option("--max-batch", type=click.IntRange(1), default=250, show_default=True, help="Samples that run at once.")
@click.option(
    "--save",
    type=PATH,
    callback=suffix(".safetensors", ".npz"),
    help="Write log_prob and bits_per_dim of each sample as .safetensors or .npz.",
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
@reports_errors
def likelihood(
    model: str,
    data: str | None,
    data_root: Path | None,
    n: int | None,
    label: str | None,
    factory: str | None,
    solver: str,
    tolerance: float | None,
    device: str | None,
    save: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Compute the log-likelihood of data under MODEL: a shipped model, a checkpoint file, or a training run.

    Prints the mean log density in nats and the bits per dimension, each with its standard error over the samples.
    8-bit images are dequantised by uniform noise, and their bits per dimension count the 256 levels.
    """
    from .. import bits_per_dim, distributed, log_prob
    from ..files import check_writable
    from ..solvers import AdaptiveODE
    from . import output

    if save is not None:
        check_writable(save)
    if tolerance is not None and solver != "adaptive":
        raise click.UsageError("--tolerance is for --solver adaptive: leave it out, or give more --steps")
    for name in ("steps", "spacing"):
        if options[name] is not None and solver == "adaptive":
            raise click.UsageError(f"--{name} is not for --solver adaptive: leave it out, or give --tolerance")
    on_device = distributed.device(device)
    checkpoint = load_checkpoint(model, on_device, factory)
    dataset = load_data(checkpoint, data, data_root, n)
    x, elements = dataset.x.to(on_device), math.prod(checkpoint.shape)
    bound = 1e-5 if tolerance is None else tolerance
    options |= {
        "solver": AdaptiveODE(rtol=bound, atol=bound) if solver == "adaptive" else solver,
        "model_kwargs": conditions_of(model, checkpoint, dataset, label, on_device),
        "progress": not quiet,
    }
    if x.is_floating_point():
        found = log_prob(checkpoint, x, **options)
        bits = -found / math.log(2) / elements
    else:
        value_range = dataset.seen_range
        bits = bits_per_dim(checkpoint, x, value_range=value_range, **options)
        low, high = value_range or (-1.0, 1.0)
        found = -(bits - 8 + math.log2(high - low)) * math.log(2) * elements
    click.echo(f"{model} on {len(x):,} samples of {dataset.name or data}")
    click.echo(f"log p:     {_estimate(found)} nats")
    click.echo(f"bits/dim:  {_estimate(bits)}")
    if save is not None:
        output.save_arrays(save, {"log_prob": found, "bits_per_dim": bits})
        click.echo(save)


def _estimate(values: Tensor) -> str:
    """Returns the mean and its standard error."""
    error = f" +- {float(values.std()) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{float(values.mean()):.4f}{error}"
