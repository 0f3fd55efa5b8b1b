"""The tables of docs/benchmarks/networks.md: a library each, and a line of Markdown for each of its networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..clients.table import Marks, cell, made_by, versions
from .case import Result

MARKS = Marks("networks", "Networks that are lowered")


@dataclass
class Library:
    """A library with what became of its networks, or the reason for which it could not be imported."""

    title: str
    packages: tuple[str, ...] = ()
    results: list[Result] = field(default_factory=list)
    missing: str | None = None


def about(command: str) -> str:
    """Returns how the tables were made, and what they say."""
    return (
        f"{made_by(command)} Each network has random weights, and is called as its users call it. What its time, its "
        "conditions or its weights alone decide is computed before the first row; the rest is the program, whose "
        "instructions are counted here. A whole trajectory of a network that is lowered runs in one kernel on the "
        "CPU; any other runs row by row, for the reason given: the module, with its name in the network, and the "
        "operation."
    )


def kind(result: Result) -> str:
    return "failed" if result.failed else "not lowered" if result.refused else "lowered"


def summary(results: Sequence[Result]) -> str:
    """Returns how many networks are lowered."""
    kinds = [kind(each) for each in results]
    counts = ", ".join(f"{kinds.count(one)} {one}" for one in ("lowered", "not lowered", "failed") if one in kinds)
    return f"{len(results)} network{'s' * (len(results) != 1)}: {counts}."


def line(result: Result) -> str:
    becomes = f"{result.instructions} instructions: {', '.join(result.kinds)}"
    reason = (result.failed and f"failed: {result.failed}") or result.refused or becomes
    cells = (result.name, f"{result.weights:,}", "yes" if kind(result) == "lowered" else "no", reason)
    return "| " + " | ".join(cell(one) for one in cells) + " |"


def section(library: Library) -> str:
    if library.missing is not None:
        return f"### {library.title}\n\nLeft out, since it could not be imported: {cell(library.missing)}."
    known = f"{versions(library.packages)}. " if library.packages else ""
    lines = [
        f"### {library.title}\n\n{known}{summary(library.results)}",
        "",
        "| network | weights | lowered | program, or why not |",
        "| --- | ---: | --- | --- |",
        *map(line, library.results),
    ]
    return "\n".join(lines)


def markdown(libraries: Sequence[Library], command: str) -> str:
    """Returns all tables, after a paragraph on how they were made."""
    results = [result for library in libraries for result in library.results]
    total = f"All libraries together: {summary(results)}"
    return "\n\n".join([about(command), total, *map(section, libraries)]) + "\n"
