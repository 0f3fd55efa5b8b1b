"""The API reference is complete: each public name has one entry, and the page of the command line is current."""

from __future__ import annotations

import importlib
import re
import sys
from collections import defaultdict
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import fastsde

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
OTHERS = ("fastsde.objective",)  # public, but no attributes of fastsde
_ENTRY = re.compile(r"^::: (\S+)", re.MULTILINE)


def _modules() -> list[ModuleType]:
    """Returns the public modules."""
    names = [f"fastsde.{name}" for name in dir(fastsde) if isinstance(getattr(fastsde, name), ModuleType)]
    names += [f"fastsde.compat.{name}" for name in fastsde.compat.__all__]
    return [fastsde, *(importlib.import_module(name) for name in (*names, *OTHERS))]


def _identity(path: str) -> str:
    """Returns the same string for all paths of one function, class or module; other values are told by their path."""
    parent, _, name = path.rpartition(".")
    if not parent:
        return path
    value = getattr(importlib.import_module(parent), name, None)
    if isinstance(value, ModuleType):
        return value.__name__
    is_own = str(getattr(value, "__module__", "")).startswith("fastsde")
    return f"{value.__module__}.{value.__qualname__}" if is_own and hasattr(value, "__qualname__") else path


def test_each_public_name_has_one_entry() -> None:
    entries = defaultdict(list)
    for page in PAGES:
        for path in _ENTRY.findall(page.read_text()):
            entries[_identity(path)].append(f"{path} in {page.name}")
    several = [found for found in entries.values() if len(found) > 1]
    assert not several
    public = [f"{module.__name__}.{name}" for module in _modules() for name in module.__all__]
    public += [f"fastsde.{name}" for name in dir(fastsde)]
    values = {_identity(entry.split(" in ")[0]) for found in entries.values() for entry in found}
    assert sorted({path for path in public if _identity(path) not in values}) == []


def test_each_entry_exists_and_has_a_docstring() -> None:
    for page in PAGES:
        for path in _ENTRY.findall(page.read_text()):
            parent, _, name = path.rpartition(".")
            value = getattr(importlib.import_module(parent), name)
            if isinstance(value, (type, FunctionType, ModuleType)):
                assert value.__doc__, path


def test_the_overview_and_the_navigation_name_each_page() -> None:
    overview, configuration = (ROOT / name for name in ("docs/reference/index.md", "zensical.toml"))
    for page in PAGES:
        assert f'"reference/{page.name}"' in configuration.read_text()
        assert page == overview or f"]({page.name})" in overview.read_text(), page.name


def test_the_page_of_the_command_line_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    command_line = importlib.import_module("command_line")
    monkeypatch.delitem(sys.modules, "command_line")
    assert command_line.PAGE.read_text() == command_line.page(), "run python tools/command_line.py"
