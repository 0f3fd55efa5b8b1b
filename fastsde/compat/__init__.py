"""Drop-in replacements for the functions of other code bases."""

from . import tutorial

__all__ = ["tutorial"]
