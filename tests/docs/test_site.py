"""The site builds strictly, and no link to it, inside it or to a file of the repository is dead."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Documents that GitHub shows, and everything else that links to us by whole addresses.
ON_GITHUB = [*sorted(ROOT.glob("*.md")), ROOT / "fastsde/assets/README.md"]
ON_GITHUB += [ROOT / name / "README.md" for name in ("benchmarks", "examples", "kernels", "notebooks")]
LINKING = [*ON_GITHUB, *sorted(DOCS.rglob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]
LINKING += [path for path in sorted((ROOT / ".github").rglob("*")) if path.is_file()]
_REST = r"""([^\s()\[\]<>{}"'`\\]*)"""
_OF_THE_SITE = re.compile(r"https://fastsde\.github\.io/fastsde/?" + _REST)
_OF_A_FILE = re.compile(r"(?:github\.com|google\.com/github)/fastsde/fastsde/(blob|tree)/main/" + _REST)  # or Colab's


class Page(HTMLParser):
    """The links of a page and the places in it that links can name."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly from a copy."""
    pytest.importorskip("zensical", reason="needs Zensical: pip install '.[docs]'", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("site")
    for name in ("docs", "tools", "fastsde", "kernels", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("zensical.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "griffe:" not in done.stdout + done.stderr, done.stdout + done.stderr  # of docstrings, which are not strict
    return folder / "site"


@pytest.mark.slow
def test_no_link_inside_the_site_is_dead(site: Path) -> None:
    pages = {path.resolve(): Page(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) >= 30
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target, anchor = urldefrag(link)
            goal = (path.parent / unquote(target)).resolve() if target else path
            goal = goal / "index.html" if goal.is_dir() else goal
            if not goal.exists() or (anchor and goal in pages and unquote(anchor) not in pages[goal].anchors):
                dead.append(f"{path.relative_to(site.resolve())}: {link}")
    assert not dead, "\n".join(dead)


# Links from elsewhere -----------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def _to_the_site() -> Iterator[tuple[Path, str, str]]:
    """Yields each whole address of the site: the file that has it, the page and the place in the page."""
    for path in LINKING:
        for link in _OF_THE_SITE.findall(_text(path)):
            page, anchor = urldefrag(link.rstrip(".,;:"))
            yield path, page.strip("/"), anchor


def test_addresses_of_the_site_are_those_of_pages() -> None:
    found = list(_to_the_site())
    assert len({page for _, page, _ in found}) >= 10
    dead = [
        f"{path.relative_to(ROOT)}: {page}"
        for path, page, _ in found
        if not any((DOCS / goal).is_file() for goal in (f"{page}.md", f"{page}/index.md".lstrip("/"), page))
    ]
    assert not dead, "\n".join(dead)


@pytest.mark.slow
def test_addresses_of_places_in_pages_exist(site: Path) -> None:
    linked = ((path, site / page / "index.html", anchor) for path, page, anchor in _to_the_site() if anchor)
    dead = [f"{path}: {goal}#{anchor}" for path, goal, anchor in linked if anchor not in Page(goal.read_text()).anchors]
    assert not dead, "\n".join(dead)


def test_addresses_of_files_in_the_repository_exist() -> None:
    found = [(path, *link) for path in LINKING for link in _OF_A_FILE.findall(_text(path))]
    assert len({name for _, _, name in found}) >= 20
    dead = []
    for path, kind, name in found:
        goal = ROOT / unquote(urldefrag(name.rstrip(".,;:"))[0])
        if not (goal.is_dir() if kind == "tree" else goal.is_file()):
            dead.append(f"{path.relative_to(ROOT)}: {kind}/main/{name}")
    assert not dead, "\n".join(dead)


def test_relative_links_of_documents_on_github_exist() -> None:
    links = [(path, urlsplit(link)) for path in ON_GITHUB for link in Page(MarkdownIt().render(_text(path))).links]
    inside = [(path, parts.path) for path, parts in links if not parts.scheme and not parts.netloc and parts.path]
    assert len(inside) >= 20
    dead = [f"{path.relative_to(ROOT)}: {name}" for path, name in inside if not (path.parent / unquote(name)).exists()]
    assert not dead, "\n".join(dead)
