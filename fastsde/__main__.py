"""The console script ``fastsde``, and ``python -m fastsde``."""

from __future__ import annotations

import sys

from .extras import MissingExtraError, require

__all__ = ["main"]


def main() -> None:
    """Runs the command line, or says in one line what it lacks."""
    try:
        require("click", extra="cli", what="the command line")
    except MissingExtraError as error:
        sys.exit(f"Error: {error}")
    from .cli import main as command

    command()


if __name__ == "__main__":
    main()
