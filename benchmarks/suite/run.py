"""A run of the suite: its subjects in order, with each result shown and saved as soon as it is known."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import click
import torch

from fastsde.files import atomic_path

from .budget import expected_s, needed_s, schedule
from .case import LEFT_OUT, Case, Outcome
from .machine import Ceilings, ceilings, settings
from .measure import Figures, in_words
from .plan import Plan
from .progress import Progress, clock
from .runner import run_case
from .table import is_cut, is_ours, overview, show

SEED = 1
QUICK_MINUTES = 3.0
SUBJECTS = (  # in the order of the tables
    "noise",
    "solver_step",
    "perturb",
    "dsm_loss",
    "swiss_roll",
    "mnist",
    "loops",
    "architectures",
    "fresh_weights",
    "few_steps",
    "adaptive",
    "train_swiss_roll",
    "train_mnist",
    "network_size",
    "call",
    "startup",
)
HEADLINES = (  # they run first, and the others in the order of the tables: if time is short, the last ones are left out
    "swiss-roll-1000",
    "mnist-20",
    "mnist-1000",
    "train-swiss-roll",
    "train-mnist",
)


def cases(plan: Plan, subjects: Sequence[str] = ()) -> list[Case]:
    """Returns the cases of some subjects, or of all. Nothing is loaded or computed yet."""
    found: list[Case] = []
    for subject in SUBJECTS:
        if not subjects or subject in subjects:
            found += import_module(f"..{subject}", __package__).cases(plan)
    return found


def by_priority(chosen: Sequence[Case]) -> list[Case]:
    """Returns cases in the order in which they should run."""
    places = {name: place for place, name in enumerate(HEADLINES)}
    return sorted(chosen, key=lambda case: places.get(case.name, len(places)))


def new_result(plan: Plan) -> tuple[Figures, Ceilings]:
    """Returns the start of a result file, and the ceilings of the device, which are measured now."""
    if plan.has_gpu:
        torch.cuda.set_device(plan.device)  # for events and graphs
    torch.manual_seed(SEED)
    most = ceilings(plan.device)
    return {**settings(plan.device), "quick": plan.quick, "ceilings": most.describe(), "cases": []}, most


def outcomes(
    chosen: Sequence[Case],
    plan: Plan,
    most: Ceilings,
    ends: float = math.inf,
    progress: Progress | None = None,
) -> Iterator[Outcome]:
    """Runs cases one after the other, by priority, within the time until ``ends`` (by ``time.monotonic``)."""
    limited = [replace(case, enough=min(case.enough, plan.enough_s)) for case in chosen]
    for case, case_ends in schedule(by_priority(limited), most, ends):
        if progress is not None:
            progress.begin(f"{case.name}, {len(case.providers)} providers")
        if case_ends is None:
            reason = f"{LEFT_OUT}it takes about {needed_s(case, most):.2g} s, more than is left"
            yield Outcome({**case.head(), "failed": reason})
            continue
        say = (lambda what: None) if progress is None else progress.say
        try:
            yield run_case(case, plan.device, most, case_ends, say)
        except Exception as error:  # what its providers share cannot be created; the other cases still run
            yield Outcome({**case.head(), "failed": in_words(error)})
        torch.compiler.reset()  # its graphs keep their memory, and it compiles one function at most eight times
        if plan.has_gpu:
            torch.cuda.empty_cache()


def run(plan: Plan, chosen: Sequence[Case], minutes: float | None, out: Path | None) -> Figures:
    """Runs cases and shows the results, which are saved after each case, so that an interrupted run keeps its results.

    Args:
        minutes: the time limit for all cases; with ``plan.quick`` three minutes by default.

    Raises:
        ClickException: at the end, if a provider was wrong, or one of fastsde's failed.
    """
    if minutes is None and plan.quick:
        minutes = QUICK_MINUTES
    ends = math.inf if minutes is None else time.monotonic() + 60 * minutes
    result, most = new_result(plan)
    expected = sum(expected_s(replace(case, enough=min(case.enough, plan.enough_s)), most) for case in chosen)
    click.echo(_announcement(len(chosen), expected, minutes), err=True)
    places = {case.name: place for place, case in enumerate(chosen)}
    progress = Progress(len(chosen), min(expected, ends - time.monotonic()))
    for outcome in outcomes(chosen, plan, most, ends, progress):
        progress.end()
        result["cases"].append(outcome.record)
        result["cases"].sort(key=lambda record: places[record["name"]])
        click.echo("\n".join(show(outcome.record)) + "\n")
        if out is not None:
            write_json(out, result)
    click.echo("\n".join(overview(result["cases"])))
    _tell_what_is_missing(result["cases"])
    wrong = [name for record in result["cases"] for name in _wrong(record)]
    if wrong:
        raise click.ClickException(f"wrong or failed: {', '.join(wrong)}")
    return result


def _announcement(cases: int, expected: float, minutes: float | None) -> str:
    """Returns a line that says how long the run will take, and how to change that."""
    about = f"about {clock(expected)} min on this machine in its present state"
    if minutes is None:
        return f"{cases} cases, {about}; --minutes M limits the time to M, and --quick uses small sizes"
    if expected <= 60 * minutes:
        return f"{cases} cases, {about}"
    return f"{cases} cases, {about}, limited to {minutes:g}; --minutes M sets another limit"


def _tell_what_is_missing(records: Sequence[Figures]) -> None:
    """Prints the cases that were cut by the time limit, and what to do about it."""
    left_out = [record["name"] for record in records if record.get("failed", "").startswith(LEFT_OUT)]
    cut = [record["name"] for record in records if is_cut(record)]
    for what, names in (("left out", left_out), ("with fewer rounds or providers", cut)):
        if names:
            click.echo(f"{what} due to the time limit: {', '.join(names)}; raise it with --minutes", err=True)


def _wrong(record: Figures) -> Iterator[str]:
    if not record.get("failed", LEFT_OUT).startswith(LEFT_OUT):
        yield f"{record['name']}: {record['failed']}"
    for name, each in record["providers"].items():
        if "wrong" in each or ("failed" in each and is_ours(name)):
            yield f"{record['name']}: {name}"


def write_json(path: Path, result: Figures) -> None:
    """Writes figures atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
