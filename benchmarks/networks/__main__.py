"""Lowers networks of other packages to programs, and writes the tables of the documentation.

python -m benchmarks.networks                              the tables of all libraries that are installed
python -m benchmarks.networks --library sbi                those of one library
python -m benchmarks.networks --out docs/benchmarks/networks.md       between the marks of a document, or as a new one
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

import click

from .case import check
from .table import MARKS, Library, kind, markdown, summary

LIBRARIES = ("papers", "diffusers", "sbi", "azula", "denoising_diffusion_pytorch", "k_diffusion", "zuko")


def run(name: str) -> Library:
    """Lowers the networks of one library."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(f".{name}", __package__)
            cases = module.cases()
    except ImportError as error:
        return Library(name.replace("_", "-"), missing=str(error))
    return Library(module.TITLE, module.PACKAGES, [check(case) for case in cases])


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The document to write the tables into.")
@click.option("--library", "names", type=click.Choice(LIBRARIES), multiple=True, help="Only this one; repeatable.")
def main(out: Path | None, names: tuple[str, ...]) -> None:
    """Lower other people's networks, and tell why some are not. The exit code is 1 if one fails otherwise."""
    command = f"python -m benchmarks.networks --out {out}" if out else "python -m benchmarks.networks"
    libraries = []
    for name in names or LIBRARIES:
        library = run(name)
        libraries.append(library)
        click.echo(f"{name}: {library.missing or summary(library.results)}", err=True)
    tables = markdown(libraries, command)
    if out is None:
        click.echo(tables)
    else:
        out.write_text(MARKS.inserted(out.read_text() if out.exists() else None, tables))
    failed = [each for library in libraries for each in library.results if kind(each) == "failed"]
    for result in failed:
        click.echo(f"failed: {result.name}: {result.failed}", err=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
