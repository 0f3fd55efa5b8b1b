"""The five figures that the README shows of each machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .suite.measure import Figures
from .suite.table import Headline, duration, headlines, ratio, row

__all__ = ["TASKS", "headline", "machine", "table"]

# What users have, by the name of its case.
TASKS: Mapping[str, str] = {
    "loop-tutorial": "your loop, handed over: swiss roll, MLP, 1,000 points",
    "film-1000": "your small network: MLP with FiLM and conditions, 1,000 points",
    "mnist-20": "the tutorial's U-Net, 20 digits",
    "loop-diffusers": "diffusers' `DDPMPipeline`, 8 images",
    "train-mnist": "training the tutorial's U-Net, 64 digits",
}


def table(results: Sequence[Figures]) -> list[str]:
    """Returns a Markdown table of the time of one step of each task, for each result file."""
    titles = ["one step of", *(f"{machine(result)}: {side}" for result in results for side in ("PyTorch", "fastsde"))]
    lines = [row(titles), row([":--", *["--:"] * (2 * len(results))])]
    for name, task in TASKS.items():
        cells = [task]
        for result in results:
            cells += _cells(headline(result, name))
        lines.append(row(cells))
    return lines


def _cells(found: Headline | None) -> tuple[str, str]:
    if found is None:
        return "not measured", ""
    steps = found.record.get("rows", 1)  # training is measured by the step
    base, ours = (found.median(name) / steps for name in (found.record["baseline"], found.ours))
    how = " compiled" if "compiled" in found.ours else ""
    return duration(base), f"{duration(ours)}{how}, **{ratio(base / ours)}**"


def headline(result: Figures, name: str) -> Headline | None:
    """Returns a task's figures in the default precision, or None if it was not measured."""
    found = (each for record in result["cases"] if record["name"] == name for each in headlines(record))
    return next(found, None)


def machine(result: Figures) -> str:
    """Returns a machine in few words."""
    device: str = result["device"].removeprefix("NVIDIA ")
    return f"{result['threads']} cores of an {device}" if result["kind"] == "cpu" else device
