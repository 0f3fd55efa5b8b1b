"""``fastsde sample``."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..vocabulary import BACKENDS, DTYPES
from . import inpaint as inpainting
from .common import PATH, job, load_checkpoint, reports_errors, suffix, takes_factory, takes_solver
from .encode import decoding, read_latents

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoints import Checkpoint
    from ..guidance import Guidance
    from ..sampler import Sampler

_FRAMES = 60


def _max_batch(context: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
    """Returns a count, "auto" or None."""
    if value is None or value == "auto":
        return value
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value} is neither a count of at least 1 nor auto")
    return int(value)


def default_picture(model: str) -> Path:
    """Returns mnist.png for the shipped model and runs-mnist.png for runs/mnist, so that neither replaces the other."""
    source = Path(model)
    if source.suffix == ".safetensors":
        return Path(source.stem + ".png")
    parts = [part for part in source.parts if part not in ("/", ".", "..")] or [source.resolve().name]
    return Path("-".join(parts) + ".png")


@dataclass(frozen=True)
class Files:
    """The files to write."""

    out: Path | None
    save: Path | None
    animate: Path | None

    @property
    def draws(self) -> bool:
        """Whether a picture of the samples or an animation is drawn."""
        return self.out is not None or self.animate is not None

    @property
    def all(self) -> list[Path]:
        return [path for path in (self.save, self.out, self.animate) if path is not None]


@click.command()
@click.argument("model")
@click.option("-n", type=click.IntRange(0), help="Number of samples.  [default: 1000 points, 20 images]")
@takes_factory
@click.option(
    "--label",
    "labels",
    metavar="LABEL",
    help="Class of the samples: a number or name, several by commas, which take turns, all, or none for no label.  "
    "[default: drawn, as frequent as in the data]",
)
@click.option(
    "--latents",
    type=PATH,
    help="Take back what 'fastsde encode' wrote, with its labels and the defaults of its --solver, --steps, --spacing "
    "and time.",
)
@click.option("--guidance", type=float, help="Weight of classifier-free guidance towards the label; 1 is none.")
@click.option(
    "--guidance-interval",
    nargs=2,
    type=float,
    metavar="LOW HIGH",
    help="The times with guidance; at all others the network is called once.",
)
@click.option(
    "--guidance-rescale",
    type=float,
    metavar="PHI",
    help="How much of the growth of the output under guidance is undone, from 0 to 1.",
)
@takes_solver
@click.option("--inpaint", type=PATH, metavar="IMAGE", help="An image whose known part is completed; see --mask.")
@click.option(
    "--mask",
    metavar="PART",
    help=f"The known part of --inpaint: {', '.join(inpainting.SIDES)}, or an image that is light there.",
)
@click.option(
    "--resamples",
    type=click.IntRange(1),
    default=1,
    help="How often --inpaint does each part of the way (RePaint).",
)
@click.option("--jump", type=click.IntRange(1), default=10, help="The rows that --resamples goes back up.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the samples.")
@click.option("--first-sample", type=click.IntRange(0), default=0, help="Global index of the first sample.")
@click.option("--device", help="Such as cpu or cuda:0.  [default: cuda if available, else cpu]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Dtype that the network runs in.  [default: float32]")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="How the rows are run.")
@click.option("--compile", is_flag=True, help="Run the network through torch.compile.")
@click.option(
    "--max-batch", callback=_max_batch, help="The most samples that run at once, or auto for the fastest number."
)
@click.option(
    "--out",
    type=PATH,
    callback=suffix(".png", ".jpg", ".jpeg", ".webp"),
    help="Picture of the samples: .png, .jpg or .webp.  [default: MODEL.png, if nothing else is written]",
)
@click.option("--save", type=PATH, callback=suffix(".safetensors", ".npz"), help="Samples as .safetensors or .npz.")
@click.option("--animate", type=PATH, callback=suffix(".gif"), help="Animate the way from noise to data as a GIF.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@reports_errors
def sample(
    model: str, n: int | None, out: Path | None, save: Path | None, animate: Path | None, **options: Any
) -> None:
    """Draw samples from MODEL: swiss-roll, mnist, a checkpoint file, or the folder of a training run.

    Prints the files that it writes. Under torchrun the processes share the work, and the first of them writes.
    """
    if out is None and save is None and animate is None:
        out = default_picture(model)
    files, written = Files(out, save, animate), list[Path]()
    if (options["inpaint"] is None) != (options["mask"] is None):
        raise click.UsageError("--inpaint IMAGE and --mask PART go together: give both or neither")
    if options["inpaint"] is None and options["resamples"] > 1:
        raise click.UsageError("--resamples is for --inpaint: leave it out, or give an image")
    if n == 0 and files.draws:
        raise click.UsageError("there is no picture of 0 samples: use only --save, or draw more with -n")
    try:
        _sample(model, n, files, written, **options)
    except KeyboardInterrupt:
        so_far = f"only {', '.join(map(str, written))}" if written else "nothing"
        raise KeyboardInterrupt(f"interrupted: {so_far} was written") from None


@job
def _sample(
    model: str,
    n: int | None,
    files: Files,
    written: list[Path],
    *,
    seed: int,
    first_sample: int,
    quiet: bool,
    dtype: str | None,
    device: str | None,
    factory: str | None,
    labels: str | None,
    latents: Path | None,
    inpaint: Path | None,
    mask: str | None,
    guidance: float | None,
    guidance_interval: tuple[float, float] | None,
    guidance_rescale: float | None,
    **options: Any,
) -> None:
    """Draws samples, and writes them on the first process; ``written`` collects the paths written so far."""
    import torch

    from .. import distributed
    from ..sampler import Sampler

    on_device, ranks = distributed.device(device), distributed.ranks()
    leads = ranks is None or ranks.rank == 0
    checkpoint = load_checkpoint(model, on_device, factory)
    _check(model, checkpoint, files, leads)
    classes = _classes(model, checkpoint, labels, guidance)
    options["guidance"] = _guidance(guidance, guidance_interval, guidance_rescale)
    given = None
    if inpaint is not None and mask is not None:
        given = inpainting.known_image(model, checkpoint, inpaint, mask)
    if latents is not None:
        options |= decoding(click.get_current_context(), checkpoint)
    sampler = Sampler(checkpoint, dtype=None if dtype is None else getattr(torch, dtype), **options)
    if latents is not None and ranks is not None:
        raise ValueError("--latents is for one process: start it without torchrun")
    start, own = (None, {}) if latents is None else read_latents(latents, checkpoint, n, on_device)
    if start is not None:
        n = len(start)
    if n is None:
        n = 20 if len(checkpoint.shape) == 3 else 1000
    every = max(1, len(sampler.table) // _FRAMES) if files.animate else None
    draw = sampler if ranks is None else functools.partial(distributed.sample, sampler)
    call: dict[str, Any] = {"seed": seed, "first_sample": first_sample, "trajectory": every, "progress": not quiet}
    if start is not None:
        call |= {"x_init": start, "model_kwargs": own}
    if classes:
        chosen = [classes[(first_sample + i) % len(classes)] for i in range(n)]
        call["model_kwargs"] = {"label": torch.tensor(chosen, dtype=torch.int64, device=on_device)}
    if given is not None:
        call["mask"], call["known"] = (each.to(on_device) for each in given)
    result = draw(n, **call)
    if leads:
        _write(checkpoint, sampler, files, written, result, every, options["t_end"], given)


def _classes(model: str, checkpoint: Checkpoint, labels: str | None, guidance: float | None) -> list[int]:
    """Returns the labels that samples take in turns; an empty list if they are to be drawn, or there are none."""
    condition = checkpoint.conditions.get("label")
    if condition is None or not condition.classes:
        if labels is not None or guidance is not None:
            raise ValueError(f"{model} takes no labels: leave --label and --guidance out")
        return []
    if guidance is not None and not checkpoint.has_null:
        raise ValueError(f"--guidance needs a network trained with --condition-dropout, and {model} was not")
    if labels is None:
        return []
    if labels == "none":
        if not checkpoint.has_null:
            raise ValueError(f"{model} needs a label: it was trained without dropping them")
        return [int(condition.null or 0)]
    if labels == "all":
        return list(range(condition.classes))
    return [condition.label(each.strip()) for each in labels.split(",")]


def _guidance(scale: float | None, interval: tuple[float, float] | None, rescale: float | None) -> Guidance | None:
    """Returns the guidance that the options ask for."""
    from ..guidance import Guidance

    if scale is None:
        if interval is not None or rescale is not None:
            raise ValueError("--guidance-interval and --guidance-rescale need the weight of --guidance")
        return None
    return Guidance(scale, interval=interval, rescale=rescale or 0.0)


def _check(model: str, checkpoint: Checkpoint, files: Files, leads: bool) -> None:
    """Refuses files that could not be written after the work, and reports a run that is not finished."""
    from .. import pictures
    from ..files import check_writable

    if files.draws:
        if not pictures.has_picture(checkpoint.shape):
            raise ValueError(f"samples of shape {list(checkpoint.shape)} have no picture: write them with --save")
        pictures.check_installed(checkpoint.shape)
    if not leads:
        return
    for path in files.all:
        check_writable(path)
    step, steps = checkpoint.record.get("step", 0), checkpoint.record.get("config", {}).get("steps", 0)
    if step < steps:
        click.echo(f"{model} is at step {step:,} of {steps:,}", err=True)


def _write(
    checkpoint: Checkpoint,
    sampler: Sampler,
    files: Files,
    written: list[Path],
    result: Any,
    every: int | None,
    t_end: float,
    given: tuple[Tensor, Tensor] | None,
) -> None:
    """Writes the files and prints their paths; the states of every ``every``-th row become the animation.

    Args:
        given: the mask and the image of --inpaint, which the picture shows first.
    """
    import torch

    from .. import pictures
    from . import output

    x, states = (result, None) if every is None else result
    if files.save:
        output.save_arrays(files.save, {"samples": x})
        _tell(files.save, written)
    if files.out:
        shown = x if given is None else inpainting.with_given(checkpoint, x, *given)
        pictures.save(checkpoint, shown, files.out)
        _tell(files.out, written)
    if files.animate and states is not None:
        times = [*sampler.table.time.tolist(), t_end][::every]
        frames = torch.cat((states, x[None])).to(sampler.device)
        output.animation(checkpoint, frames, [*times, t_end], files.animate)
        _tell(files.animate, written)


def _tell(path: Path, written: list[Path]) -> None:
    written.append(path)
    click.echo(path)
