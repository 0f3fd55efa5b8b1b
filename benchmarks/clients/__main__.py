"""Traces the samplers of other packages, compares each with itself, and writes the tables of the documentation.

python -m benchmarks.clients                              the tables of all clients that are installed
python -m benchmarks.clients --client diffusers           those of one client
python -m benchmarks.clients --out docs/benchmarks/loops.md        between the marks of a document, or as a new one
"""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path

import click

# The loops' own progress bars; tqdm reads this when it is imported.
os.environ.setdefault("TQDM_DISABLE", "1")

from .check import check
from .table import MARKS, Client, kind, markdown, summary

CLIENTS = (
    "tutorial",
    "diffusers",
    "k_diffusion",
    "edm",
    "score_sde",
    "azula",
    "sbi",
    "denoising_diffusion_pytorch",
    "torchsde",
    "torchdiffeq",
    "own",
    "robust",
)


def run(name: str, only: str) -> Client:
    """Checks the samplers of one client whose names contain ``only``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(f".{name}", __package__)
            cases = module.cases()
    except ImportError as error:
        return Client(name.replace("_", "-"), missing=str(error))
    client = Client(module.TITLE, module.PACKAGES)
    for case in cases:
        if only in case.name:
            client.results.append(check(case))
    return client


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The document to write the tables into.")
@click.option("--client", "names", type=click.Choice(CLIENTS), multiple=True, help="Only this client; repeatable.")
@click.option("--only", default="", help="Only samplers whose names contain this.")
def main(out: Path | None, names: tuple[str, ...], only: str) -> None:
    """Trace other people's samplers and compare each with itself. The exit code is 1 if one is wrong or fails."""
    command = f"python -m benchmarks.clients --out {out}" if out else "python -m benchmarks.clients"
    clients = []
    for name in names or CLIENTS:
        client = run(name, only)
        clients.append(client)
        click.echo(f"{name}: {client.missing or summary(client.results)}", err=True)
    tables = markdown(clients, command)
    if out is None:
        click.echo(tables)
    else:
        out.write_text(MARKS.inserted(out.read_text() if out.exists() else None, tables))
    bad = [result for client in clients for result in client.results if kind(result) in ("wrong", "failed")]
    for result in bad:
        click.echo(f"{kind(result)}: {result.name}: {result.failed or (result.error64, result.error32)}", err=True)
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
