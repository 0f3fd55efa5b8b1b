"""``fastsde verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..vocabulary import VERIFIED_DTYPES
from .common import PATH, load_checkpoint, reports_errors, takes_solver
from .info import version


@click.command()
@click.argument("model", default="swiss-roll")
@click.option("-n", type=click.IntRange(1), help="Number of samples.  [default: 256 points, 4 images]")
@takes_solver
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the samples.")
@click.option("--device", help="Such as cpu or cuda:0.  [default: cuda if available, else cpu]")
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(VERIFIED_DTYPES),
    multiple=True,
    help="Dtype that the network runs in; may be repeated.  [default: float32 and bfloat16, on a GPU float16 too]",
)
@click.option("--compile", is_flag=True, help="Run each backend through torch.compile too.")
@click.option("--json", "out", type=PATH, help="Also write the results to a file.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@reports_errors
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

    MODEL may also be an untrained network: residual, film, or ddpm-unet if diffusers is installed.

    Prints a table of the differences from the reference in float64. The exit code is 1 if a backend fails: if its RMS
    is not finite, or above twice that of plain PyTorch in the same dtype plus a small constant. MODEL defaults to
    swiss-roll.
    """
    from .. import distributed
    from .. import verify as verification
    from ..files import check_writable
    from ..networks import NETWORKS

    if out is not None:
        check_writable(out)
    on_device = distributed.device(device)
    named = NETWORKS.get(model)
    subject = load_checkpoint(model, on_device) if named is None else named
    n = n or verification.default_n(subject.shape)
    types = [verification.DTYPES[name] for name in dtypes] or None
    given: Any = subject if named is None else model
    results = verification.verify(given, n=n, device=on_device, dtypes=types, progress=not quiet, **options)
    about = {"model": model, "n": n, **options, **verification.machine(on_device), "triton": version("triton")}
    if out is not None:
        verification.write_json(out, results, about)
    click.echo("{model}: {n} samples, {solver}, {steps} steps, seed {seed}".format(**about))
    click.echo("{device}, torch {torch}, fp32 products: {fp32_products}\n".format(**about))
    click.echo("\n".join(verification.table(results)))
    judged = [result for result in results if result.verdict in ("pass", "fail")]
    failed = ", ".join(str(result) for result in results if result.verdict == "fail")
    if failed or not judged:
        raise click.ClickException(f"failed the check: {failed}" if failed else "no backend could be checked")
