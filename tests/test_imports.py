"""The import graph of the package has no cycle, not even through imports inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import fastsde

ROOT = Path(fastsde.__file__).parent


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in ROOT.rglob("*.py")}
# The package itself imports its public names on first access.
LAZY = {"fastsde"}


def _imports(name: str) -> Iterator[str]:
    """Returns the modules of the package that a module imports, anywhere in its file."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for each in node.names:
                yield f"{source}.{each.name}" if f"{source}.{each.name}" in MODULES else source


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: {each for each in _imports(name) if each in MODULES} - LAZY for name in MODULES.keys() - LAZY}
    assert len(graph) > 50
    assert "fastsde.reference" in graph["fastsde.engines.eager"]
    TopologicalSorter(graph).prepare()  # raises CycleError with the cycle
