"""The words that options take. Without torch, so that the command line can name them at once."""

from __future__ import annotations

__all__ = [
    "BACKENDS",
    "DATASETS",
    "DTYPES",
    "LR_SCHEDULES",
    "PRECISIONS",
    "PRECONDITIONINGS",
    "PREDICTIONS",
    "SOLVERS",
    "TIMES",
    "TRAINING_DTYPES",
    "VERIFIED_DTYPES",
    "WEIGHTINGS",
]

BACKENDS = ("auto", "reference", "eager", "graph", "persistent")
DATASETS = ("swiss-roll", "digits", "mnist")
LR_SCHEDULES = ("constant", "cosine")
PREDICTIONS = ("score", "eps", "x0", "v")
PRECONDITIONINGS = ("none", "edm")
SOLVERS = ("euler_maruyama", "exponential_euler_maruyama", "heun", "ddpm", "ddim", "dpm_solver_pp_2m")
TIMES = ("uniform", "lognormal")  # the distributions of training times
WEIGHTINGS = ("sigma2", "likelihood", "target")

# Names of torch.dtype.
DTYPES = ("float32", "float64", "bfloat16", "float16")
VERIFIED_DTYPES = ("float32", "bfloat16", "float16")
TRAINING_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}  # and what a TrainConfig calls them
PRECISIONS = tuple(TRAINING_DTYPES.values())
