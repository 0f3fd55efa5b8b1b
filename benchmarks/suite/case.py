"""A case: one task, the providers that do it side by side, and the check that each must pass before it is timed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from fastsde.extras import MissingExtraError, require

from .machine import Work
from .measure import Figures, Run

LOOP = "tutorial's loop"
LEAN = "lean eager PyTorch"
AGAIN = ", again"
REPLAYED, CALLED = "graph replay", "calls"  # how a single kernel was timed on a GPU
LEFT_OUT = "left out: "
SPENT = f"{LEFT_OUT}its share of the time was spent"


class Rank(IntEnum):
    """The order in which providers are checked, after the baseline: if time is short, the last ones are left out."""

    NEEDED = 0  # fastsde's fastest candidates and lean PyTorch: without them the case tells nothing and does not run
    USUAL = 1
    LAST = 2  # slow by design, such as fastsde's reference, which only shows what the kernels gain


class UnavailableError(Exception):
    """A provider cannot run here; the message says why."""


class WrongError(Exception):
    """A provider computes wrong results."""


def imported(name: str, extra: str) -> Any:
    """Imports a module of a library that fastsde does not need, without the library's own warnings.

    Args:
        extra: the extra of fastsde that installs it.

    Raises:
        UnavailableError: if it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return require(name, extra=extra, what="this provider")
    except MissingExtraError as error:
        raise UnavailableError(str(error)) from error


def check(name: str, error: float, bound: float) -> Figures:
    """Checks an error against its bound, so that a wrong provider is not timed, and returns both.

    Raises:
        WrongError: if the error exceeds the bound or is NaN.
    """
    if not error <= bound:
        raise WrongError(f"{name} is off by {error:.3g}, at most {bound:.3g} is allowed")
    return {"error": error, "allowed": bound}


@dataclass(frozen=True)
class Provider:
    """One way to do the task of a case.

    Args:
        name: as shown in tables; names of fastsde's own providers start with "fastsde".
        make: returns the function to be timed, or raises `UnavailableError`.
        prove: called with that function and the result of one of its first calls; raises `WrongError`, or returns what
            it compared.
        precision: "fp32", "TF32" or "bf16"; the limit is computed from the rate of this precision.
        compiles: whether it compiles for so long that it is checked after all others, whatever its rank.
        rank: its place in the order in which providers are checked.
        work: its minimum work, if that is less than for the others.
    """

    name: str
    make: Callable[[], Run]
    prove: Callable[[Run, Any], Figures]
    precision: str = "fp32"
    compiles: bool = False
    rank: Rank = Rank.USUAL
    work: Work | None = None

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("fastsde")


@dataclass(frozen=True)
class Target:
    """A goal of the project for the fastest of some providers: a time, or a speed relative to the fastest of others."""

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
    """A task of one size. It is cheap to create: nothing is loaded or computed before it runs.

    Args:
        subject: the name of the file that defines it.
        name: its own name.
        what: a description of the task for tables.
        about: its sizes, as JSON values.
        providers: in the order of the table.
        baseline: the name of the provider that ratios refer to; it takes part twice.
        work: the minimum work of one item.
        per: the number of items that a run processes; times are per item.
        calls: the number of runs timed together in one round.
        rounds: the maximum number of rounds.
        enough: seconds after which a provider takes part in only three rounds.
        is_kernel: whether a run is one kernel or a few, to be timed on a GPU by replaying a CUDA graph of several runs.
        timer: returns the seconds of a run that count; by default all of them.
        network_calls: how often a run calls a network, one call after the other; a GPU's host launches each of them.
        run_s: the approximate seconds of a run in a new process, which cannot be estimated from its work.
        targets: goals of the project.
        prepare: creates what all providers share, so that it does not count towards the first call of any.
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
    network_calls: int = 0
    run_s: float = 0.0
    targets: Sequence[Target] = ()
    prepare: Callable[[], Any] | None = None

    @property
    def in_order(self) -> list[Provider]:
        """The providers in the order in which they are checked."""

        def place(provider: Provider) -> tuple[bool, bool, Rank, bool]:
            return provider.name != self.baseline, provider.compiles, provider.rank, not provider.is_ours

        return sorted(self.providers, key=place)

    def needs(self, provider: Provider) -> bool:
        """Returns whether the case is not worth running without a provider."""
        return provider.name == self.baseline or (provider.rank is Rank.NEEDED and not provider.compiles)

    def head(self) -> Figures:
        """Returns the start of its record."""
        names = {"subject": self.subject, "name": self.name, "what": self.what, **self.about}
        return {**names, "baseline": self.baseline, "providers": {}, "targets": []}


@dataclass
class Outcome:
    """The record of a case, as JSON values, and the seconds of each round."""

    record: Figures
    times: dict[str, list[float]] = field(default_factory=dict)
