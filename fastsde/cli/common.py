"""Helpers shared by the commands: paths that are checked before any work, errors, and networks by name."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint

PATH = click.Path(path_type=Path, dir_okay=False)


class Interrupted(click.ClickException):
    """Ctrl-C. Of several processes, only the first one prints the message."""

    exit_code = 130

    def show(self, file: IO[Any] | None = None) -> None:
        if os.environ.get("RANK", "0") == "0":
            click.echo(f"\n{self.message}", file, err=True)


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turns errors that a user can fix into one line on stderr and exit code 1, and Ctrl-C into exit code 130.

    A KeyboardInterrupt may carry a message that says what became of the work.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, RuntimeError) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt as interrupt:
            raise Interrupted(str(interrupt) or "interrupted") from None

    return wrapped


def job(command: Callable[..., None]) -> Callable[..., None]:
    """Applies `fastsde.distributed.job`, imported only when the command runs."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from .. import distributed

        distributed.job(command)(*args, **kwargs)

    return wrapped


def suffix(*allowed: str) -> Callable[[click.Context, click.Parameter, Path | None], Path | None]:
    """Returns a callback that refuses paths with any other suffix before any work is done."""

    def check(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
        if path is not None and path.suffix.lower() not in allowed:
            raise click.BadParameter(f"{path} must end in {' or '.join(allowed)}")
        return path

    return check


def check_model(model: str) -> str:
    """Returns ``model``, the name of a shipped model, a file, or the folder of a run.

    Raises:
        FileNotFoundError: for a folder without a checkpoint.
    """
    from ..checkpoints import RUN_CHECKPOINT, SHIPPED

    folder = Path(model)
    if model not in SHIPPED and folder.is_dir() and not (folder / RUN_CHECKPOINT).is_file():
        raise FileNotFoundError(
            f"the folder {folder.resolve()} holds no training run: expected {RUN_CHECKPOINT} in it, which "
            f"'fastsde train' writes; give such a folder, a checkpoint file or one of {', '.join(SHIPPED)}"
        )
    return model


def load_checkpoint(model: str, device: Any = "cpu") -> Checkpoint:
    """Loads the checkpoint of a shipped model, a file, or the folder of a run."""
    from .. import checkpoints

    return checkpoints.load(check_model(model), device=device)
