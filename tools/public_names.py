"""A Griffe extension for the API reference: names as users import them, and links in docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Alias, AliasResolutionError, CyclicAliasError, Extension, Module, NameResolutionError, Object

_PAGES = Path(__file__).parents[1] / "docs" / "reference"
_PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_NAME = re.compile(r"(?<![`\[])`([A-Za-z_][\w.]*)`(?![`\]])")


class PublicNames(Extension):
    """Gives objects the names that users import, and turns `names` and papers in docstrings into links.

    In Griffe a submodule takes the place of a function that the package imports under the name of its file, such as
    `fastsde.solvers.heun`. In Python the import wins, so here it does, too.
    """

    def __init__(self) -> None:
        self._imported: dict[str, str] = {}  # the paths of names that are imported, and where from
        self._public: dict[str, str] = {}  # the paths of what has an entry, and the names there

    def on_alias_instance(self, *, alias: Alias, **kwargs: Any) -> None:
        self._imported[alias.path] = alias.target_path

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        modules = pkg.modules_collection
        own = {path: target for path, target in self._imported.items() if target == f"{path}.{path.rpartition('.')[2]}"}
        found = {path: modules[target] for path, target in own.items()}
        for path, target in found.items():
            parent = modules[path.rpartition(".")[0]]
            parent.set_member(target.name, Alias(target.name, target, parent=parent))
        for page in sorted(_PAGES.glob("*.md")):
            for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE):
                self._public[_actual(modules[name]).path] = name
        for name in set(self._public.values()):
            entry = _actual(modules[name])
            self._link(entry)
            for member in entry.members.values() if entry.is_class else ():
                if not member.is_alias:
                    self._link(member)

    def _link(self, entry: Any) -> None:
        """Turns what a docstring names into links: papers, and names that have an entry in the reference."""
        if entry.docstring is not None:
            text = _NAME.sub(lambda found: self._linked(entry, found[1]), entry.docstring.value)
            entry.docstring.value = _PAPER.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)

    def _linked(self, entry: Object, name: str) -> str:
        first, *rest = name.split(".")
        try:
            path = entry.resolve(first) if first != "fastsde" else first
            found = entry.modules_collection[self._public.get(path, path)]
            for each in rest:
                found = _actual(found).members[each]
            found = _actual(found)
        except (NameResolutionError, AliasResolutionError, CyclicAliasError, KeyError):
            return f"`{name}`"
        path = self._public.get(found.path)
        parent = found.parent
        if path is None and parent is not None and parent.is_class and parent.path in self._public and found.docstring:
            path = f"{self._public[parent.path]}.{found.name}"
        return f"`{name}`" if path is None else f"[`{name}`][{path}]"


def _actual(found: Any) -> Any:
    return found.final_target if found.is_alias else found
