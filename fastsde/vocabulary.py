"""The names that options accept, without importing torch, so that the command line can list them at once."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import iter_modules

__all__ = [
    "BACKENDS",
    "DATASETS",
    "DTYPES",
    "LR_SCHEDULES",
    "PRECISIONS",
    "PRECONDITIONINGS",
    "PREDICTIONS",
    "PROCESSES",
    "RECIPES",
    "SOLVERS",
    "SPACINGS",
    "TIMES",
    "TRACES",
    "TRAINING_DTYPES",
    "VERIFIED_DTYPES",
    "WEIGHTINGS",
]

BACKENDS = ("auto", "reference", "eager", "graph", "persistent")
DATASETS = ("swiss-roll", "digits", "mnist")
"""The names of the data sets."""
LR_SCHEDULES = ("constant", "cosine", "inverse_sqrt")
PREDICTIONS = ("score", "eps", "x0", "v", "flow")
"""What a network may predict: the score, the noise, the data, v = alpha eps - sigma x_0, or flow = eps - x_0."""
RECIPES = ("default", "tutorial", "ddpm", "edm", "flow")
SPACINGS = ("uniform", "karras", "log_snr", "quadratic", "trailing", "leading")
PRECONDITIONINGS = ("none", "edm")
TRACES = ("auto", "exact", "hutchinson")  # how a divergence is computed
TIMES = ("uniform", "lognormal", "importance")  # the distributions of training times
WEIGHTINGS = ("sigma2", "likelihood", "target")

# The files of fastsde/sde: one process per file, the default first.
_FILES = [module.name for module in iter_modules([str(Path(__file__).parent / "sde")]) if module.name != "process"]
PROCESSES = tuple(sorted(_FILES, key=lambda name: (name != "vp", name)))

# The functions that the files of fastsde/solvers decorate with @solver(...), the default first.
_SOURCES = [path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parent / "solvers").glob("*.py"))]
_FOUND = [name for text in _SOURCES for name in re.findall(r"^@solver\((?s:.*?)^def (\w+)\(", text, re.MULTILINE)]
SOLVERS = tuple(sorted(_FOUND, key=lambda name: name != "euler_maruyama"))
"""The names of the solvers that are tables, the default first."""

# Names of torch.dtype.
DTYPES = ("float32", "float64", "bfloat16", "float16")
VERIFIED_DTYPES = ("float32", "bfloat16", "float16")
TRAINING_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}  # and what a TrainConfig calls them
PRECISIONS = tuple(TRAINING_DTYPES.values())
