"""The errors of adaptive steps."""

from __future__ import annotations

from torch import Tensor

from ..reference import NonFiniteError

__all__ = ["StepSizeError", "non_finite", "out_of_steps"]


class StepSizeError(RuntimeError):
    """The steps became too short, or too many, to reach the end with the tolerances given."""


def out_of_steps(reason: str, samples: Tensor, t: Tensor, rtol: float, atol: float) -> StepSizeError:
    """Returns the error for the samples that do not reach the end.

    Args:
        samples: their indices ``[b]``.
        t: the times that they reached, ``[b]``.
    """
    first, low, high = int(samples[0]), float(t.min()), float(t.max())
    where = f"t = {low:g}" if low == high else f"t = {low:g} to {high:g}"
    return StepSizeError(
        f"{reason} for {len(samples)} samples (the first is sample {first}), which stopped at {where}: rtol={rtol:g} "
        f"and atol={atol:g} are too strict for the network or its dtype, or the end is too close to a singular time"
    )


def non_finite(samples: Tensor, t: Tensor) -> NonFiniteError:
    """Returns the error for samples whose network output or state is not finite, in a step from the times ``t``."""
    return NonFiniteError(
        f"the network's output or the state became NaN or infinite in {len(samples)} samples (the first is sample "
        f"{int(samples[0])}), in a step from time {float(t[0]):g}"
    )
