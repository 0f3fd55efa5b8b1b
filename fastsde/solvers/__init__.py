"""Solvers as tables (`StepTable`): one file per family of builders, and `build`, which finds them by name."""

from __future__ import annotations

from types import ModuleType

from ..vocabulary import PREDICTIONS
from .adams_bashforth import adams_bashforth
from .adaptive import AdaptiveODE, GottaGoFast
from .ancestral import ddim, ddpm, euler_ancestral
from .deis import deis
from .dpm_solver import dpm_solver_pp_2m, dpm_solver_pp_3m
from .edm import edm_stochastic
from .euler_maruyama import euler_maruyama, exponential_euler_maruyama
from .forms import score_form
from .heun import heun
from .named import SOLVERS, build
from .predictor_corrector import predictor_corrector
from .registry import REGISTRY, Solver, Variant, solver
from .repaint import repaint
from .rk4 import rk4
from .table import MAX_SLOTS, Row, StepTable, row_width
from .terms import ABSENT, ANY, ONE, Terms
from .unipc import unipc

__all__ = [
    "ABSENT",
    "ANY",
    "MAX_SLOTS",
    "ONE",
    "PREDICTIONS",
    "REGISTRY",
    "SOLVERS",
    "AdaptiveODE",
    "GottaGoFast",
    "Row",
    "Solver",
    "StepTable",
    "Terms",
    "Variant",
    "adams_bashforth",
    "build",
    "ddim",
    "ddpm",
    "deis",
    "dpm_solver_pp_2m",
    "dpm_solver_pp_3m",
    "edm_stochastic",
    "euler_ancestral",
    "euler_maruyama",
    "exponential_euler_maruyama",
    "heun",
    "predictor_corrector",
    "repaint",
    "rk4",
    "row_width",
    "score_form",
    "solver",
    "unipc",
]

# The imports above are for type checkers; a builder in a new file is found automatically.
for _name, _kind in REGISTRY.items():
    if not isinstance(_known := globals().get(_name, _kind.builder), ModuleType) and _known is not _kind.builder:
        raise ImportError(f"the solver {_name} has the name of something else in fastsde.solvers")
    globals()[_name] = _kind.builder
