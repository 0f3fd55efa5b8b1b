"""``fastsde bench``."""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from .common import PATH, reports_errors, suffix


@click.command()
@click.option("--suite", "subjects", multiple=True, help="Only this subject; may be given several times. See --list.")
@click.option("--list", "names_only", is_flag=True, help="List the subjects and what they time, and run nothing.")
@click.option("--quick", is_flag=True, help="Small sizes, in three minutes, instead of half an hour on two cores.")
@click.option("--device", help="cpu or cuda.  [default: cuda where there is one, else cpu]")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Time for all of it: there are fewer rounds, and what does not fit is left out.  [default: 3 with --quick]",
)
@click.option("--out", type=PATH, callback=suffix(".json"), help="Where to keep the figures, after each case.")
@reports_errors
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
    for option, given in (("--minutes", minutes), ("--out", out)):
        if names_only and given is not None:
            raise click.UsageError(f"--list runs nothing: leave {option} out")
    from .. import distributed
    from ..files import check_writable

    suite = importlib.import_module("fastsde.benchmarks.suite.run")
    unknown = sorted(set(subjects) - set(suite.SUBJECTS))
    if unknown:
        raise click.BadParameter(
            f"{', '.join(unknown)} is not one of {', '.join(suite.SUBJECTS)}; give it once for each",
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
