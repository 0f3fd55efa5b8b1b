"""``fastsde encode``, and the latents that ``fastsde sample`` reads back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..vocabulary import SOLVERS, SPACINGS
from .common import PATH, load_checkpoint, reports_errors, suffix, takes_factory
from .observed import conditions_of, load_data, takes_data

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoints import Checkpoint


# How `fastsde.encode` and `fastsde.decode` run the flow by default.
_FLOW: dict[str, Any] = {"solver": "dpm_solver_pp_2m", "steps": 100, "spacing": "log_snr"}


@click.command()
@click.argument("model")
@takes_data
@takes_factory
@click.option(
    "--solver",
    type=click.Choice(SOLVERS),
    default=_FLOW["solver"],
    show_default=True,
    help="Name of the solver, one that draws no noise.",
)
@click.option(
    "--steps", type=click.IntRange(1), default=_FLOW["steps"], show_default=True, help="Number of network calls."
)
@click.option("--spacing", type=click.Choice(SPACINGS), default=_FLOW["spacing"], show_default=True)
@click.option("--t-start", type=float, help="Time that the data are taken to be at.  [default: the process's t_min]")
@click.option("--device", help="Such as cpu or cuda:0.  [default: cuda if available, else cpu]")
@click.option("--compile", is_flag=True, help="Run the network through torch.compile.")
@click.option("--max-batch", type=click.IntRange(1), help="The most samples that run at once.")
@click.option(
    "--save",
    type=PATH,
    callback=suffix(".safetensors", ".npz"),
    required=True,
    help="Latents as .safetensors or .npz, for 'fastsde sample --latents'.",
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
@reports_errors
def encode(
    model: str,
    data: str | None,
    data_root: Path | None,
    n: int | None,
    label: str | None,
    factory: str | None,
    t_start: float | None,
    device: str | None,
    save: Path,
    quiet: bool,
    **options: Any,
) -> None:
    """Run the probability flow of MODEL from data up to noise, and write the latents.

    Prints the file's path, and on stderr the command that takes the latents back.
    """
    from .. import distributed, latents
    from ..files import check_writable
    from . import output

    check_writable(save)
    on_device = distributed.device(device)
    checkpoint = load_checkpoint(model, on_device, factory)
    dataset = load_data(checkpoint, data, data_root, n)
    given = conditions_of(model, checkpoint, dataset, label, on_device)
    x = dataset.x.to(on_device).float() * (dataset.scale or 1.0) + (dataset.shift or 0.0)
    low = checkpoint.sde.t_min if t_start is None else t_start
    z = latents.encode(checkpoint, x, t_start=low, model_kwargs=given, progress=not quiet, **options)
    output.save_arrays(save, {"latents": z, **given})
    click.echo(save)
    back = f"--solver {options['solver']} --steps {options['steps']} --spacing {options['spacing']} --t-end {low:g}"
    click.echo(f"to decode: fastsde sample {model} --latents {save} {back}", err=True)


def decoding(context: click.Context, checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the flow that takes latents back, of the options of ``fastsde sample`` that were not given."""
    flow = {**_FLOW, "t_end": checkpoint.sde.t_min}
    return {
        name: value for name, value in flow.items() if context.get_parameter_source(name) is ParameterSource.DEFAULT
    }


def read_latents(path: Path, checkpoint: Checkpoint, n: int | None, device: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the latents of a file and the conditions that they were encoded with.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: for a file without latents, or not for this checkpoint.
    """
    from zipfile import BadZipFile

    import numpy as np
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"there are no latents {path}: 'fastsde encode' writes them")
    try:
        if path.suffix.lower() == ".npz":
            with path.open("rb") as file, np.load(file) as archive:
                arrays = {name: torch.from_numpy(archive[name]) for name in archive.files}
        else:
            arrays = load_file(path)
    except (SafetensorError, BadZipFile, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    z = arrays.pop("latents", None)
    if z is None or tuple(z.shape[1:]) != checkpoint.shape:
        came = "none" if z is None else list(z.shape)
        raise ValueError(f"{path} must hold latents of shape [n, {', '.join(map(str, checkpoint.shape))}], got {came}")
    if not z.is_floating_point() or not len(z):
        raise ValueError(f"{path} must hold floating-point latents, at least one, got {len(z)} of {z.dtype}")
    if n not in (None, len(z)):
        raise ValueError(f"{path} holds {len(z)} latents: leave -n out, got {n}")
    return z.to(device), {name: arrays[name].to(device) for name in checkpoint.conditions if name in arrays}
