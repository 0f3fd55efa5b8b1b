"""A readable listing of a traced loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .calls import Argument, Item
from .program import Program
from .tabulate import Tabulated
from .values import Node, Value

__all__ = ["explain"]

_SHOWN = 3  # rows at the beginning; the last one is shown too


def explain(
    name: str,
    program: Program,
    tabulated: Tabulated | None,
    why_no_table: str | None,
    engine: str | None,
    passed_over: str | None,
) -> str:
    """Returns what the loop became, what its network is given, and its first rows and its last one."""
    count = len(program.calls)
    slots = program.slots if tabulated is None else tabulated.table.slots
    lines = [f"{name}: {count} network calls, {_many(slots, 'slot')}"]
    if tabulated is not None:
        ran = "on the fastest backend that can" if engine is None else f"most recently on the backend {engine!r}"
        lines.append(f"It is a table, which the package runs, {ran}.")
        if passed_over is not None:
            reason = passed_over.removeprefix("backend 'persistent': ").partition("; use ")[0]
            lines.append(f"It does not run in one launch: {reason}.")
    else:
        lines.append(f"It is no table, since {why_no_table}: its rows run one by one in PyTorch.")
    operations = sorted({step.operation.name for step in program.operations if step.operation is not None})
    if operations:
        lines.append(f"Run again between the rows, since no table has them: {', '.join(operations)}.")
    if program.state is not None:
        lines.append(f"It starts from its argument {program.state!r}.")
    lines += [f"Note: it {note}." for note in program.notes]
    if tabulated is not None:
        lines += _network(tabulated.calls.leaves, tabulated.calls.selected)
    lines.append("")
    rows = program.rows
    shown = [0, *range(1, min(_SHOWN, count) + 1)]
    for number in shown:
        lines += _row(rows[number], number - 1, program.calls)
    if count > _SHOWN + 1:
        lines.append(f"  ... {count - _SHOWN - 1} rows")
    if count > _SHOWN:
        lines += _row(rows[-1], count - 1, program.calls)
    return "\n".join(lines)


def _network(leaves: list[Item | Argument], selected: list[Any]) -> list[str]:
    parts = []
    for leaf in leaves:
        if isinstance(leaf, Argument):
            parts.append(f"the state as {list(leaf.shape)}")
        elif leaf.kind == "constant":
            parts.append("a constant")
        elif leaf.kind == "condition":
            parts.append(f"a condition {list(leaf.shape or ())}")
        else:
            parts.append(f"a number that follows the row{'' if leaf.shape is None else f' as {list(leaf.shape)}'}")
    many = f"; of what it returns, {len(selected)} parts are combined" if len(selected) > 1 else ""
    return [f"The network is given {', '.join(parts)}{many}."]


def _row(row: Any, number: int, calls: list[Any]) -> list[str]:
    names = _names(row)
    lines = ["  start" if number < 0 else f"  row {number}"]
    if number >= 0:
        given = [_constant(leaf) for i, leaf in enumerate(calls[number].leaves) if i not in calls[number].states]
        what = ", ".join([*(_sum(value, names) for value in row.inputs), *given])
        lines.append(f"    f = network({what})")
    clamps = 0
    for step in row.steps:
        if step.bounds is not None:
            lines.append(
                f"    D{clamps or ''} = clamp({_sum(step.values[0], names)}, {step.bounds[0]:g}, {step.bounds[1]:g})"
            )
            clamps += 1
        else:
            lines.append(f"    {step.operation.name}({', '.join(_sum(value, names) for value in step.values)})")
    lines += [f"    s{i}' = {_sum(value, names)}" for i, value in enumerate(row.update)]
    lines += [f"    returned: {_sum(value, names)}" for value in row.emitted.values() if not row.update]
    return lines


def _names(row: Any) -> dict[Any, str]:
    names = {}
    for i, node in enumerate(row.noises):
        names["z", i] = "the initial state" if node.kind == "input" else "z" if len(row.noises) == 1 else f"z{i}"
    return names


def _sum(value: Value, names: dict[Any, str]) -> str:
    terms = []
    for (key, positions), c in value.terms.items():
        if isinstance(key, Node):
            name = key.kind
        else:
            plain = f"{key.kind}{key.index if key.kind in 'sz' or key.index else ''}"
            name = names.get((key.kind, key.index), plain)
        name = name if positions is None else f"{name}[moved]"
        weight = "each element's own" if isinstance(c, Tensor) else f"{c:.6g}"
        terms.append(name if weight == "1" else f"{weight} {name}")
    const = value.const
    if isinstance(const, Tensor):
        terms.append("each element's own constant")
    elif const != 0:
        terms.append(f"{const:.6g}")
    return " + ".join(terms).replace("+ -", "- ") or "0"


def _constant(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf) if isinstance(leaf, (int, float, str, bool, type(None))) else type(leaf).__name__
    first = leaf.flatten()[0].item() if leaf.numel() else None
    if leaf.numel() and bool((leaf == leaf.flatten()[0]).all()):
        return f"{first:.6g}" if isinstance(first, float) else str(first)
    return f"a tensor {list(leaf.shape)}"


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
