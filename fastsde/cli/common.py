"""Helpers shared by the commands: paths that are checked before any work, errors, and networks by name."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from ..vocabulary import SOLVERS, SPACINGS

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
        except (ValueError, OSError, RuntimeError, IndexError, ImportError) as error:
            raise click.ClickException(str(error)) from error
        except TypeError as error:
            if not kwargs.get("solver_options"):  # the only values whose type the command line does not check
                raise
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


def load_checkpoint(model: str, device: Any = "cpu", factory: str | None = None) -> Checkpoint:
    """Loads the checkpoint of a shipped model, a file, or the folder of a run.

    Args:
        factory: the name of the function that makes a network of the user's own, such as "package.module:make".
    """
    from .. import checkpoints

    return checkpoints.load(check_model(model), device=device, model=factory)


takes_factory = click.option(
    "--model",
    "factory",
    metavar="MODULE:FUNCTION",
    help="The function that makes your own network, such as networks:make, whose weights are loaded.",
)


def _named_values(
    context: click.Context, parameter: click.Parameter, pairs: tuple[str, ...]
) -> dict[str, bool | int | float | str] | None:
    """Turns pairs such as order=3 into a dictionary."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier() or not value:
            raise click.BadParameter(f"{pair!r} must be NAME=VALUE, such as order=3")
        options[name] = _parsed(value)
    return options or None


def _parsed(value: str) -> bool | int | float | str:
    if value in ("true", "false"):
        return value == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


_SOLVER = (
    click.option(
        "--solver", type=click.Choice(SOLVERS), default="euler_maruyama", show_default=True, help="Name of the solver."
    ),
    click.option("--steps", type=click.IntRange(1), default=999, show_default=True, help="Number of network calls."),
    click.option("--spacing", type=click.Choice(SPACINGS), help="Spacing of the times.  [default: the process's own]"),
    click.option("--rho", type=float, help="Exponent of karras spacing.  [default: 7]"),
    click.option("--t-end", type=float, default=0.0, show_default=True, help="Time that the trajectory ends at."),
    click.option("--clip", type=float, help="Bound of the predicted data, for solvers that use it, such as ddpm."),
    click.option("--eta", type=float, help="Share of DDPM's noise in [0, 1]; for ddim and euler_ancestral."),
    click.option(
        "--solver-option",
        "solver_options",
        multiple=True,
        metavar="NAME=VALUE",
        callback=_named_values,
        help="Option of the solver, such as order=3 for unipc; may be given several times.",
    ),
    click.option("--denoise", is_flag=True, help="Return the predicted data from the last step."),
)


def takes_solver(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that make a solver's table, by their names in `fastsde.Sampler`."""
    for option in reversed(_SOLVER):
        command = option(command)
    return command
