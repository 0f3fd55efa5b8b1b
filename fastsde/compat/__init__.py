"""Drop-in replacements for the functions of other code bases. None of these is imported before it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from . import tutorial

__all__ = [
    "azula",
    "denoising_diffusion_pytorch",
    "diffusers",
    "k_diffusion",
    "sbi",
    "score_sde",
    "tutorial",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
