"""How the time of a run is shared among its cases, by durations that are expected before anything has been measured.

Cases come in order of priority. Each gets the time for its baseline, fastsde's fastest candidates and lean PyTorch, or
it waits; then, in the same order, for the other providers, and at last for those that compile. The shares are computed
anew before each case, so that time that a case has left lets a waiting one run. What runs out of time is left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .case import Case, Provider
from .machine import Ceilings
from .measure import FEWEST_ROUNDS

_MOST = 1 / 4  # of the time of a run that one case may take
_OF_SPARE = 1 / 2  # of what the first stages leave, for one case: expectations are rough, and others may take longer
_COMPILE_S = {"cpu": 8.0, "cuda": 25.0}  # a network
_COMPILE_KERNEL_S = 4.0  # an elementwise kernel
_FIRST_S = {"cpu": 0.0, "cuda": 0.5}  # of a first call on a GPU: Triton, the choice of algorithms, capture
_CALLS = 4  # of a provider before it is timed: one cold, one to warm up, and about two in its check
_SLOWER = {"cpu": 3.0, "cuda": 10.0}  # time of a typical provider relative to the limit
_HOST_S = {"cpu": 0.0, "cuda": 0.5e-3}  # to launch the kernels of a network, one by one
_SHARED = 12  # host time of the reference trajectories that a case needs, relative to one in lean PyTorch


class Ends(NamedTuple):
    """When, by ``time.monotonic``, a case should end, and when it must end for the sake of the others."""

    due: float = math.inf
    latest: float = math.inf


UNLIMITED = Ends()


def compile_s(case: Case, provider: Provider, kind: str) -> float:
    """Returns the expected seconds to compile a provider."""
    if not provider.compiles:
        return 0.0
    return _COMPILE_KERNEL_S if case.is_kernel else _COMPILE_S[kind]


def _provider_s(case: Case, provider: Provider, ceilings: Ceilings, fewest: bool) -> float:
    kind, compiling = ceilings.kind, compile_s(case, provider, ceilings.kind)
    if case.run_s:  # each run is a new process, which compiles again
        return (1 + case.rounds) * (case.run_s + compiling)
    limit: float = ceilings.limit(provider.work or case.work, provider.precision)["limit_s"]
    run = max(case.per * limit * _SLOWER[kind], case.network_calls * _HOST_S[kind])
    a_round = max(run * case.calls, 1e-6)
    rounds = FEWEST_ROUNDS if fewest else max(FEWEST_ROUNDS, case.enough / a_round)
    times = 2 if provider.name == case.baseline else 1
    return compiling + _FIRST_S[kind] + _CALLS * run + times * min(case.rounds, rounds) * a_round


def _stages(case: Case, ceilings: Ceilings) -> tuple[float, float, float]:
    """Returns the expected seconds with the providers that a case needs, with all that do not compile, and with all.

    Cases of new processes are long, and start only where the others' second stage leaves time.
    """
    needed, whole = needed_s(case, ceilings), expected_s(case, ceilings)
    if case.run_s:
        return 0.0, needed, whole
    plain = [each for each in case.providers if not each.compiles]
    return needed, _case_s(case, plain, ceilings), whole


def needed_s(case: Case, ceilings: Ceilings) -> float:
    """Returns the expected seconds of a case with only the providers that it needs, in few rounds."""
    return _case_s(case, [each for each in case.providers if case.needs(each)], ceilings, fewest=True)


def expected_s(case: Case, ceilings: Ceilings) -> float:
    """Returns the expected seconds of a whole case, at least half a second."""
    return _case_s(case, case.providers, ceilings)


def _case_s(case: Case, providers: Sequence[Provider], ceilings: Ceilings, fewest: bool = False) -> float:
    shared = _SHARED * case.network_calls * _HOST_S[ceilings.kind]
    return 0.5 + shared + sum(_provider_s(case, each, ceilings, fewest) for each in providers)


def shares(stages: Sequence[Sequence[float]], left: float, most: float) -> list[float]:
    """Returns the seconds of each case, given those of its stages: 0, or at least its first stage and at most ``most``.

    Every case gets its first stage, as far as the time suffices, before any gets its second one.
    """
    given = [0.0] * len(stages)
    for stage in zip(*stages, strict=True):
        for i, seconds in enumerate(stage):
            if given[i] or seconds <= min(most, left):
                more = max(0.0, min(min(seconds, most) - given[i], left))
                given[i] += more
                left -= more
    return given


def schedule(cases: Sequence[Case], ceilings: Ceilings, ends: float) -> Iterator[tuple[Case, Ends | None]]:
    """Yields the cases in the order in which they run, with the times of their ends; last those that are left out."""
    waiting = [(case, _stages(case, ceilings)) for case in cases]
    most = (ends - time.monotonic()) * max(_MOST, 1 / max(1, len(cases)))
    while waiting:
        now, stages = time.monotonic(), [each for _, each in waiting]
        left = max(0.0, ends - now)
        given = shares(stages, left, most)
        if not any(given):
            most = left  # nothing else could use it
            given = shares(stages, left, most)
        number = next((number for number, share in enumerate(given) if share), None)
        if number is None:
            break
        case, (first, *_) = waiting.pop(number)
        spare = left - sum(shares([each[:1] for each in stages], left, most))
        share = given[number] + left - sum(given)  # with what no case is expected to need
        if waiting:
            share = min(share, max(most, given[number]), (first or given[number]) + _OF_SPARE * spare)
        yield case, Ends(now + share, now + min(left, max(most, share)))
    yield from ((case, None) for case, _ in waiting)
