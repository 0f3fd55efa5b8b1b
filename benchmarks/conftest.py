"""``pytest benchmarks``: every provider of every case as a test of pytest-benchmark.

pytest-benchmark times one test after the other. Here the rounds of a case's providers are interleaved, as everywhere in
this suite: the first test of a case runs the whole case, and each test passes the rounds of its provider to
pytest-benchmark, whose tables, JSON and comparisons then work as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache

import pytest

from fastsde.openmp import wait_passively

wait_passively()  # before torch is loaded

from fastsde import distributed  # noqa: E402
from fastsde.benchmarks.suite.case import Case, Outcome  # noqa: E402
from fastsde.benchmarks.suite.plan import Plan  # noqa: E402
from fastsde.benchmarks.suite.run import cases, new_result, outcomes  # noqa: E402


class Replay:
    """A timer that replays the times of rounds that have already been measured."""

    def __init__(self) -> None:
        self._stamps: Iterator[float] = iter(())

    def load(self, times: Sequence[float]) -> None:
        self._stamps = iter([stamp for taken in times for stamp in (0.0, taken)])

    def __call__(self) -> float:
        return next(self._stamps)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastsde")
    group.addoption("--quick", action="store_true", help="small sizes: three minutes on two cores")
    group.addoption("--device", default=None, help="cpu or cuda; by default cuda if available")


def _plan(config: pytest.Config) -> Plan:
    return Plan(distributed.device(config.getoption("device")), config.getoption("quick"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "provider" not in metafunc.fixturenames:
        return
    found = []
    for case in cases(_plan(metafunc.config)):
        for provider in case.providers:
            replay = Replay()
            mark = pytest.mark.benchmark(group=case.what, timer=replay)
            found.append(pytest.param(case, provider.name, replay, marks=mark, id=f"{case.name}-{provider.name}"))
    metafunc.parametrize(("case", "provider", "replay"), found)


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Callable[[Case], Outcome]:
    """Returns a function that runs a case once, with its baseline and the providers whose tests are selected."""
    chosen = {(item.callspec.params["case"].name, item.callspec.params["provider"]) for item in request.session.items}
    plan = _plan(pytestconfig)
    most = cache(lambda: new_result(plan)[1])
    done: dict[str, Outcome] = {}

    def run(case: Case) -> Outcome:
        if case.name not in done:
            kept = [each for each in case.providers if each.name == case.baseline or (case.name, each.name) in chosen]
            (done[case.name],) = outcomes([replace(case, providers=kept)], plan, most())
        return done[case.name]

    return run
