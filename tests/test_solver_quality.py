"""The figures of docs/guides/solvers.md, and what it recommends, are those of the kept results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from fastsde.benchmarks import plots, solver_quality
from fastsde.benchmarks.solver_quality import PANELS, PLANS, SHOWN, WITH_NOISE, calls_of, planned, points, table

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs/guides/solvers.md").read_text()
RECOMMENDED = re.compile(
    r"^\| [^|]+ \| `(\w+)` \| (\d+) \| `(\w+)` \| ([\d.]+) \((swiss roll|MNIST)\) \|$", re.MULTILINE
)


@pytest.fixture
def result() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks/results/solver-quality.json").read_text())


def test_the_results_hold_every_run(result: dict[str, Any]) -> None:
    for subject in PLANS:
        for case, spacing, calls in planned(subject):
            assert calls in points(result, subject, case, spacing), (subject, case, spacing, calls)


def test_the_results_are_of_whole_commits(result: dict[str, Any]) -> None:
    commits = {subject: result[subject]["machine"]["commit"] for subject in PLANS}
    assert not [subject for subject, commit in commits.items() if commit.endswith("-dirty")], commits


def test_an_interval_of_two_calls_ends_in_one() -> None:
    assert [calls_of("heun", calls) for calls in (5, 8)] == [5, 7]
    assert [calls_of("rk4", calls) for calls in (8, 10)] == [7, 10]
    assert calls_of("ddim", 8) == 8


def test_the_guide_has_the_measured_figures(result: dict[str, Any]) -> None:
    assert "\n".join(table(result)) in GUIDE
    assert f"({result['mnist']['n']} test digits: {result['mnist']['frechet_distance_of_test_digits']:.1f})" in GUIDE
    assert f"(two sets of fresh data: {result['swiss-roll']['data_to_data']:.4f})" in GUIDE


def test_the_guide_recommends_what_is_best_or_close_to_it(result: dict[str, Any]) -> None:
    rows = RECOMMENDED.findall(GUIDE)
    assert len(rows) >= 5
    subjects = {PANELS[subject][3]: subject for subject in PANELS}
    for case, calls, spacing, figure, title in rows:
        found = points(result, subjects[title], case, spacing)[int(calls)]
        assert f"{found:.{3 if title == 'swiss roll' else 1}f}" == figure
        noise = case in WITH_NOISE  # recommended where noise is wanted, and compared among themselves
        rivals = [
            value
            for rival, spacings in result[subjects[title]]["runs"].items()
            for other in spacings
            for count, value in points(result, subjects[title], rival, other).items()
            if count <= int(calls) and (rival in WITH_NOISE) == noise and rival in SHOWN
        ]
        assert found <= 1.3 * min(rivals), (case, calls, spacing, title)


def test_the_committed_plot_is_of_the_committed_figures(result: dict[str, Any]) -> None:
    with Image.open(ROOT / "docs/assets/solver-quality.png") as picture:
        assert picture.info["Source"] == plots.digest([result]), "draw it again with --plot-only"


def test_what_was_not_measured_is_left_out(result: dict[str, Any]) -> None:
    assert len(solver_quality.draw({}).axes) == 2
    del result["mnist"], result["swiss-roll"]["runs"]["ddim"]
    assert len(solver_quality.draw(result).axes[0].lines) == len(SHOWN)  # with fresh data, and without ddim
    lines = table(result)
    assert [line.count("|") for line in lines] == [8] * len(lines)
    assert "| `ddim` |  |  |  |  |  |  |" in lines


@pytest.mark.slow
def test_a_small_run_is_measured_kept_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver_quality, "POINTS", 50)
    monkeypatch.setitem(PLANS, "swiss-roll", (("uniform", ("ddim", "heun"), (2, 4)),))
    out, options = tmp_path / "figures.json", ["--subject", "swiss-roll", "--out"]
    for _ in range(2):  # the second run has nothing left to measure
        done = CliRunner().invoke(solver_quality.main, [*options, str(out)], catch_exceptions=False)
        assert done.exit_code == 0
    assert done.output == ""
    kept = json.loads(out.read_text())
    assert set(points(kept, "swiss-roll", "heun", "uniform")) == {1, 3}
    assert kept["swiss-roll"]["machine"]["torch"]
    other = json.loads(out.read_text())
    other["swiss-roll"]["machine"]["commit"] = "another"
    other["swiss-roll"]["runs"]["ddim"]["uniform"]["distance"]["2"] = -1.0
    del other["swiss-roll"]["runs"]["heun"]
    out.write_text(json.dumps(other))
    CliRunner().invoke(solver_quality.main, [*options, str(out)], catch_exceptions=False)
    assert json.loads(out.read_text()) == kept  # all of it measured again
    whole = ROOT / "benchmarks/results/solver-quality.json"
    plot = tmp_path / "plot.png"
    drawn = CliRunner().invoke(solver_quality.main, ["--plot-only", "--out", str(whole), "--plot", str(plot)])
    assert drawn.exit_code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
