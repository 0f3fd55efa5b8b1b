"""The ``fastsde`` command. Results go to stdout, all else to stderr.

Exit codes: 0, 1 for errors, 2 for wrong usage, 130 after Ctrl-C.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from . import __version__, checkpoints, data, distributed, engines, ops, solvers, training
from . import verify as verification
from .checkpoints import Checkpoint
from .files import atomic_path, check_writable
from .reference import WEIGHTINGS
from .sampler import Sampler

__all__ = ["main"]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FRAMES = 60
_PICTURES, _ARRAYS = (".png", ".jpg", ".jpeg", ".webp"), (".safetensors", ".npz")


def _reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turns the errors that a user can mend into one line on stderr and exit code 1."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, RuntimeError) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return wrapped


def _suffix(*allowed: str) -> Callable[[click.Context, click.Parameter, Path | None], Path | None]:
    """A callback that refuses paths of other suffixes before any work is done."""

    def check(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
        if path is not None and path.suffix.lower() not in allowed:
            raise click.BadParameter(f"{path} must end in {' or '.join(allowed)}")
        return path

    return check


def _max_batch(context: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
    """A count, or "auto"."""
    if value in (None, "auto"):
        return value
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value} is neither a count of at least 1 nor auto")
    return int(value)


_path = click.Path(path_type=Path, dir_okay=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fastsde")
def main() -> None:
    """Sample and train score-based generative models on the variance-preserving SDE."""


@main.command()
@click.argument("model")
@click.option("-n", type=click.IntRange(1), help="How many samples.  [default: 1000 points, 20 images]")
@click.option("--solver", type=click.Choice(solvers.SOLVERS), default="euler_maruyama", show_default=True)
@click.option("--steps", type=click.IntRange(1), default=999, show_default=True, help="Calls of the network.")
@click.option("--t-end", type=float, default=0.0, show_default=True, help="Time that the trajectory ends at.")
@click.option("--clip", type=float, help="Bound of the predicted data; for ddpm, ddim and dpm_solver_pp_2m.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--first-sample", type=click.IntRange(0), default=0, help="Global index of the first sample.")
@click.option("--device", help="Such as cpu or cuda:0.  [default: cuda where there is one, else cpu]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="What the network runs in.  [default: float32]")
@click.option("--backend", type=click.Choice(engines.BACKENDS), default="auto", show_default=True)
@click.option("--compile", is_flag=True, help="Run the network through torch.compile.")
@click.option(
    "--max-batch", callback=_max_batch, help="The most samples that run at once, or auto for as many as are fastest."
)
@click.option(
    "--out",
    type=_path,
    callback=_suffix(*_PICTURES),
    help="Picture of the samples: .png, .jpg or .webp.  [default: MODEL.png, where nothing else is written]",
)
@click.option("--save", type=_path, callback=_suffix(*_ARRAYS), help="The samples as .safetensors or .npz.")
@click.option("--animate", type=_path, callback=_suffix(".gif"), help="The way from noise to data as a GIF.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@_reports_errors
@distributed.job
def sample(
    model: str,
    n: int | None,
    out: Path | None,
    save: Path | None,
    animate: Path | None,
    seed: int,
    first_sample: int,
    quiet: bool,
    dtype: str | None,
    device: str | None,
    **options: Any,
) -> None:
    """Draw samples from MODEL: swiss-roll, mnist, a checkpoint file, or the folder of a training run.

    Prints the files that it writes. Under torchrun the processes share the work, and the first of them writes.
    """
    on_device, ranks = _device(device), distributed.ranks()
    leads = ranks is None or ranks.rank == 0
    checkpoint = checkpoints.load(model, device=on_device)
    images = len(checkpoint.shape) == 3
    if out is None and save is None and animate is None:
        out = _default_picture(model)
    if (out or animate) and not (images and checkpoint.shape[0] in (1, 3)) and checkpoint.shape != (2,):
        raise ValueError(f"samples of shape {list(checkpoint.shape)} have no picture: write them with --save")
    for target in (out, save, animate):
        if target is not None and leads:
            check_writable(target)
    step, steps = checkpoint.record.get("step", 0), checkpoint.record.get("config", {}).get("steps", 0)
    if step < steps and leads:
        click.echo(f"{model} has come to step {step:,} of {steps:,}", err=True)
    sampler = Sampler(
        checkpoint.model,
        checkpoint.shape,
        sde=checkpoint.sde,
        prediction=checkpoint.prediction,
        dtype=None if dtype is None else DTYPES[dtype],
        **options,
    )
    n = n or (20 if images else 1000)
    every = max(1, len(sampler.table) // _FRAMES) if animate else None
    draw = sampler if ranks is None else functools.partial(distributed.sample, sampler)
    result = draw(n, seed=seed, first_sample=first_sample, trajectory=every, progress=not quiet)
    if not leads:
        return
    x, states = result if animate else (result, None)
    if save:
        _save_samples(save, x)
        click.echo(save)
    if out:
        _picture(checkpoint, x, out)
        click.echo(out)
    if animate and every and states is not None:
        times = [*sampler.table.time.tolist(), options["t_end"]][::every]
        _animation(checkpoint, torch.cat((states, x[None])).to(on_device), [*times, options["t_end"]], animate)
        click.echo(animate)


def _default_picture(model: str) -> Path:
    """mnist.png for the shipped model; runs-mnist.png for the run in runs/mnist, so that neither replaces the other."""
    source = Path(model)
    if source.suffix == ".safetensors":
        return Path(source.stem + ".png")
    parts = [part for part in source.parts if part not in ("/", ".", "..")] or [source.resolve().name]
    return Path("-".join(parts) + ".png")


def _device(device: str | None) -> torch.device:
    return distributed.device(device)


def _save_samples(path: Path, x: Tensor) -> None:
    x = x.cpu().contiguous()
    with atomic_path(path) as temporary:
        if path.suffix.lower() == ".npz":
            with temporary.open("wb") as file:  # given a name, NumPy would append a suffix of its own
                np.savez_compressed(file, samples=x.numpy())
        else:
            save_file({"samples": x}, temporary)


def _columns(n: int) -> int | None:
    return 10 if 10 < n <= 100 else None


def _picture(checkpoint: Checkpoint, x: Tensor, path: Path) -> None:
    from . import plotting

    if checkpoint.shape == (2,):
        fresh = data.swiss_roll(len(x), seed=1).x if checkpoint.data == "swiss-roll" else None
        picture = plotting.scatter(x, fresh)
    else:
        picture = plotting.image_grid(x, checkpoint.value_range or (-1.0, 1.0), _columns(len(x)), scale=3)
    plotting.save_image(picture, path)


def _animation(checkpoint: Checkpoint, states: Tensor, times: Sequence[float], path: Path) -> None:
    from . import plotting

    def score(x: Tensor, t: float) -> Tensor:
        # Near t = 0 the score grows without bound, so that the last frames show the field of a small time.
        t = max(t, training.TrainConfig.t_min)
        r, s = solvers.score_form(
            checkpoint.sde, torch.tensor([t], dtype=torch.float64, device="cpu"), checkpoint.prediction
        )
        with torch.no_grad():
            f: Tensor = checkpoint.model(x, torch.full((len(x),), t, device=x.device))
        return float(r) * x + float(s) * f

    if checkpoint.shape == (2,):
        frames = plotting.animate_points(states.float(), times, score)
    else:
        frames = plotting.animate_images(states, checkpoint.value_range or (-1.0, 1.0), _columns(states.shape[1]))
    plotting.save_gif(frames, path)


@main.command()
@click.argument("dataset", type=click.Choice(data.DATASETS))
@click.option("--dir", "directory", type=click.Path(path_type=Path, file_okay=False), help="[default: runs/DATASET]")
@click.option("--resume", is_flag=True, help="Go on from the folder's checkpoint; start where there is none.")
@click.option(
    "--recipe",
    type=click.Choice(("default", "tutorial")),
    help="The tutorial's own objective, or a better one.  [default: default]",
)
@click.option(
    "--data",
    "data_root",
    type=click.Path(path_type=Path),
    default=data.DEFAULT_ROOT,
    help="Folder of MNIST.  [default: data]",
)
@click.option("--data-size", type=click.IntRange(1), help="Points of the swiss roll, or first images of the set.")
@click.option("--steps", type=click.IntRange(1), help="Steps of the whole run, in which a cosine lr falls to zero.")
@click.option("--batch-size", type=click.IntRange(1))
@click.option("--lr", type=float, help="Learning rate of Adam.")
@click.option("--lr-schedule", type=click.Choice(training.LR_SCHEDULES))
@click.option("--lr-warmup", type=click.IntRange(0), help="Steps in which the learning rate rises.")
@click.option("--ema-decay", type=float, help="Of the average of the weights that is sampled from; 0 keeps none.")
@click.option("--prediction", type=click.Choice(solvers.PREDICTIONS), help="What the network learns.")
@click.option("--weighting", type=click.Choice(WEIGHTINGS), help="Of the loss over time.")
@click.option(
    "--precision", type=click.Choice(training.PRECISIONS), help="[default: bf16 for images on a GPU, else fp32]"
)
@click.option("--compile/--no-compile", default=None, help="Run the network through torch.compile.")
@click.option("--seed", type=click.IntRange(0))
@click.option("--init", help="Start from the weights of a checkpoint, a run or a shipped model.")
@click.option("--checkpoint-every", type=click.IntRange(1))
@click.option("--log-every", type=click.IntRange(1))
@click.option("--device", help="Such as cpu or cuda:0.  [default: cuda where there is one, else cpu]")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@_reports_errors
@distributed.job
def train(
    dataset: str,
    directory: Path | None,
    resume: bool,
    recipe: str | None,
    data_root: Path,
    device: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Train a score network on DATASET and keep the run in a folder.

    Options that are not given come from the recipe, or on --resume from the run. A run that is done is trained further
    by a new one: --init OLD --dir NEW. Prints the checkpoint's path.
    """
    directory = directory or Path("runs") / dataset
    checkpoint = directory / checkpoints.RUN_CHECKPOINT
    on_device = _device(device)
    if resume and checkpoint.exists():
        config = training.saved_config(checkpoint)
        if config.data != dataset:
            raise ValueError(f"the run in {directory} trains on {config.data}, not on {dataset}")
        if recipe is not None:
            raise ValueError(f"the run in {directory} has its recipe already: leave --recipe out to resume it")
    else:
        config = (training.tutorial_config if recipe == "tutorial" else training.default_config)(dataset)
        if on_device.type == "cuda" and config.model["architecture"] == "UNet" and recipe != "tutorial":
            config = replace(config, precision="bf16")
    config = replace(config, **{name: value for name, value in options.items() if value is not None})
    trainer = training.Trainer(config, directory, device=on_device, data_root=data_root, resume=resume)
    ranks = distributed.ranks() or distributed.Ranks()
    leads = ranks.rank == 0
    if leads and not quiet:
        processes = f" on {ranks.world} processes" if ranks.world > 1 else ""
        click.echo(
            f"{directory}: {config.steps:,} steps of batch {config.batch_size}{processes}, "
            f"lr {config.lr:g} {config.lr_schedule}, {config.prediction}, {config.precision}, seed {config.seed}",
            err=True,
        )
    try:
        trainer.train(progress=not quiet)
    except KeyboardInterrupt:
        if leads:
            click.echo(f"\nstopped at step {trainer.step:,}, which is saved; --resume goes on", err=True)
        raise
    if leads:
        click.echo(checkpoint)


@main.command()
@click.argument("model")
@click.argument("out", type=_path, callback=_suffix(".safetensors"))
@click.option("--dtype", type=click.Choice(("float32", "float16", "bfloat16")), default="float32", show_default=True)
@_reports_errors
def export(model: str, out: Path, dtype: str) -> None:
    """Write the network of a checkpoint or a run.

    Without what only training needs. Prints the file's path.
    """
    checkpoints.save(out, checkpoints.load(model), DTYPES[dtype])
    click.echo(out)


@main.command()
@click.argument("model", default="swiss-roll")
@click.option("-n", type=click.IntRange(1), help="How many samples.  [default: 256 points, 4 images]")
@click.option("--solver", type=click.Choice(solvers.SOLVERS), default="euler_maruyama", show_default=True)
@click.option("--steps", type=click.IntRange(1), default=999, show_default=True, help="Calls of the network.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--device", help="Such as cpu or cuda:0.  [default: cuda where there is one, else cpu]")
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(tuple(verification.DTYPES)),
    multiple=True,
    help="What the network runs in; may be given again.  [default: float32 and bfloat16, on a GPU float16 too]",
)
@click.option("--compile", is_flag=True, help="Run each backend through torch.compile too.")
@click.option("--json", "out", type=_path, help="Write the results to a file, too.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@_reports_errors
def verify(
    model: str,
    n: int | None,
    device: str | None,
    dtypes: tuple[str, ...],
    out: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Check every backend against the reference, on MODEL: a shipped model, a checkpoint or a training run.

    Prints a table of the differences from the reference in float64. Exit code 1 where a backend fails: where its RMS is
    above twice that of plain PyTorch in the same dtype and a small constant, or not finite. MODEL is swiss-roll where
    it is not given.
    """
    if out is not None:
        check_writable(out)
    checkpoint = checkpoints.load(model, device=_device(device))
    n = n or verification.default_n(checkpoint.shape)
    types = [verification.DTYPES[name] for name in dtypes] or None
    results = verification.verify(checkpoint, n=n, dtypes=types, progress=not quiet, **options)
    about = {"model": model, "n": n, **options, **verification.machine(_device(device)), "triton": _version("triton")}
    if out is not None:
        verification.write_json(out, results, about)
    click.echo("{model}: {n} samples, {solver}, {steps} steps, seed {seed}".format(**about))
    click.echo("{device}, torch {torch}, fp32 products: {fp32_products}\n".format(**about))
    click.echo("\n".join(verification.table(results)))
    judged = [result for result in results if result.verdict in ("pass", "fail")]
    failed = ", ".join(str(result) for result in results if result.verdict == "fail")
    if failed or not judged:
        raise click.ClickException(f"not as the reference: {failed}" if failed else "no backend could be checked")


@main.command()
@click.option("--suite", "subjects", multiple=True, help="Only this subject; may be given several times. See --list.")
@click.option("--list", "names_only", is_flag=True, help="List the subjects and what they time, and run nothing.")
@click.option("--quick", is_flag=True, help="Small sizes: two or three minutes on two cores, instead of half an hour.")
@click.option("--device", help="cpu or cuda.  [default: cuda where there is one, else cpu]")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Begin nothing after so many minutes.")
@click.option("--out", type=_path, callback=_suffix(".json"), help="Where to keep the figures, after each case.")
@_reports_errors
def bench(
    subjects: tuple[str, ...],
    names_only: bool,
    quick: bool,
    device: str | None,
    minutes: float | None,
    out: Path | None,
) -> None:
    """Time fastsde beside what people use instead, on this machine.

    The tutorial's loops, lean eager PyTorch, torch.compile and, where they are installed, diffusers and torchsde do the
    same tasks in turn. One that computes the wrong thing has no time, and the exit code is then 1.
    """
    suite = importlib.import_module("fastsde.benchmarks.suite.run")
    unknown = sorted(set(subjects) - set(suite.SUBJECTS))
    if unknown:
        raise click.BadParameter(
            f"{', '.join(unknown)} is not one of {', '.join(suite.SUBJECTS)}; give it once for each",
            param_hint="'--suite'",
        )
    plan = suite.Plan(_device(device), quick)
    chosen = suite.cases(plan, subjects)
    if names_only:
        click.echo("\n".join(f"{case.subject:18}{case.what}" for case in chosen))
        return
    if out is not None:
        check_writable(out)
    suite.run(plan, chosen, minutes, out)


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a build of another name, such as pytorch-triton
        return "installed, version unknown"


@main.command()
def info() -> None:
    """Show versions, devices, models and backends.

    Of a backend that cannot run here, the reason is said.
    """
    rows = [("fastsde", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    for package in ("triton", "torchvision", "safetensors", "diffusers", "torchsde"):
        rows.append((package, _version(package)))
    rows.append(
        ("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    )
    rows.append(("native kernels", ops.native_state()))
    devices = [torch.device("cpu")]
    if not torch.cuda.is_available():
        rows.append(("cuda", f"not available (torch is built for {torch.version.cuda or 'the CPU only'})"))
    for index in range(torch.cuda.device_count()):
        devices.append(torch.device("cuda", index))
        rows.append(
            (
                f"cuda:{index}",
                f"{torch.cuda.get_device_name(index)}, capability {torch.cuda.get_device_capability(index)}",
            )
        )
    for device in devices:
        for backend in engines.BACKENDS[1:]:
            reason = engines.unavailable_reason(backend, device)
            rows.append((f"{backend} on {device}", "yes" if reason is None else f"no: {reason}"))
    for name in checkpoints.SHIPPED:
        record = checkpoints.load(name).record
        steps = record["step"] + record.get("earlier_steps", 0)
        rows.append((f"model {name}", f"{steps:,} steps, loss {record['loss']:.4f}"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")
