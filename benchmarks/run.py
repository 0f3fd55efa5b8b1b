"""How the subjects of a benchmark are run, one after another, and shown as tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import click
import torch

from .measure import LOOP, Case, Figures, write_json


def run_subjects(
    subjects: Mapping[str, Callable[[], Case]],
    device: torch.device,
    result: Figures,
    out: Path | None,
    fatal: Sequence[str] = ("wrong",),
) -> None:
    """Runs subjects, adds their records to ``result["subjects"]``, and shows and keeps each when it is there.

    Args:
        fatal: what must not come of any provider.

    Raises:
        ClickException: at the end, where something is wrong or has failed.
    """
    for name, subject in subjects.items():
        record = _record(name, subject, device)
        result["subjects"].append(record)
        click.echo("\n".join(show(record)) + "\n")
        if out is not None:  # after each, so that a run that is cut short has not been in vain
            write_json(out, result)
    if any(_has_failed(record, fatal) for record in result["subjects"]):
        raise click.ClickException("something is wrong or has failed: see above")


def _record(name: str, subject: Callable[[], Case], device: torch.device) -> Figures:
    started = time.monotonic()
    try:
        record = subject().record
    except Exception as error:  # the other subjects are still to be seen
        record = {"subject": name, "providers": {}, "failed": f"{type(error).__name__}: {error}"}
    if device.type == "cuda":
        torch.compiler.reset()  # graphs of torch.compile keep their memory
        torch.cuda.empty_cache()
    record["seconds"] = round(time.monotonic() - started, 1)
    return record


def _has_failed(record: Figures, fatal: Sequence[str]) -> bool:
    return "failed" in record or any(kind in each for each in record["providers"].values() for kind in fatal)


def show(record: Figures) -> list[str]:
    """The lines of a subject's table. The peak of memory is what the first call took beyond what lay there."""
    about = ", ".join(f"{key} {record[key]:,}" for key in ("n", "rows", "batch_size", "steps") if key in record)
    lines = [f"{record['subject']}: {about}"]
    if "failed" in record:
        return [*lines, f"  failed: {record['failed']}"]
    title = f"  {'':40}{'median':>11}{'20 % .. 80 %':>26}{'loop / it':>11}{'first call':>12}{'peak':>11}"
    return [*lines, title, *_provider_lines(record["providers"]), *_notes(record)]


def _provider_lines(providers: Figures) -> Iterable[str]:
    loop = next(
        (each["median_s"] for name, each in providers.items() if name.startswith(LOOP) and "median_s" in each), 0
    )
    for name, each in providers.items():
        if "median_s" not in each:
            reason = next(f"{key}: {each[key]}" for key in ("wrong", "failed", "unavailable") if key in each)
            yield f"  {name:40}{reason}"
            continue
        spread = f"{_time(each['p20_s'])} .. {_time(each['p80_s'])}"
        first = f"{each['first_call_s']:.2f} s" if "first_call_s" in each else ""
        peak = f"{each['peak_bytes_of_its_own'] / 2**20:.0f} MiB" if "peak_bytes" in each else ""
        ratio = f"{loop / each['median_s']:.2f} x" if loop else ""
        whole = f"   whole run {each['whole_run_s']:,.0f} s" if "whole_run_s" in each else ""
        yield f"  {name:40}{_time(each['median_s']):>11}{spread:>26}{ratio:>11}{first:>12}{peak:>11}{whole}"


def _notes(record: Figures) -> Iterable[str]:
    for limit in record["limits"]:
        yield f"  limit {_time(limit['seconds'])}: {limit['what']}"
    for target in record["targets"]:
        verdict = {True: "met", False: "NOT met", None: "not measured"}[target["met"]]
        value = "" if target["value"] is None else f": {target['value']:.3g}, {target['share_of_target']:.2f} of it"
        yield f"  target {verdict}: {target['what']}{value}"


def _time(seconds: float) -> str:
    unit, scale = ("us", 1e6) if seconds < 1e-3 else ("ms", 1e3) if seconds < 1 else ("s", 1)
    return f"{seconds * scale:.4g} {unit}"
