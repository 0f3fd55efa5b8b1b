"""``fastsde export``."""

from __future__ import annotations

from pathlib import Path

import click

from .common import PATH, load_checkpoint, reports_errors, suffix, takes_factory


@click.command()
@click.argument("model")
@click.argument("out", type=PATH, callback=suffix(".safetensors"))
@click.option("--dtype", type=click.Choice(("float32", "float16", "bfloat16")), default="float32", show_default=True)
@takes_factory
@reports_errors
def export(model: str, out: Path, dtype: str, factory: str | None) -> None:
    """Write the network of a checkpoint or a run to OUT.

    Leaves out what only training needs. Prints the file's path.
    """
    import torch

    from .. import checkpoints

    checkpoints.save(out, load_checkpoint(model, factory=factory), getattr(torch, dtype))
    click.echo(out)
