"""A run of the suite: its subjects in order, shown and kept as they come."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import click
import torch

from fastsde.files import atomic_path

from .case import SPENT, Case, Outcome, run_case
from .machine import Ceilings, ceilings, settings
from .measure import Figures, in_words
from .plan import Plan
from .table import is_ours, overview, show

SEED = 1
_COMPILE_S, _CASE_S = 45.0, 4.0  # what must be left before anything is compiled, and for each case to come
# In the order in which they run: where the time is short, the last are left out.
SUBJECTS = (
    "noise",
    "solver_step",
    "perturb",
    "dsm_loss",
    "swiss_roll",
    "mnist",
    "fresh_weights",
    "few_steps",
    "train_swiss_roll",
    "train_mnist",
    "network_size",
    "startup",
)


def cases(plan: Plan, subjects: Sequence[str] = ()) -> list[Case]:
    """Those of some subjects, or of all. Nothing is loaded or computed yet."""
    found: list[Case] = []
    for subject in SUBJECTS:
        if not subjects or subject in subjects:
            found += import_module(f"..{subject}", __package__).cases(plan)
    return found


def new_result(plan: Plan) -> tuple[Figures, Ceilings]:
    """What a result file starts with, and the ceilings of the device, measured now."""
    if plan.has_gpu:
        torch.cuda.set_device(plan.device)  # of events and graphs
    torch.manual_seed(SEED)
    most = ceilings(plan.device)
    return {**settings(plan.device), "quick": plan.quick, "ceilings": most.describe(), "cases": []}, most


def outcomes(chosen: Sequence[Case], plan: Plan, most: Ceilings, minutes: float | None = None) -> Iterator[Outcome]:
    """Runs cases one after the other.

    Args:
        minutes: after which nothing is begun, and near which nothing is compiled.
    """
    ends = None if minutes is None else time.monotonic() + 60 * minutes

    def has_time(later: float, compiles: bool) -> bool:
        reserve = later + _COMPILE_S if compiles else 0
        return ends is None or time.monotonic() + reserve < ends

    for number, case in enumerate(chosen):
        if not has_time(0, False):
            yield Outcome({**case.head(), "failed": SPENT})
            continue
        later = _CASE_S * (len(chosen) - number - 1)
        case = replace(case, enough=min(case.enough, plan.enough_s))
        try:
            yield run_case(case, plan.device, most, partial(has_time, later))
        except Exception as error:  # what all its providers share cannot be made; the other cases are still to be seen
            yield Outcome({**case.head(), "failed": in_words(error)})
        torch.compiler.reset()  # its graphs keep their memory, and of one function it compiles no more than eight
        if plan.has_gpu:
            torch.cuda.empty_cache()


def run(plan: Plan, chosen: Sequence[Case], minutes: float | None, out: Path | None) -> Figures:
    """Runs and shows cases, and keeps the result after each, so that a run that is cut short has not been in vain.

    Raises:
        ClickException: at the end, where a provider was wrong, or one of fastsde failed.
    """
    result, most = new_result(plan)
    for outcome in outcomes(chosen, plan, most, minutes):
        result["cases"].append(outcome.record)
        click.echo("\n".join(show(outcome.record)) + "\n")
        if out is not None:
            write_json(out, result)
    click.echo("\n".join(overview(result["cases"])))
    wrong = [name for record in result["cases"] for name in _wrong(record)]
    if wrong:
        raise click.ClickException(f"wrong or failed: {', '.join(wrong)}")
    return result


def _wrong(record: Figures) -> Iterator[str]:
    if record.get("failed", SPENT) != SPENT:
        yield f"{record['name']}: {record['failed']}"
    for name, each in record["providers"].items():
        if "wrong" in each or ("failed" in each and is_ours(name)):
            yield f"{record['name']}: {name}"


def write_json(path: Path, result: Figures) -> None:
    """Writes figures whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
