"""``python -m fastsde``: the command line."""

from .cli import main

main()
