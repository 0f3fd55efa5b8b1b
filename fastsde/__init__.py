"""fastsde: fast sampling and training of score-based generative models."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
"""The version of the package."""

__all__ = [
    "DPS",
    "EDM",
    "VESDE",
    "VPSDE",
    "ClassifierGuidance",
    "CosineVPSDE",
    "Guidance",
    "MismatchError",
    "MissingExtraError",
    "NonFiniteError",
    "PiGDM",
    "RectifiedFlow",
    "Sampler",
    "StepTable",
    "SubVPSDE",
    "TraceError",
    "accelerate",
    "bits_per_dim",
    "compat",
    "decode",
    "encode",
    "log_prob",
    "models",
    "noise",
    "sample",
    "solvers",
    "trace",
]

# In a source checkout, `fastsde.kernels` and `fastsde.benchmarks` are the folders next to this package.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))

if TYPE_CHECKING:
    from . import checkpoints as checkpoints
    from . import compat, models, noise, solvers
    from . import data as data
    from . import distributed as distributed
    from . import inverse as inverse
    from . import ops as ops
    from . import plotting as plotting
    from . import reference as reference
    from . import sde as sde
    from . import tracing as tracing
    from . import training as training
    from . import verify as verify
    from .extras import MissingExtraError
    from .guidance import Guidance
    from .inverse import DPS, ClassifierGuidance, PiGDM
    from .latents import decode, encode
    from .likelihood import bits_per_dim, log_prob
    from .reference import NonFiniteError
    from .sampler import Sampler, sample
    from .sde import EDM, VESDE, VPSDE, CosineVPSDE, RectifiedFlow, SubVPSDE
    from .solvers import StepTable
    from .tracing import MismatchError, TraceError, accelerate, trace
else:
    # Imported on first access: torch takes seconds to import, and the command line sets how its threads wait first.
    _MODULES = (
        "checkpoints",
        "compat",
        "data",
        "distributed",
        "inverse",
        "models",
        "noise",
        "ops",
        "plotting",
        "reference",
        "sde",
        "solvers",
        "tracing",
        "training",
        "verify",
    )
    _MODULE_OF = {
        **dict.fromkeys(("EDM", "VESDE", "VPSDE", "CosineVPSDE", "RectifiedFlow", "SubVPSDE"), "sde"),
        **dict.fromkeys(("DPS", "ClassifierGuidance", "PiGDM"), "inverse"),
        "Guidance": "guidance",
        "MissingExtraError": "extras",
        "NonFiniteError": "reference",
        **dict.fromkeys(("decode", "encode"), "latents"),
        **dict.fromkeys(("bits_per_dim", "log_prob"), "likelihood"),
        "Sampler": "sampler",
        "StepTable": "solvers",
        "sample": "sampler",
        **dict.fromkeys(("MismatchError", "TraceError", "accelerate", "trace"), "tracing"),
    }

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f".{name}", __name__)
        if name in _MODULE_OF:
            globals()[name] = value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*__all__, *_MODULES, "__version__"})
