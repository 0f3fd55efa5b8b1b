"""The ``fastsde`` command, with one file per subcommand. Results go to stdout, everything else to stderr.

Exit codes: 0, 1 for errors, 2 for wrong usage, 130 after Ctrl-C. Nothing here imports torch before a command runs, so
that help and usage errors appear at once, and so that how threads wait is set before torch is loaded.
"""

from __future__ import annotations

import click

from .. import __version__
from ..openmp import wait_passively
from .bench import bench
from .encode import encode
from .export import export
from .info import info
from .likelihood import likelihood
from .sample import sample
from .train import train
from .verify import verify

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fastsde")
def main() -> None:
    """Sample and train score-based generative models."""
    wait_passively()


for command in (sample, train, likelihood, encode, export, verify, bench, info):
    main.add_command(command)
