"""Result files as tables, plots and comparisons; the tables of documents match the result files that they name."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from fastsde.benchmarks import plots, report, summary
from fastsde.benchmarks.suite import run
from fastsde.benchmarks.suite.plan import Plan

ROOT = Path(__file__).parents[1]
CPU_FILE = ROOT / "benchmarks" / "results" / "cpu.json"
DRAW_AGAIN = "python -m benchmarks.report benchmarks/results/cpu.json benchmarks/results/gpu.json --plots docs/assets"


@pytest.fixture
def result() -> dict[str, Any]:
    """The committed figures of a CPU."""
    return report.load(CPU_FILE)


# The committed figures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("document", "kind"), [("README.md", "figures"), ("docs/benchmarks/index.md", "benchmarks")])
def test_the_tables_of_a_document_are_those_of_its_result_files(document: str, kind: str) -> None:
    path = ROOT / document
    text = path.read_text()
    names = [(path.parent / name).resolve() for name in report.marked_files(text)[kind]]
    assert names == [CPU_FILE, CPU_FILE.with_name("gpu.json")]
    assert report.updated(text, path.parent) == text, f"python -m benchmarks.report --update {document}"


def test_the_number_of_the_readmes_first_line_was_measured() -> None:
    first = (ROOT / "README.md").read_text().split("\n\n")[1]
    for name in ("cpu.json", "gpu.json"):
        found = summary.headline(report.load(CPU_FILE.with_name(name)), "loop-tutorial")
        assert found is not None
        speed = found.median(found.record["baseline"]) / found.median(found.ours)
        assert f"{speed:.0f} times" in first


def test_the_committed_figures_of_the_cpu_are_whole_and_meet_their_targets(result: dict[str, Any]) -> None:
    assert {"device", "torch", "commit", "threads", "fp32_products", "python"} <= set(result)
    assert not result["quick"]
    assert not str(result["commit"]).endswith("-dirty")
    names = [case.name for case in run.cases(Plan(torch.device("cpu")))]
    assert [record["name"] for record in result["cases"]] == names
    targets = [target for record in result["cases"] for target in record["targets"]]
    assert len(targets) == 20
    missed = [record["name"] for record in result["cases"] if not all(each["met"] for each in record["targets"])]
    assert missed == ["residual-1000"]  # 3.6 times; the goal is 4
    for record in result["cases"]:
        for name, each in record["providers"].items():
            assert not {"wrong", "failed"} & set(each), (record["name"], name)
            assert each.get("of_limit", 0) <= 1, (record["name"], name)  # otherwise the limit is wrong


def test_the_committed_figures_of_a_gpu_are_sound() -> None:
    result = report.load(ROOT / "benchmarks" / "results" / "gpu.json")
    assert result["kind"] == "cuda"
    assert not str(result["commit"]).endswith("-dirty")
    for record in result["cases"]:
        for name, each in record["providers"].items():
            assert not {"wrong", "failed"} & set(each), (record["name"], name)
            assert each.get("of_limit", 0) <= 1, (record["name"], name)


def test_providers_that_the_time_limit_left_out_are_counted() -> None:
    result = report.load(ROOT / "benchmarks" / "results" / "gpu.json")
    lines = report.markdown(result).splitlines()
    assert lines[-1] == "The run was limited in time: 172 of 328 providers were not measured."
    assert "its share of the time" not in "".join(lines)


# Cases measured later -----------------------------------------------------------------------------------------------


def test_cases_that_were_measured_again_replace_the_old_ones(tmp_path: Path, result: dict[str, Any]) -> None:
    newer = copy.deepcopy(result) | {"commit": "abcdef1"}
    newer["cases"] = [copy.deepcopy(record) for record in result["cases"] if record["subject"] == "perturb"]
    for record in newer["cases"]:
        record.pop("commit", None)
        record["seconds"] = 0.25
    paths = [tmp_path / name for name in ("old.json", "new.json", "all.json")]
    paths[0].write_text(json.dumps(result)), paths[1].write_text(json.dumps(newer))
    done = CliRunner().invoke(report.main, [str(paths[0]), str(paths[1]), "--merge", str(paths[2])])
    assert done.exit_code == 0, done.output
    merged = report.load(paths[2])
    assert [record["name"] for record in merged["cases"]] == [record["name"] for record in result["cases"]]
    own = {record["name"]: record.get("commit") for record in merged["cases"]}
    before = {record["name"]: record.get("commit", result["commit"]) for record in result["cases"]}
    assert {name for name, commit in own.items() if commit is None} == {record["name"] for record in newer["cases"]}
    assert all(commit in (None, before[name]) for name, commit in own.items())
    assert f"Measured at commit {result['commit']}: " in report.markdown(merged)
    with pytest.raises(ValueError, match=r"results must have the same .* threads differ"):
        report.merge(result | {"threads": 64}, newer)


# The report ---------------------------------------------------------------------------------------------------------


def test_a_document_is_written_between_its_marks(tmp_path: Path, result: dict[str, Any]) -> None:
    document, out = tmp_path / "README.md", tmp_path / "figures" / "a.json"
    out.parent.mkdir()
    out.write_text(json.dumps(result))
    document.write_text(
        "before\n<!-- benchmarks: figures/a.json -->\nold\n<!-- end of benchmarks -->\nbetween\n"
        "<!-- figures: figures/a.json figures/a.json -->\n<!-- end of figures -->\nafter\n"
    )
    for _ in range(2):  # the second changes nothing
        done = CliRunner().invoke(report.main, ["--update", str(document)])
        assert done.exit_code == 0, done.output
        text = document.read_text()
        assert text.startswith("before\n<!-- benchmarks: figures/a.json -->\n")
        assert "<!-- end of benchmarks -->\nbetween\n" in text
        assert text.endswith("<!-- end of figures -->\nafter\n")
        assert "old" not in text
        assert report.markdown(result) in text
        assert "\n".join(summary.table([result, result])) in text
    assert report.updated(text, tmp_path) == text
    result["cases"][0]["providers"]["fastsde native"]["median_s"] *= 1.5
    out.write_text(json.dumps(result))
    assert report.updated(text, tmp_path) != text


def test_the_short_table_shows_one_step_of_five_tasks(result: dict[str, Any]) -> None:
    (record,) = (each for each in result["cases"] if each["name"] == "mnist-20")
    record["providers"] = {
        "tutorial's loop, fp32": {"median_s": 3.0, "precision": "fp32"},
        "fastsde eager compiled, fp32": {"median_s": 1.0, "precision": "fp32"},
        "fastsde eager, bf16": {"median_s": 0.5, "precision": "bf16"},  # the table is of the default precision
    }
    result["cases"] = [record]
    lines = summary.table([result])
    assert len(lines) == 2 + len(summary.TASKS)
    assert lines[0] == "| one step of | 2 cores of an AMD EPYC: PyTorch | 2 cores of an AMD EPYC: fastsde |"
    (line,) = (line for line in lines if line.startswith(f"| {summary.TASKS['mnist-20']} |"))
    assert line.endswith("| 12 ms | 4 ms compiled, **3.00x** |")  # 250 steps
    assert sum("| not measured |  |" in line for line in lines) == len(summary.TASKS) - 1


def test_a_table_row_is_of_the_fastest_of_each(result: dict[str, Any]) -> None:
    (record,) = (each for each in result["cases"] if each["name"] == "swiss-roll-1000")
    (line,) = (line for line in report.markdown(result).splitlines() if line.startswith(f"| {record['what']} |"))
    ours = {name: each["median_s"] for name, each in record["providers"].items() if name.startswith("fastsde")}
    fastest = min(ours, key=lambda name: ours[name])
    loop = record["providers"][record["baseline"]]["median_s"]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert fastest.removeprefix("fastsde ") in cells[3] or "sample()" in fastest
    assert float(cells[4].rstrip("x")) == pytest.approx(loop / ours[fastest], rel=0.05)


@pytest.mark.parametrize(("factor", "verdict"), [(1.5, "SLOWER"), (1 / 1.5, "faster"), (1.0, "")])
def test_two_commits_are_compared_by_the_change_of_the_ratio(
    result: dict[str, Any], factor: float, verdict: str
) -> None:
    """A machine that is slower throughout changes nothing, but a slower provider does."""
    after = copy.deepcopy(result)
    after["commit"] = "another"
    for record in after["cases"]:
        for name, each in record["providers"].items():
            own = factor if (record["name"], name) == ("swiss-roll-1000", "fastsde persistent, fp32") else 1.0
            for key in ("median_s", "p20_s", "p80_s"):
                if key in each:
                    each[key] *= 3 * own
    lines = report.compare(result, after)
    assert "commit another" in lines[1]
    (line,) = (line for line in lines if "swiss-roll-1000 " in line and "fastsde persistent" in line)
    assert f"{1 / factor - 1:+.1%}" in line
    assert line.endswith(verdict or "%")
    others = [line for line in lines[4:] if "+0.0%" in line or "-0.0%" in line]
    assert len(others) >= len(lines) - 5
    assert not any("SLOWER" in line or "faster" in line for line in others)


def test_tables_and_comparisons_say_how_single_kernels_were_timed(result: dict[str, Any]) -> None:
    after = copy.deepcopy(result)
    (record,) = (each for each in after["cases"] if each["name"] == "noise-sample")
    for name in ("torch.randn", "fastsde native"):
        record["providers"][name] |= {"host_s": 41e-6, "timed_by": "graph replay"}
    record["providers"]["fastsde native"]["timed_by"] = "calls"
    text = report.markdown(after)
    assert f"takes the host, {record['what']}: 41 us (torch.randn), 41 us (fastsde native)." in text
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {record['what']} |"))
    assert "(native, by calls)" in line
    assert "the host" not in report.markdown(result)
    lines = [line for line in report.compare(result, after) if line.endswith("timed differently")]
    assert [line.split()[:3] for line in lines] == [["noise-sample", "fastsde", "native"]]


def test_cases_of_other_sizes_are_not_compared(result: dict[str, Any]) -> None:
    after = copy.deepcopy(result)
    for record in after["cases"]:
        record["what"] += ", larger"
    after["threads_wait"] = "passive (set by fastsde)"
    lines = report.compare(result, after)
    assert len(lines) == 4  # only the titles
    assert "2 threads, which wait: passive (set by fastsde), " in lines[1]
    assert lines[2] == "settings that differ: threads_wait; ratios are hardly comparable"


@pytest.mark.slow
def test_the_pictures_are_drawn(tmp_path: Path, result: dict[str, Any]) -> None:
    done = CliRunner().invoke(report.main, [str(CPU_FILE), "--plots", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for name in ("cpu-roofline", "cpu-batch", "speed"):
        picture = plt.imread(tmp_path / f"{name}.png")
        assert picture.shape[0] > 400
        assert picture.std() > 0.05
    axes = plots.roofline(result).axes[0]
    assert len([text for text in axes.texts if text.get_text().isdigit()]) >= 15
    swiss_roll, mnist = plots.batch_sizes(result).axes
    for panel, sizes in ((swiss_roll, [1000, 20_000, 1_000_000]), (mnist, [1, 20, 256, 1000])):
        lines = {line.get_label(): line for line in panel.lines}
        assert list(lines["tutorial's loop, fp32"].get_xdata()) == sizes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu-batch.png", "cpu-roofline.png", "speed.png"]


def test_the_committed_pictures_are_of_the_committed_figures() -> None:
    cpu, gpu = (report.load(CPU_FILE.with_name(name)) for name in ("cpu.json", "gpu.json"))
    shown = {"speed": [cpu, gpu]}
    for name, result in (("cpu", cpu), ("gpu", gpu)):
        shown |= {f"{name}-roofline": [result], f"{name}-batch": [result]}
    for name, results in shown.items():
        with Image.open(ROOT / "docs" / "assets" / f"{name}.png") as picture:
            assert picture.info["Source"] == plots.digest(results), f"{name}.png: {DRAW_AGAIN}"


def test_pictures_are_drawn_of_what_little_there_is(tmp_path: Path, result: dict[str, Any]) -> None:
    result["cases"] = []
    assert len(list(plots.draw({"nothing": result}, tmp_path))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{result}", "--compare"], "--compare takes two result files, got 1"),
        (["{other}"], "is not a result file of fastsde bench"),
        (["--update", "{other}"], "or <!-- figures: FILES --> and <!-- end of figures -->"),
        (["missing.json"], "does not exist"),
        ([], "Missing argument"),
    ],
)
def test_bad_arguments_say_what_is_wrong(tmp_path: Path, arguments: list[str], message: str) -> None:
    other = tmp_path / "other.json"
    other.write_text("[]")
    filled = [each.format(result=CPU_FILE, other=other) for each in arguments]
    done = CliRunner().invoke(report.main, filled)
    assert done.exit_code in (1, 2)
    assert message in done.output
    assert other.read_text() == "[]"


@pytest.mark.slow
def test_the_report_runs_from_a_checkout() -> None:
    command = [sys.executable, "-m", "benchmarks.report", str(CPU_FILE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(report.about(report.load(CPU_FILE)))
