"""The tables of docs/benchmarks/loops.md: a client each, and a line of Markdown for each of its samplers."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata

import torch

import fastsde

from .check import Result


@dataclass(frozen=True)
class Marks:
    """The lines of a document between which tables are written: ``<!-- name -->`` and ``<!-- end of name -->``.

    Args:
        title: of a new document.
    """

    name: str
    title: str

    def inserted(self, document: str | None, tables: str) -> str:
        """Returns a document with the tables between its marks, or a new one.

        Raises:
            ValueError: for a document without marks.
        """
        begin, end = f"<!-- {self.name} -->", f"<!-- end of {self.name} -->"
        if document is None:
            document = f"# {self.title}\n\n{begin}\n{end}\n"
        pattern = re.compile(rf"(?P<begin>{re.escape(begin)}\n).*?(?P<end>{re.escape(end)})", re.DOTALL)
        if pattern.search(document) is None:
            raise ValueError(f"the document has no lines {begin!r} and {end!r}")
        return pattern.sub(lambda match: f"{match['begin']}\n{tables}\n{match['end']}", document)


MARKS = Marks("clients", "Samplers that are traced")


@dataclass
class Client:
    """A client with what the check of its samplers found, or the reason for which it could not be imported."""

    title: str
    packages: tuple[str, ...] = ()
    results: list[Result] = field(default_factory=list)
    missing: str | None = None


def made_by(command: str) -> str:
    """Returns with what tables were made, as a sentence."""
    python, machine = platform.python_version(), platform.machine()
    return (
        f"Made by `{command}` with fastsde {fastsde.__version__}, PyTorch {torch.__version__} and Python {python} on "
        f"{machine}."
    )


def about(command: str) -> str:
    """Returns how the tables were made, in a few sentences."""
    return (
        f"{made_by(command)} Each loop is traced on a small batch; then the loop itself and its trace run on the "
        "same noises, with a nonlinear stand-in for the network. The trace runs by its engine and row by row in "
        "PyTorch, and the larger error counts: the largest difference to the loop's result, relative to its largest "
        "number, once with all draws in float64, so that only the algebra is compared, and once with both in fp32. "
        "The last column is how far the loop in fp32 is from its trace in float64. A table runs through fastsde's "
        "solver step; other rows run in PyTorch, for the reason given. torchsde's Brownian trees are replaced by a "
        "Brownian motion of plain normals."
    )


def kind(result: Result) -> str:
    if result.failed is not None:
        return "failed"
    if result.is_wrong:
        return "wrong"
    if result.refused is not None:
        return "refused but with `replay=True`" if result.replayed else "refused"
    return "as tables" if result.not_a_table is None else "as other rows"


def summary(results: Sequence[Result]) -> str:
    """Returns how many samplers became what."""
    counts = Counter(kind(result) for result in results)
    order = ("as tables", "as other rows", "refused but with `replay=True`", "refused", "wrong", "failed")
    loops = "1 loop" if len(results) == 1 else f"{len(results)} loops"
    return f"{loops}: " + ", ".join(f"{counts[one]} {one}" for one in order if counts[one]) + "."


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def engine(result: Result) -> str:
    """Returns what runs the trace, and why it is not a table."""
    rows = "table" if result.not_a_table is None else f"rows: {result.not_a_table}"
    if result.failed is not None:
        return f"failed: {result.failed}"
    if result.refused is None:
        return rows
    return f"refused: {result.refused}" + (f"; with `replay=True`, {rows}" if result.replayed else "")


def error(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def line(result: Result) -> str:
    slots = "" if result.slots is None else str(result.slots)
    wrong = " **wrong**" if kind(result) == "wrong" else ""
    errors = (result.error64, result.error32, result.own32)
    cells = (result.name, slots, engine(result) + wrong, *map(error, errors))
    return "| " + " | ".join(cell(one) for one in cells) + " |"


def versions(packages: Sequence[str]) -> str:
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)


def section(client: Client) -> str:
    if client.missing is not None:
        return f"### {client.title}\n\nLeft out, since it could not be imported: {cell(client.missing)}."
    heading = f"### {client.title}\n\n"
    if client.packages:
        heading += f"{versions(client.packages)}. "
    return "\n".join(
        [
            heading + summary(client.results),
            "",
            "| sampler | slots | runs as | float64 | fp32 | the loop's own, fp32 |",
            "| --- | --- | --- | --- | --- | --- |",
            *(line(result) for result in client.results),
        ]
    )


def markdown(clients: Sequence[Client], command: str) -> str:
    """Returns all tables, after a sentence on how they were made."""
    results = [result for client in clients for result in client.results]
    total = f"All clients together: {summary(results)}"
    return "\n\n".join([about(command), total, *(section(client) for client in clients)]) + "\n"
