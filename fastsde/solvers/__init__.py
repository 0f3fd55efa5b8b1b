"""Solvers as tables (`StepTable`), a family of builders a file, and `build`, which knows them by name."""

from __future__ import annotations

from ..vocabulary import PREDICTIONS, SOLVERS
from .ancestral import ddim, ddpm
from .dpm_solver import dpm_solver_pp_2m
from .euler_maruyama import euler_maruyama, exponential_euler_maruyama
from .forms import score_form
from .heun import heun
from .named import build
from .table import MAX_SLOTS, Row, StepTable, row_width
from .terms import ABSENT, ANY, ONE, Terms

__all__ = [
    "ABSENT",
    "ANY",
    "MAX_SLOTS",
    "ONE",
    "PREDICTIONS",
    "SOLVERS",
    "Row",
    "StepTable",
    "Terms",
    "build",
    "ddim",
    "ddpm",
    "dpm_solver_pp_2m",
    "euler_maruyama",
    "exponential_euler_maruyama",
    "heun",
    "row_width",
    "score_form",
]
