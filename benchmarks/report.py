"""Turns result files into the tables and plots of the documentation, and compares them.

python -m benchmarks.report RESULT.json ...                      the tables, as Markdown
python -m benchmarks.report --update README.md                   writes a document's tables again, between its marks
python -m benchmarks.report RESULT.json ... --plots FOLDER       a roofline and the speed over the batch size of each,
                                                                 and the README's figures of all of them
python -m benchmarks.report OLD.json NEW.json --compare          what became faster or slower from one commit to another
python -m benchmarks.report OLD.json NEW.json --merge ALL.json   all cases of NEW, and those that only OLD has
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import click

from fastsde.files import atomic_path

from . import summary
from .suite.case import SPENT
from .suite.measure import Figures
from .suite.run import SUBJECTS, write_json
from .suite.table import TITLES, duration, has_replays, headlines, is_ours, noise, ratio, row, timed, without_time

# <!-- figures: FILES --> is the README's short table of result files, <!-- benchmarks: FILES --> the tables in full.
_MARK = re.compile(
    r"(?P<begin><!-- (?P<kind>figures|benchmarks):(?P<files>[^>]*)-->\n).*?(?P<end><!-- end of (?P=kind) -->)",
    re.DOTALL,
)


def load(path: Path) -> Figures:
    """Loads a result file of ``fastsde bench``.

    Raises:
        ValueError: for a file that is not one.
    """
    try:
        result: Figures = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a result file of fastsde bench: {error}") from error
    keys = {"cases", "ceilings", "device", "kind", "threads", "torch", "triton", "commit", "quick"}
    missing = keys - set(result) if isinstance(result, dict) else keys
    if missing or not {"bytes", "flop"} <= set(result["ceilings"]):
        raise ValueError(
            f"{path} is not a result file of fastsde bench: it lacks {', '.join(sorted(missing)) or 'rates'}"
        )
    return result


# Tables -------------------------------------------------------------------------------------------------------------


def about(result: Figures) -> str:
    """Returns the machine, the versions and the commit in one line."""
    threads = f"{result['threads']} threads"
    if "threads_wait" in result:
        threads += f", which wait: {result['threads_wait']}"
    rate = _products(result["ceilings"])
    parts = [
        threads if result["kind"] == "cpu" else f"Triton {result['triton']}",
        f"PyTorch {result['torch']}",
        f"copies {result['ceilings']['bytes'] / 1e9:,.0f} GB/s, products up to {rate:.3g} TFLOP/s",
        f"commit {result['commit'] or 'unknown'}",
    ]
    return f"{result['device']}: {', '.join(parts)}{', small sizes' if result['quick'] else ''}"


def markdown(result: Figures) -> str:
    """Returns a paragraph about the machine and a table of all cases."""
    cells = [each.cells for record in result["cases"] for each in headlines(record)]
    lines = [about(result) + ".", "", row(TITLES), row([":--"] + ["--:"] * (len(TITLES) - 1)), *map(row, cells)]
    lines += _of_the_host(result["cases"])
    earlier: dict[str, list[str]] = {}
    for record in result["cases"]:
        if "commit" in record:
            earlier.setdefault(_when(record, result), []).append(record["what"])
    for when, names in earlier.items():
        lines += ["", f"Measured at {when}: {'; '.join(names)}."]
    reasons = [(record["what"], reason) for record in result["cases"] for reason in without_time(record)]
    spent = sum(SPENT in reason for _, reason in reasons)
    left = [f"{what}: {reason}" for what, reason in reasons if SPENT not in reason]
    if left:
        lines += ["", f"Without a time: {'; '.join(left)}."]
    if spent:
        measured = sum(len(timed(record)) for record in result["cases"])
        lines += ["", f"The run was limited in time: {spent} of {spent + measured} providers were not measured."]
    return "\n".join(lines)


def _when(record: Figures, result: Figures) -> str:
    """Returns the commit of a case that was kept in a merge, and how fast the machine was, if that differs."""
    rate, usual = (_products(each) for each in (record.get("ceilings", result["ceilings"]), result["ceilings"]))
    where = "" if 0.8 < rate / usual < 1.25 else f", where products reached {rate:.3g} TFLOP/s"
    return f"commit {record['commit']}{where}"


def _products(ceilings: Figures) -> float:
    """Returns the rate of the fastest products, in TFLOP/s."""
    return max(ceilings["flop"].values()) / 1e12


def _of_the_host(records: Sequence[Figures]) -> list[str]:
    """Returns how single kernels were timed on a GPU, and the host time for a call of each."""
    found = []
    for record in filter(has_replays, records):
        chosen = {name: each for name, each in timed(record).items() if name == record["baseline"] or is_ours(name)}
        each = (f"{duration(figures['host_s'])} ({name})" for name, figures in chosen.items() if "host_s" in figures)
        found.append(f"{record['what']}: {', '.join(each)}")
    if not found:
        return []
    meaning = 'Times of single kernels are GPU times per call in a replayed CUDA graph; "by calls" includes the host.'
    return ["", f"{meaning} A call from Python takes the host, {'; '.join(found)}."]


def marked_files(text: str) -> dict[str, list[str]]:
    """Returns the result files that the marks of a document name, relative to its folder, for each kind of table.

    Raises:
        ValueError: for a document without marks.
    """
    found = {each["kind"]: each["files"].split() for each in _MARK.finditer(text)}
    if not found:
        raise ValueError(
            "the document must have the marks <!-- benchmarks: FILES --> and <!-- end of benchmarks -->, "
            "or <!-- figures: FILES --> and <!-- end of figures -->"
        )
    return found


def updated(text: str, folder: Path) -> str:
    """Returns a document with the tables of the result files that its marks name."""
    marked_files(text)  # raises if there are none

    def section(found: re.Match[str]) -> str:
        results = [load(folder / name) for name in found["files"].split()]
        made = summary.table(results) if found["kind"] == "figures" else ["\n\n".join(map(markdown, results))]
        return "\n".join([found["begin"], *made, "", found["end"]])

    return _MARK.sub(section, text)


_SETTINGS = ("device", "threads", "threads_wait", "torch", "quick")  # results with other settings are hardly comparable

# Two commits --------------------------------------------------------------------------------------------------------


def compare(before: Figures, after: Figures) -> list[str]:
    """Returns, for every provider timed in both, the ratio to its baseline and how it has changed.

    A change counts if it exceeds twice the noise: the baseline's difference from itself, or the spread of the rounds.
    """
    rows = [("case", "provider", "before", "after", "change", "")]
    old = {record["name"]: record for record in before["cases"]}
    for record in after["cases"]:
        earlier = old.get(record["name"])
        if earlier is None or record["what"] != earlier["what"]:
            continue
        for name in timed(earlier):
            if name in timed(record) and name != record["baseline"]:
                rows.append(_change(earlier, record, name))
            elif name not in timed(record):
                rows.append((record["name"], name, "", "", "", "NO TIME now"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    titles = [f"before  {about(before)}", f"after   {about(after)}"]
    other = [key for key in _SETTINGS if before.get(key) != after.get(key)]
    titles.append(f"settings that differ: {', '.join(other)}; ratios are hardly comparable" if other else "")
    return titles + [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _change(earlier: Figures, record: Figures, name: str) -> tuple[str, ...]:
    ratios = [_speed(each, name) for each in (earlier, record)]
    if None in ratios:
        return record["name"], name, "", "", "", "no baseline"
    change = ratios[1] / ratios[0] - 1  # type: ignore[operator]
    doubt = 2 * max(_doubt(each, name) for each in (earlier, record))
    verdict = "" if abs(change) <= doubt else "faster" if change > 0 else "SLOWER"
    if earlier["providers"][name].get("timed_by") != record["providers"][name].get("timed_by"):
        verdict = "timed differently"
    return record["name"], name, *(ratio(each) for each in ratios if each is not None), f"{change:+.1%}", verdict


def _speed(record: Figures, name: str) -> float | None:
    base = record["providers"].get(record["baseline"], {}).get("median_s")
    return None if base is None else base / record["providers"][name]["median_s"]


def _doubt(record: Figures, name: str) -> float:
    """Returns the relative noise of the measurement, or half the relative spread of the rounds if that is larger."""
    spreads = [
        (each["p80_s"] - each["p20_s"]) / 2 / each["median_s"]
        for each in (record["providers"][record["baseline"]], record["providers"][name])
    ]
    return max(noise(record) or 0.0, *spreads)


# Cases measured later ------------------------------------------------------------------------------------------------


def merge(before: Figures, after: Figures) -> Figures:
    """Returns the newer result plus the cases that only the older one has, with the commit of their measurement, and
    the ceilings of the machine then: machines of one name may differ.

    Raises:
        ValueError: for results of different machines, PyTorch versions or settings.
    """
    other = [key for key in _SETTINGS if before.get(key) != after.get(key)]
    if other:
        raise ValueError(f"results must have the same {', '.join(_SETTINGS)} to be merged, {', '.join(other)} differ")
    new = {record["name"] for record in after["cases"]}
    own = {"commit": before["commit"], "ceilings": before["ceilings"]}
    kept = [{**own, **record} for record in before["cases"] if record["name"] not in new]
    cases = sorted([*kept, *after["cases"]], key=lambda record: SUBJECTS.index(record["subject"]))
    return {**after, "cases": cases}


# The command --------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("results", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--update",
    "documents",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Write the tables of this document again, between its marks, which name the result files; repeatable.",
)
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), help="Draw plots into this folder.")
@click.option("--compare", "compares", is_flag=True, help="Compare two files, the older one first.")
@click.option(
    "--merge",
    "merged",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the cases of the second of two files, and those that only the first one has.",
)
def main(
    results: tuple[Path, ...], documents: tuple[Path, ...], plots: Path | None, compares: bool, merged: Path | None
) -> None:
    """Turn result files of `fastsde bench` into tables, plots and comparisons; by default tables as Markdown."""
    if not results and not documents:
        raise click.UsageError("Missing argument 'RESULTS...' or option '--update'.")
    try:
        loaded = [load(path) for path in results]
        for option, given in (("--compare", compares), ("--merge", merged)):
            if given and len(loaded) != 2:
                raise ValueError(f"{option} takes two result files, got {len(loaded)}")
        if merged is not None:
            write_json(merged, merge(*loaded))
        if compares:
            click.echo("\n".join(compare(*loaded)))
        for document in documents:
            text = updated(document.read_text(), document.resolve().parent)
            with atomic_path(document) as temporary:
                temporary.write_text(text)
        if plots is not None:
            from . import plots as pictures  # matplotlib takes a second to import

            for written in pictures.draw(
                {path.stem: result for path, result in zip(results, loaded, strict=True)}, plots
            ):
                click.echo(written)
        if not (compares or documents or plots or merged):
            click.echo("\n\n".join(map(markdown, loaded)))
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
