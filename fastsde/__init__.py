"""fastsde: fast sampling and training of score-based generative models on the variance-preserving SDE."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

# In a source checkout `fastsde.kernels` and `fastsde.benchmarks` are the folders beside this package.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))

from . import compat, models, noise, solvers  # noqa: E402
from .reference import NonFiniteError  # noqa: E402
from .sampler import Sampler, sample  # noqa: E402
from .sde import VPSDE  # noqa: E402
from .solvers import StepTable  # noqa: E402

__version__ = "0.1.0"

__all__ = ["VPSDE", "NonFiniteError", "Sampler", "StepTable", "compat", "models", "noise", "sample", "solvers"]

_ON_DEMAND = ("checkpoints", "data", "distributed", "ops", "plotting", "reference", "training", "verify")


def __getattr__(name: str) -> ModuleType:
    """Imports the modules that cost something, or that few need, when they are first asked for."""
    if name in _ON_DEMAND:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
