"""The suite as tests: a wrong provider fails, and a provider that cannot run here is skipped with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastsde.benchmarks.suite.case import Case, Outcome


@pytest.mark.filterwarnings("default")  # from the libraries that fastsde is compared with
def test_provider(case: Case, provider: str, replay: Any, run: Callable[[Case], Outcome], benchmark: Any) -> None:
    outcome = run(case)
    figures = outcome.record["providers"][provider]
    if "unavailable" in figures:
        pytest.skip(figures["unavailable"])
    for verdict in ("wrong", "failed"):
        assert verdict not in figures, figures[verdict]
    times = outcome.times[provider]
    replay.load(times)
    benchmark.extra_info.update(figures)
    benchmark.pedantic(lambda: None, rounds=len(times))
