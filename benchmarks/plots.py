"""The report's plots: the README's figures, a roofline, and the speed over the batch size.

Each has the digest of the figures that it shows in its metadata, so that a test finds a plot of others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from fastsde.files import atomic_path

from . import summary
from .suite.machine import SPECIAL_FLOP
from .suite.measure import Figures
from .suite.table import Headline, headlines, is_ours, ratio, timed

_OURS, _BASE, _OTHER, _PALE = "#c03a2b", "#777777", "#2c6fbb", "#8aa9c8"
_SWEEPS = {"swiss_roll": "swiss roll (MLP)", "mnist": "MNIST (U-Net)"}
_MARKERS = "osD^vP"


def draw(results: Mapping[str, Figures], folder: Path) -> Iterator[Path]:
    """Draws ``NAME-roofline.png`` and ``NAME-batch.png`` of each result, and ``speed.png`` of all of them.

    They are written atomically. Yields their paths.
    """
    every = list(results.values())
    figures = {"speed": (speed(every), every)}
    for name, result in results.items():
        figures |= {f"{name}-roofline": (roofline(result), [result]), f"{name}-batch": (batch_sizes(result), [result])}
    for name, (figure, shown) in figures.items():
        save(figure, folder / f"{name}.png", shown)
        yield folder / f"{name}.png"


def save(figure: Figure, path: Path, shown: Sequence[Figures]) -> None:
    """Writes a plot atomically as PNG, with the digest of the results that it shows as ``Source`` in its metadata."""
    with atomic_path(path) as temporary, mpl.rc_context({"font.size": 8}):
        figure.savefig(temporary, dpi=130, metadata={"Source": digest(shown)})


def digest(results: Sequence[Figures]) -> str:
    """Returns the SHA-256 of results, however their files are formatted."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


# The README's figures ----------------------------------------------------------------------------------------------


def speed(results: Sequence[Figures]) -> Figure:
    """Draws how many times as fast as the user's loop fastsde and the fastest other provider run each task."""
    figure = Figure(figsize=(8, 1 + 0.5 * len(summary.TASKS)), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        for place, name in enumerate(summary.TASKS):
            found = summary.headline(result, name)
            if found is None:
                axes.text(1.05, place, "not measured", va="center", color="gray", fontsize=8)
                continue
            _bars(axes, found, place)
        axes.axvline(1, color="black", lw=0.8)
        axes.set(xscale="log", xlim=(0.8, 400), title=summary.machine(result), xlabel="times as fast as the loop")
        axes.set_xticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
        axes.spines[["top", "right"]].set_visible(False)
    tasks = [task.split(":")[0].replace("`", "") for task in summary.TASKS.values()]
    panels[0].set_yticks(range(len(tasks)), tasks)
    panels[0].set_ylim(len(tasks) - 0.5, -0.5)  # of all panels; also where there are no bars
    panels[0].barh([0], [0], color=_OURS, label="fastsde")
    panels[0].barh([0], [0], color=_PALE, label="fastest other")
    panels[0].legend(loc="lower right", frameon=False, fontsize=8)
    return figure


def _bars(axes: Any, found: Headline, place: int) -> None:
    """Draws the fastest provider of each side, one above the other."""
    base = found.median(found.record["baseline"])
    for provider, color, offset in ((found.ours, _OURS, -0.2), (found.other, _PALE, 0.2)):
        if provider is not None:
            times = base / found.median(provider)
            label = ratio(times) if provider == found.ours else f"{ratio(times)} {provider.split(',')[0]}"
            axes.barh(place + offset, times, height=0.38, color=color)
            axes.text(max(times, 1) * 1.06, place + offset, label, va="center", fontsize=8)


# The roofline -------------------------------------------------------------------------------------------------------


def _flop(work: Figures) -> float:
    """Returns the total arithmetic of a task, with special functions counted as on a CPU."""
    total: float = work["flop"] + SPECIAL_FLOP * work["specials"]
    return total


def roofline(result: Figures) -> Figure:
    """Draws FLOP per second over FLOP per byte, below the copy bandwidth and the rates of matrix products.

    Each task is a vertical line between the baseline and the fastest provider of fastsde, numbered as in the legend.
    """
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    most = result["ceilings"]
    records = [
        record for record in result["cases"] if headlines(record) and record["work"]["bytes"] and _flop(record["work"])
    ]
    points = [_flop(record["work"]) / record["work"]["bytes"] for record in records]
    low, high = min(points, default=1) / 3, max(points, default=1) * 3
    for precision, rate in most["flop"].items():
        knee = rate / most["bytes"]
        ends = sorted({low, min(max(knee, low), high), high})
        axes.plot(ends, [min(rate, each * most["bytes"]) for each in ends], color="black", lw=1)
        axes.text(high, rate, f"{precision} {rate / 1e12:.3g} TFLOP/s ", ha="right", va="bottom")
    knee = min(most["flop"].values()) / most["bytes"]
    axes.text(knee / 2, knee / 2 * most["bytes"], f"{most['bytes'] / 1e9:,.0f} GB/s  ", ha="right")
    handles = []
    for number, (record, x) in enumerate(zip(records, points, strict=True), 1):
        handles.append(f"{number}  {record['what']}")
        _task(axes, record, x * 1.06 ** (points[: number - 1].count(x)), _flop(record["work"]), number)
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOP per byte of memory", ylabel="FLOP/s")
    axes.set_title(f"Roofline, {result['device']}")
    for label, color, face in (
        ("fastsde", _OURS, _OURS),
        ("fastest other", _OTHER, "white"),
        ("baseline", _BASE, "white"),
    ):
        axes.plot([], [], "o", color=color, mfc=face, label=label)
    axes.legend(loc="lower right", frameon=False)
    axes.annotate("\n".join(handles), (1.02, 1), xycoords="axes fraction", va="top", fontsize=7, annotation_clip=False)
    axes.grid(alpha=0.25, which="major")
    return figure


def _task(axes: Any, record: Figures, x: float, flop: float, number: int) -> None:
    """Draws a task: the fastest provider of each side, in fp32 or the default precision."""
    row = headlines(record)[0]
    marks = [(row.ours, _OURS, _OURS), (row.other, _OTHER, "white"), (record["baseline"], _BASE, "white")]
    rates = [(flop / row.median(name), color, face) for name, color, face in marks if name in timed(record)]
    axes.plot([x, x], [min(rates)[0], max(rates)[0]], color=_BASE, lw=0.6, zorder=1)
    for rate, color, face in rates:
        axes.plot(x, rate, "o", color=color, mfc=face, ms=4, zorder=2)
    axes.annotate(str(number), (x, max(rates)[0]), (0, 4), textcoords="offset points", ha="center", fontsize=7)


# The speed over the batch size --------------------------------------------------------------------------------------


def batch_sizes(result: Figures) -> Figure:
    """Draws samples times rows per second over the number of samples, for each provider."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, len(_SWEEPS))
    for axes, (subject, title) in zip(panels, _SWEEPS.items(), strict=True):
        records = [record for record in result["cases"] if record["subject"] == subject and "failed" not in record]
        names = _in_order(records)
        for place, name in enumerate(names):
            found = sorted(
                ((record, timed(record)[name]) for record in records if name in timed(record)),
                key=lambda each: each[0]["n"],
            )
            sizes = [record["n"] for record, _ in found]
            rates = [record["n"] * record["rows"] / each["median_s"] for record, each in found]
            color = mpl.colormaps["Reds" if is_ours(name) else "Blues"](0.9 - 0.6 * _rank(name, names))
            marker = _MARKERS[place % len(_MARKERS)]
            axes.plot(sizes, rates, marker=marker, ms=4, color=color, label=name, lw=1.4 if is_ours(name) else 0.8)
        axes.set(
            xscale="log", yscale="log", xlabel="samples in the batch", ylabel="samples x rows per second", title=title
        )
        axes.grid(alpha=0.25)
        if names:
            axes.legend(fontsize=6, frameon=False, loc="best")
    figure.suptitle(f"Speed over the batch size, {result['device']}")
    return figure


def _in_order(records: Iterable[Figures]) -> list[str]:
    """Returns the names of all providers, with fastsde's first."""
    names = dict.fromkeys(name for record in records for name in timed(record))
    return sorted(names, key=lambda name: not is_ours(name))


def _rank(name: str, names: list[str]) -> float:
    """Returns the position of a provider among fastsde's or among the others, from 0 to 1."""
    own = [each for each in names if is_ours(each) == is_ours(name)]
    return own.index(name) / max(1, len(own) - 1)
