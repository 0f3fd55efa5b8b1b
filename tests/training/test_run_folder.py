"""The folder of a run: log lines in groups. Its lock and checkpoints are tested with the trainer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fastsde.training import run_folder
from fastsde.training.run_folder import RunLog


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still."""
    now = [100.0]
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now[0])
    return now


def test_lines_are_written_in_groups_and_none_is_lost(tmp_path: Path, clock: list[float]) -> None:
    log, path = RunLog(tmp_path), tmp_path / "log.jsonl"
    log.flush()
    assert not path.exists()
    written = []
    for step in range(5):
        log.append({"step": step})
        written.append(len(path.read_text().splitlines()))
        clock[0] += run_folder.LOG_SECONDS / 2
    assert written == [1, 1, 3, 3, 5]  # the first one at once, then once per interval
    log.append({"step": 5})
    assert len(path.read_text().splitlines()) == 5
    log.flush()
    log.flush()
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in range(6))


def test_the_first_line_is_there_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "LOG_SECONDS", math.inf)
    log = RunLog(tmp_path)
    for step in range(3):
        log.append({"step": step})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 0}\n'


def test_lines_of_later_steps_and_what_is_no_line_are_dropped(tmp_path: Path) -> None:
    log, path = RunLog(tmp_path), tmp_path / "log.jsonl"
    log.drop_after(3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 3, "loss": 0.5}\n{"step": 4}\n[]\n{"loss": 1}\n{"step": 2, "lo')
    log.drop_after(3)
    assert path.read_text() == '{"step": 1}\n{"step": 3, "loss": 0.5}\n'
