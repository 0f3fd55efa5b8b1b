"""A case: one task, the providers that do it side by side, and the proof that each must give before it gets a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .machine import Work
from .measure import Figures, Run

LOOP = "tutorial's loop"
LEAN = "lean eager PyTorch"
AGAIN = ", again"
REPLAYED, CALLED = "graph replay", "calls"  # how a single kernel was timed on a GPU
LEFT_OUT = "left out: "
SPENT = f"{LEFT_OUT}its share of the time was spent"


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

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("fastsde")


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
        is_kernel: a run is a kernel or a few, so that a GPU is timed while it replays a CUDA graph of some runs.
        timer: returns the seconds of a run that are to count; all of them by default.
        run_s: seconds of a run, about, where its work does not tell, since it is a new process.
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
    is_kernel: bool = False
    timer: Callable[[Run], float] | None = None
    run_s: float = 0.0
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
