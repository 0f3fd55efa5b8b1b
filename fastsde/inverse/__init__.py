"""Inverse problems: known values, measurements, and the gradient of a log-probability steer the samples."""

from __future__ import annotations

from .classifier import ClassifierGuidance
from .correction import Change, Correction, Point
from .dps import DPS
from .measurement import Measurement
from .pigdm import PiGDM
from .problem import Problem, known_values, problem_of
from .schedule import Level, Schedule

__all__ = [
    "DPS",
    "Change",
    "ClassifierGuidance",
    "Correction",
    "Level",
    "Measurement",
    "PiGDM",
    "Point",
    "Problem",
    "Schedule",
    "known_values",
    "problem_of",
]
