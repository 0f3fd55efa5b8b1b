"""The log density of samples by the probability-flow ODE, which carries them up to the prior."""

from __future__ import annotations

from .density import LikelihoodOptions, bits_per_dim, log_prob
from .divergence import Divergence

__all__ = ["Divergence", "LikelihoodOptions", "bits_per_dim", "log_prob"]
