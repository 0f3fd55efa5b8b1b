"""``fastsde train``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..vocabulary import (
    DATASETS,
    LR_SCHEDULES,
    PRECONDITIONINGS,
    PREDICTIONS,
    PROCESSES,
    RECIPES,
    TIMES,
    TRAINING_DTYPES,
    WEIGHTINGS,
)
from .common import check_model, job, reports_errors

if TYPE_CHECKING:
    import torch

    from ..training import TrainConfig


@click.command()
@click.argument("dataset", type=click.Choice(DATASETS), required=False)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Your own data: an .npy, .npz or .safetensors file, or a folder of images, with a subfolder for each class; "
    "or for mnist the folder that holds it.  [default: data]",
)
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the run.  [default: runs/DATASET]",
)
@click.option(
    "--model",
    metavar="MODULE:FUNCTION",
    help="The function that makes your own network, such as networks:make, called as model(x, t, **conditions).",
)
@click.option("--resume", is_flag=True, help="Go on from the folder's checkpoint, or start if there is none.")
@click.option(
    "--recipe",
    type=click.Choice(RECIPES),
    help="Objective and options: this package's own, the tutorial's, or those of a paper.  [default: default]",
)
@click.option("--data-size", type=click.IntRange(1), help="Points of the swiss roll, or samples from the set's start.")
@click.option("--image-size", type=click.IntRange(1), help="Height and width that a folder's images are cropped to.")
@click.option("--flip/--no-flip", default=None, help="Mirror each image from left to right in half of the steps.")
@click.option("--workers", type=click.IntRange(0), help="Processes that load data that do not fit into memory.")
@click.option("--condition-dropout", type=float, help="Share of samples that are trained without label, for guidance.")
@click.option("--steps", type=click.IntRange(1), help="Steps of the whole run, over which a cosine lr falls to zero.")
@click.option("--batch-size", type=click.IntRange(1), help="Samples in each step.")
@click.option("--accumulation", type=click.IntRange(1), help="Parts of a batch, one after the other in memory.")
@click.option("--lr", type=float, help="Learning rate of Adam.")
@click.option(
    "--lr-schedule", type=click.Choice(LR_SCHEDULES), help="How the learning rate changes after it has risen."
)
@click.option("--lr-warmup", type=click.IntRange(0), help="Steps in which the learning rate rises.")
@click.option("--weight-decay", type=float, help="Weight decay of AdamW.")
@click.option("--clip-norm", type=float, help="The largest norm of the gradient.")
@click.option("--ema-decay", type=float, help="Decay of the averaged weights that are sampled from; 0 keeps none.")
@click.option("--sde", type=click.Choice(PROCESSES), help="The process, with its default parameters.")
@click.option("--prediction", type=click.Choice(PREDICTIONS), help="What the network learns.")
@click.option("--weighting", type=click.Choice(WEIGHTINGS), help="Weighting of the loss over time.")
@click.option("--preconditioning", type=click.Choice(PRECONDITIONINGS), help="EDM's scalings, with --prediction x0.")
@click.option("--sigma-data", type=float, help="The standard deviation of the data that EDM scales by.")
@click.option("--times", type=click.Choice(TIMES), help="The distribution of training times.")
@click.option("--time-mean", type=float, help="Mean of ln t for lognormal times.")
@click.option("--time-std", type=float, help="Standard deviation of ln t for lognormal times.")
@click.option(
    "--dtype",
    type=click.Choice(tuple(TRAINING_DTYPES)),
    help="Dtype that the network runs in.  [default: bfloat16 for images on a GPU, else float32]",
)
@click.option("--compile/--no-compile", default=None, help="Run the network through torch.compile.")
@click.option("--seed", type=click.IntRange(0), help="Seed of the weights, the data order, the times and the noise.")
@click.option("--init", help="Start from the weights of a checkpoint, a run or a shipped model.")
@click.option(
    "--checkpoint-every", type=click.IntRange(1), help="Steps between checkpoints, at least ten seconds apart."
)
@click.option("--log-every", type=click.IntRange(1), help="Steps between log lines, written every two seconds.")
@click.option("--sample-every", type=click.IntRange(1), help="Steps between pictures of samples in the run's folder.")
@click.option("--tensorboard", is_flag=True, help="Log to TensorBoard as well, in the run's folder.")
@click.option("--device", help="Such as cpu or cuda:0.  [default: cuda if available, else cpu]")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@reports_errors
def train(dataset: str | None, directory: Path | None, data: Path | None, **options: Any) -> None:
    """Train a score network on DATASET, or on your own --data, and keep the run in a folder.

    Options that are not given come from the recipe, or with --resume from the run, except --model. To train a finished
    run further, start a new one from it: --init OLD --dir NEW. Prints the checkpoint's path.
    """
    if dataset is None and data is None:
        raise click.UsageError(f"give a DATASET, one of {', '.join(DATASETS)}, or your own --data")
    if dataset not in (None, "mnist") and data is not None:
        raise click.UsageError(f"--data is for your own data or the folder of MNIST, and {dataset} needs neither")
    name = dataset or str(data)
    directory = directory or Path("runs") / (dataset or Path(name).resolve().stem)
    _train(name, directory, data if dataset == "mnist" else None, **options)


@job
def _train(
    dataset: str,
    directory: Path,
    data_root: Path | None,
    *,
    resume: bool,
    recipe: str | None,
    sde: str | None,
    dtype: str | None,
    device: str | None,
    quiet: bool,
    tensorboard: bool,
    **options: Any,
) -> None:
    from .. import data, distributed, training
    from ..checkpoints import RUN_CHECKPOINT
    from ..sde import from_dict

    if options["init"]:
        check_model(options["init"])
    on_device = distributed.device(device)
    options["sde"] = None if sde is None else from_dict({"name": sde})
    options["precision"] = None if dtype is None else TRAINING_DTYPES[dtype]
    config, loaded = _config(dataset, directory, recipe, on_device, resume, options)
    root = data.DEFAULT_ROOT if data_root is None else data_root
    given: dict[str, Any] = {"dataset": loaded, "data_root": root, "tensorboard": tensorboard}
    trainer = training.Trainer(config, directory, device=on_device, resume=resume, **given)
    ranks = distributed.ranks() or distributed.Ranks()
    if ranks.rank == 0 and not quiet:
        click.echo(f"{directory}: {_in_words(config, ranks.world, list(trainer.conditions))}", err=True)
    try:
        trainer.train(progress=not quiet)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped at step {trainer.step:,}, which is saved; go on with --resume") from None
    if ranks.rank == 0:
        click.echo(directory / RUN_CHECKPOINT)


def _config(
    dataset: str, directory: Path, recipe: str | None, device: torch.device, resume: bool, options: dict[str, Any]
) -> tuple[TrainConfig, Any]:
    """Returns the config of the run or of the recipe, with the given options applied, and the data if it has them."""
    from .. import training
    from ..checkpoints import RUN_CHECKPOINT

    checkpoint, loaded = directory / RUN_CHECKPOINT, None
    if resume and checkpoint.exists():
        config = training.saved_config(checkpoint)
        if config.data != dataset:
            raise ValueError(f"the run in {directory} trains on {config.data}, not on {dataset}")
        if recipe is not None:
            raise ValueError(f"the run in {directory} has its recipe already: leave --recipe out to resume it")
        if config.model and isinstance(config.model, str) and options["model"] is None:
            raise ValueError(
                f"the run in {directory} trains a network of your own: give the function that makes it, as --model "
                f"{config.model}, since nothing that a file names is imported"
            )
    else:
        config, loaded = _recipe(dataset, recipe, options)
        if device.type == "cuda" and config.architecture == "UNet" and recipe != "tutorial":
            config = replace(config, precision="bf16")
    config = replace(config, **{name: value for name, value in options.items() if value is not None})
    if options["sigma_data"] is not None and config.preconditioning != "edm":
        raise click.UsageError("--sigma-data is what --preconditioning edm scales by: give both, or neither")
    return config, loaded


def _recipe(dataset: str, recipe: str | None, options: dict[str, Any]) -> tuple[TrainConfig, Any]:
    """Returns the recipe for a data set by name, or for a file or folder, which it returns as well."""
    from .. import data, training

    if dataset in DATASETS:
        return training.recipes.RECIPES[recipe or "default"](dataset), None
    if recipe is not None:
        raise ValueError("--recipe is for the data sets known by name: leave it out")
    loaded = data.load(dataset, size=options["data_size"], image_size=options["image_size"])
    return training.config_for(loaded, dataset, options["model"]), loaded


def _in_words(config: TrainConfig, world: int, conditions: list[str]) -> str:
    processes = f" on {world} processes" if world > 1 else ""
    dtype = next(name for name, precision in TRAINING_DTYPES.items() if precision == config.precision)
    return (
        f"{config.steps:,} steps of batch {config.batch_size}{processes}, "
        f"lr {config.lr:g} {config.lr_schedule}, {config.sde.name}, {config.prediction}, {dtype}, "
        f"{'given ' + ' and '.join(conditions) + ', ' if conditions else ''}seed {config.seed}"
    )
