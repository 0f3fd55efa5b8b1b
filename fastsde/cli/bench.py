"""``fastsde bench``."""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from .common import PATH, reports_errors, suffix


@click.command()
@click.option("--suite", "subjects", multiple=True, help="Run only this subject; may be repeated. See --list.")
@click.option("--list", "names_only", is_flag=True, help="List the subjects and what they time, and exit.")
@click.option("--quick", is_flag=True, help="Use small sizes: three minutes instead of half an hour on two cores.")
@click.option("--device", help="cpu or cuda.  [default: cuda if available, else cpu]")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Time limit: runs fewer rounds, and skips cases that do not fit.  [default: 3 with --quick]",
)
@click.option("--out", type=PATH, callback=suffix(".json"), help="File for the figures, updated after each case.")
@reports_errors
def bench(
    subjects: tuple[str, ...],
    names_only: bool,
    quick: bool,
    device: str | None,
    minutes: float | None,
    out: Path | None,
) -> None:
    """Time fastsde against its alternatives on this machine.

    The tutorial's loops, lean eager PyTorch, torch.compile and, if installed, diffusers, torchsde, JAX, OpenVINO and
    ONNX Runtime do the same tasks in turn. An alternative that computes a wrong result gets no time, and the exit code
    is then 1.
    """
    for option, given in (("--minutes", minutes), ("--out", out)):
        if names_only and given is not None:
            raise click.UsageError(f"--list runs nothing: leave {option} out")
    from .. import distributed
    from ..files import check_writable

    suite = importlib.import_module("fastsde.benchmarks.suite.run")
    unknown = sorted(set(subjects) - set(suite.SUBJECTS))
    if unknown:
        raise click.BadParameter(
            f"{', '.join(unknown)} is not one of {', '.join(suite.SUBJECTS)}; repeat --suite for several",
            param_hint="'--suite'",
        )
    plan = suite.Plan(distributed.device(device), quick)
    chosen = suite.cases(plan, subjects)
    if names_only:
        click.echo("\n".join(f"{case.subject:18}{case.what}" for case in chosen))
        return
    if out is not None:
        check_writable(out)
    suite.run(plan, chosen, minutes, out)
