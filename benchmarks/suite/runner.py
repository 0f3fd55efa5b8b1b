"""Runs a case: checks every provider, and times those with correct results."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastsde.engines import capture

from .budget import UNLIMITED, Ends, compile_s
from .case import AGAIN, CALLED, LEFT_OUT, REPLAYED, SPENT, Case, Outcome, Provider, UnavailableError, WrongError
from .machine import Ceilings
from .measure import FEWEST_ROUNDS, Figures, Run, in_words, measure, seconds, summary
from .replay import Replay, host_seconds

_LONG_S = 2.0  # a provider whose first call takes longer counts as warm after it
_SHORT_S = 0.2  # a provider whose second call takes less is called once more before it is checked
_MARGIN = 1.25  # a round may take longer than expected
_GRACE = 0.25  # a last round may exceed the limit by this share of the time spent on checks, so as not to waste them


def run_case(
    case: Case,
    device: torch.device,
    ceilings: Ceilings,
    ends: Ends = UNLIMITED,
    say: Callable[[str], None] = lambda what: None,
) -> Outcome:
    """Checks every provider, times those that are correct, and compares them with the limits of the device.

    Args:
        ends: when it should be finished. If time is short, providers are left out, the last of `Case.in_order` first,
            and there are fewer rounds; a case in which one round of the providers that it needs does not fit, not even
            until ``ends.latest``, has no figures.
        say: called with a description of each step.
    """
    outcome, started = Outcome(case.head()), time.monotonic()
    if case.prepare is not None:
        case.prepare()
    try:
        runs, round_s = _prove_all(case, outcome, device, ends, say)
    except TooLongError as error:
        return Outcome({**case.head(), "failed": f"{LEFT_OUT}{error}"})
    now = time.monotonic()
    if now + round_s > ends.latest and round_s > _GRACE * (now - started):
        reason = f"{LEFT_OUT}a round takes {round_s:.2g} s, more than is left"
        return Outcome({**case.head(), "failed": reason})
    due = max(ends.due, min(ends.latest, now + _MARGIN * FEWEST_ROUNDS * round_s))
    _time(case, runs, outcome, device, due, say)
    figures: Figures = outcome.record["providers"]
    for provider in case.providers:
        if provider.name in outcome.times:
            limit = ceilings.limit(provider.work or case.work, provider.precision)
            own = figures[provider.name]
            own |= {"precision": provider.precision, **limit, "of_limit": limit["limit_s"] / own["median_s"]}
    outcome.record["work"] = vars(case.work)
    outcome.record["targets"] = [target.judge(figures) for target in case.targets]
    outcome.record["seconds"] = round(time.monotonic() - started, 1)
    return outcome


class TooLongError(Exception):
    """A case cannot be finished in time; the message says what it takes."""


def _prove_all(
    case: Case, outcome: Outcome, device: torch.device, ends: Ends, say: Callable[[str], None]
) -> tuple[dict[str, Run], float]:
    """Returns the correct providers, ready to be timed, and the seconds that a round of them takes.

    A provider is expected to take as long to check as the baseline, plus the time to compile, and as long to run as the
    slowest so far, and is left out if this and a few rounds do not fit. Those that the case needs are checked in any
    case.

    Raises:
        TooLongError: after the baseline, if not even their calls and a round would end before ``ends.latest``.
    """
    figures: Figures = outcome.record["providers"]
    figures.update({provider.name: {} for provider in case.providers})  # in the order of the table
    runs, round_s, slowest, usual = dict[str, Run](), 0.0, 0.0, 0.0
    others = sum(map(case.needs, case.providers)) - 1
    for number, provider in enumerate(case.in_order):
        say(f"{provider.name}, {number + 1} of {len(case.providers)}")
        started = time.monotonic()
        if number == 1:
            rest = others * slowest * (1 + case.calls) + round_s  # each is called, and then there is a round
            if started + rest > ends.latest:
                raise TooLongError(f"the providers that it needs take at least another {rest:.2g} s, too long")
        rounds_s = FEWEST_ROUNDS * (round_s + slowest * case.calls)
        checked = started + usual + compile_s(case, provider, device.type)
        if number and not case.needs(provider) and checked + rounds_s > ends.due:
            figures[provider.name] = {"unavailable": SPENT}
            continue
        own, run, run_s = _prove(case, provider, device)
        if run_s is None:  # not warm yet, and the first call may have compiled kernels
            run_s = min(own["first_call_s"], slowest) if slowest and case.timer is None else own["first_call_s"]
        figures[provider.name] = own
        if case.timer is not None:
            own.pop("first_call_s", None)  # which includes time that does not count
        if run is not None:
            runs[provider.name] = run
            round_s += run_s * case.calls * (2 if provider.name == case.baseline else 1)
            slowest = max(slowest, run_s)
        usual = usual or time.monotonic() - started
    return runs, round_s


def _time(
    case: Case, runs: dict[str, Run], outcome: Outcome, device: torch.device, ends: float, say: Callable[[str], None]
) -> None:
    """Times the correct providers, the baseline twice, and records those that fail."""
    if case.baseline in runs:
        runs[case.baseline + AGAIN] = runs[case.baseline]
    timer = case.timer or partial(_seconds, device=device, calls=case.calls)
    times, failures = measure(runs, timer, case.rounds, case.enough, ends, say)
    outcome.record["cut"] = any(times.values()) and max(map(len, times.values())) < case.rounds
    outcome.times = {name: [taken / case.per for taken in each] for name, each in times.items()}
    figures: Figures = outcome.record["providers"]
    figures.update({name: {"failed": failure} for name, failure in failures.items()})
    for name, each in outcome.times.items():
        figures.setdefault(name, {}).update(summary(each))


def _seconds(run: Run, device: torch.device, calls: int) -> float:
    return run.seconds() if isinstance(run, Replay) else seconds(run, device, calls)


def _prove(case: Case, provider: Provider, device: torch.device) -> tuple[Figures, Run | None, float | None]:
    """Returns a provider's check, or why it has no time; the function to be timed; and the seconds of a warm run."""
    figures: Figures = {}
    try:
        run, result = _first_call(provider.make, device, figures)
        run_s: float | None = None
        if case.timer is None and (provider.compiles or figures["first_call_s"] < _LONG_S):
            result, run_s = _warm(run)
        figures["parity"] = provider.prove(run, result)
        if case.is_kernel and capture.can_record(device):
            run = _captured(case, provider, run, device, figures)
        return figures, run, run_s
    except UnavailableError as error:
        return {"unavailable": str(error)}, None, 0.0
    except WrongError as error:
        return {"wrong": str(error)}, None, 0.0
    except Exception as error:  # whatever it is, the other providers still run
        return {"failed": in_words(error)}, None, 0.0


def _captured(case: Case, provider: Provider, run: Run, device: torch.device, figures: Figures) -> Run:
    """Returns a CUDA graph of several calls, whose replay is checked as well, or the run itself if capture fails."""
    figures["host_s"] = host_seconds(run, device)
    try:
        replay = Replay(run, device, case.calls)
    except (capture.CaptureError, torch.OutOfMemoryError) as error:
        figures |= {"timed_by": CALLED, "not_captured": in_words(error)}
        return run
    figures["timed_by"] = REPLAYED
    try:
        provider.prove(run, replay())
    except WrongError as error:
        raise WrongError(f"replayed, {error}") from error
    return replay


def _warm(run: Run) -> tuple[Any, float]:
    """Calls it once, or twice if it is short, and returns the result and the seconds of the last call.

    So the check applies to what is timed: a CUDA graph of ``torch.compile`` is replayed only from the third call on,
    and a longer run has many calls.
    """
    started = time.perf_counter()
    result = run()
    taken = time.perf_counter() - started
    if taken < _SHORT_S:
        started = time.perf_counter()
        result = run()
        taken = time.perf_counter() - started
    return result, taken


def _first_call(make: Callable[[], Run], device: torch.device, figures: Figures) -> tuple[Run, Any]:
    """Creates a provider's function and calls it once; records the seconds and the peak memory.

    The time includes ``torch.compile``, the capture of CUDA graphs, and compiling kernels that nothing used before.
    """
    cuda = device.type == "cuda"
    if cuda:
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before, started = torch.cuda.memory_allocated(device) if cuda else 0, time.perf_counter()
    with warnings.catch_warnings():
        # The network would run uncompiled, but the table would show it as compiled.
        warnings.filterwarnings("error", "torch.compile failed", RuntimeWarning)
        run = make()
        result = run()
    if cuda:
        torch.cuda.synchronize(device)
        figures["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        figures["peak_bytes_of_its_own"] = figures["peak_bytes"] - before
    figures["first_call_s"] = time.perf_counter() - started
    return run, result
