"""Integration in which every sample chooses its own steps."""

from __future__ import annotations

from .errors import StepSizeError
from .ode import integrate

__all__ = ["StepSizeError", "integrate"]
