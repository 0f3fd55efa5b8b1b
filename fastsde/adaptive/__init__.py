"""Integration in which every sample chooses its own steps."""

from __future__ import annotations

from .errors import StepSizeError
from .gotta_go_fast import simulate
from .ode import integrate
from .problem import AdaptiveProblem, AdaptiveSolver, make_problem

__all__ = ["AdaptiveProblem", "AdaptiveSolver", "StepSizeError", "integrate", "make_problem", "simulate"]
