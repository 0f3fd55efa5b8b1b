"""How long a case may take: its expected duration before it runs, and its share of the time of a run.

Expected durations only set the shares. What is cut is decided by durations that have been measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from .case import Case, Provider
from .machine import Ceilings
from .measure import FEWEST_ROUNDS

_COMPILE_S, LEAST_COMPILE_S = 8.0, 4.0  # of a network, and of an elementwise kernel
_CALLS = 5  # of a provider before it is timed: one cold, two to warm up, and about two in its check
_SLOWER = {"cpu": 3.0, "cuda": 10.0}  # time of a typical provider relative to the limit


def _run_s(case: Case, provider: Provider, ceilings: Ceilings) -> float:
    limit: float = ceilings.limit(provider.work or case.work, provider.precision)["limit_s"]
    return case.run_s + case.per * limit * _SLOWER[ceilings.kind]


def _provider_s(case: Case, provider: Provider, ceilings: Ceilings) -> float:
    run, compiling = _run_s(case, provider, ceilings), _COMPILE_S if provider.compiles else 0.0
    if case.run_s:  # each run is a new process, which compiles again
        return (1 + case.rounds) * (run + compiling)
    a_round = max(run * case.calls, 1e-6)
    rounds = min(case.rounds, max(FEWEST_ROUNDS, case.enough / a_round))
    return compiling + _CALLS * run + rounds * a_round


def expected_s(case: Case, ceilings: Ceilings) -> float:
    """Returns the expected seconds of a whole case, at least half a second."""
    return 0.5 + sum(_provider_s(case, provider, ceilings) for provider in case.providers)


def least_s(case: Case, ceilings: Ceilings) -> float:
    """Returns the fewest seconds in which a case can have results: two providers are checked and run one round."""
    (baseline,) = [provider for provider in case.providers if provider.name == case.baseline] or case.providers[:1]
    first = 1 if case.run_s else _CALLS
    return (2 * first + 3 * case.calls) * _run_s(case, baseline, ceilings)


def deadlines(cases: Sequence[Case], ceilings: Ceilings, ends: float) -> Iterator[tuple[Case, float]]:
    """Yields each case in turn, with the time at which it must have ended. Cases share the time that others leave."""
    expected = [expected_s(case, ceilings) for case in cases]
    for number, case in enumerate(cases):
        left = max(0.0, ends - time.monotonic())
        yield case, time.monotonic() + left * (expected[number] / sum(expected[number:]))
