"""A case: one task, the providers that do it side by side, and the proof that each must give before it gets a time."""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import click
import torch

from .machine import Ceilings, Work
from .measure import Figures, Run, in_words, measure, seconds, summary

LOOP = "tutorial's loop"
LEAN = "lean eager PyTorch"
AGAIN = ", again"
SPENT = "left out: the time of the run was spent"
_LONG_S = 2.0  # of a first call, after which it is warm


class UnavailableError(Exception):
    """A provider cannot run here; the message says why."""


class WrongError(Exception):
    """A provider computes the wrong thing."""


def check(name: str, error: float, bound: float) -> Figures:
    """Stops what is wrong before it gets a time.

    Raises:
        WrongError: for an error beyond the bound, or NaN.
    """
    if not error <= bound:
        raise WrongError(f"{name} is off by {error:.3g}, where at most {bound:.3g} is due")
    return {"error": error, "allowed": bound}


@dataclass(frozen=True)
class Provider:
    """One way to do the task of a case.

    Args:
        name: as tables show it; those of this package start with "fastsde".
        make: returns what is to be timed, or raises `UnavailableError`.
        prove: called with that and the result of one of its first calls; raises `WrongError`, or returns what it
            compared.
        precision: "fp32", "TF32" or "bf16", whose rate its limit is reckoned by.
        compiles: for so long that it is left out where a run has little time left.
        work: where it can do with less than the others.
    """

    name: str
    make: Callable[[], Run]
    prove: Callable[[Run, Any], Figures]
    precision: str = "fp32"
    compiles: bool = False
    work: Work | None = None


@dataclass(frozen=True)
class Target:
    """What the project wants of the fastest of some providers: a time, or a ratio to the fastest of others."""

    what: str
    of: tuple[str, ...]
    at_most_s: float | None = None
    beside: tuple[str, ...] = ()
    at_least: float = math.nan

    def judge(self, providers: Figures) -> Figures:
        ours, others = _fastest(providers, self.of), _fastest(providers, self.beside)
        value = ours if self.at_most_s is not None else others / ours if ours and others else None
        met = (
            None if value is None else value <= self.at_most_s if self.at_most_s is not None else value >= self.at_least
        )
        bound = self.at_least if self.at_most_s is None else self.at_most_s
        return {"what": self.what, "value": value, "bound": bound, "met": met}


def _fastest(providers: Figures, names: Sequence[str]) -> float | None:
    found = (providers.get(name, {}).get("median_s") for name in names)
    return min((median for median in found if median is not None), default=None)


@dataclass(frozen=True)
class Case:
    """A task of one size, cheap to make: nothing is loaded or computed before it runs.

    Args:
        subject: the file that it comes from.
        name: its own.
        what: the task, in words of a table.
        prepare: makes what all providers share, so that no first call has to.
        about: its sizes, as JSON takes them.
        providers: in the order of the table.
        baseline: the name of the one that ratios refer to, and that takes part twice.
        work: what one of the ``per`` things cannot do without.
        per: how many things a run does; times are of one.
        calls: runs between two events of a GPU, or of one round.
        rounds: at most.
        enough: seconds after which a provider takes part in three rounds alone.
        timer: returns the seconds of a run that are to count; all of them by default.
        targets: what the project wants to reach.
    """

    subject: str
    name: str
    what: str
    about: Figures
    providers: Sequence[Provider]
    baseline: str = LOOP
    work: Work = field(default_factory=Work)
    per: int = 1
    calls: int = 1
    rounds: int = 10
    enough: float = 6.0
    timer: Callable[[Run], float] | None = None
    targets: Sequence[Target] = ()
    prepare: Callable[[], Any] | None = None

    def head(self) -> Figures:
        """What its record starts with."""
        names = {"subject": self.subject, "name": self.name, "what": self.what, **self.about}
        return {**names, "baseline": self.baseline, "providers": {}, "targets": []}


@dataclass
class Outcome:
    """The record of a case, as JSON takes it, and the seconds of each round."""

    record: Figures
    times: dict[str, list[float]] = field(default_factory=dict)


def run_case(case: Case, device: torch.device, ceilings: Ceilings, has_time: Callable[[bool], bool]) -> Outcome:
    """Proves every provider, times those that are right, and compares them with what is physically possible.

    Args:
        has_time: whether another provider may be begun, one that compiles or not.
    """
    outcome, started, runs = Outcome(case.head()), time.monotonic(), dict[str, Run]()
    figures: Figures = outcome.record["providers"]
    if case.prepare is not None:
        case.prepare()
    for provider in case.providers:
        if not has_time(provider.compiles):
            figures[provider.name] = {"unavailable": SPENT}
            continue
        click.echo(f"{case.name}: {provider.name}", err=True)
        figures[provider.name], run = _prove(provider, device, warms=case.timer is None)
        if case.timer is not None:
            figures[provider.name].pop("first_call_s", None)  # not all of it is what counts
        if run is not None:
            runs[provider.name] = run
    _time(case, runs, outcome, device)
    for provider in case.providers:
        if provider.name in outcome.times:
            limit = ceilings.limit(provider.work or case.work, provider.precision)
            own = figures[provider.name]
            own |= {"precision": provider.precision, **limit, "of_limit": limit["limit_s"] / own["median_s"]}
    outcome.record["work"] = vars(case.work)
    outcome.record["targets"] = [target.judge(figures) for target in case.targets]
    outcome.record["seconds"] = round(time.monotonic() - started, 1)
    return outcome


def _time(case: Case, runs: dict[str, Run], outcome: Outcome, device: torch.device) -> None:
    """Times what is right, the baseline twice, and notes what fails in doing so."""
    if case.baseline in runs:
        runs[case.baseline + AGAIN] = runs[case.baseline]
    timer = case.timer or partial(seconds, device=device, calls=case.calls)
    times, failures = measure(runs, timer, case.rounds, case.enough)
    outcome.times = {name: [taken / case.per for taken in each] for name, each in times.items()}
    figures: Figures = outcome.record["providers"]
    figures.update({name: {"failed": failure} for name, failure in failures.items()})
    for name, each in outcome.times.items():
        figures.setdefault(name, {}).update(summary(each))


def _prove(provider: Provider, device: torch.device, warms: bool) -> tuple[Figures, Run | None]:
    """What came of a provider before it was timed: its proof, or why it has no time."""
    figures: Figures = {}
    try:
        run, result = _first_call(provider.make, device, figures)
        if warms and (provider.compiles or figures["first_call_s"] < _LONG_S):
            result = _warm(run)
        return {**figures, "parity": provider.prove(run, result)}, run
    except UnavailableError as error:
        return {"unavailable": str(error)}, None
    except WrongError as error:
        return {"wrong": str(error)}, None
    except Exception as error:  # whatever it is, the others are still to be seen
        return {"failed": in_words(error)}, None


def _warm(run: Run) -> Any:
    """Calls it twice, or once where that takes long, so that what is proved is what is timed.

    A CUDA graph of ``torch.compile`` is replayed in the third call only.
    """
    started = time.perf_counter()
    result = run()
    return run() if time.perf_counter() - started < _LONG_S else result


def _first_call(make: Callable[[], Run], device: torch.device, figures: Figures) -> tuple[Run, Any]:
    """Makes and calls it, in seconds and memory.

    The time has what kernels take to compile that nothing before has used, ``torch.compile``, and the capture.
    """
    cuda = device.type == "cuda"
    if cuda:
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before, started = torch.cuda.memory_allocated(device) if cuda else 0, time.perf_counter()
    with warnings.catch_warnings():
        # The network would go on without it, and stand in the table as compiled.
        warnings.filterwarnings("error", "torch.compile failed", RuntimeWarning)
        run = make()
        result = run()
    if cuda:
        torch.cuda.synchronize(device)
        figures["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        figures["peak_bytes_of_its_own"] = figures["peak_bytes"] - before
    figures["first_call_s"] = time.perf_counter() - started
    return run, result
