"""The errors of adaptive steps."""

from __future__ import annotations

from torch import Tensor

from ..reference import NonFiniteError

__all__ = ["StepSizeError", "check_steps", "out_of_steps"]


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


def check_steps(is_broken: Tensor, is_stuck: Tensor, samples: Tensor, t: Tensor, rtol: float, atol: float) -> None:
    """Raises if a step is not finite, or so short that the time does not change.

    Args:
        is_broken, is_stuck: bool ``[b]``, for steps from the times ``t`` of some samples.
    """
    if is_broken.any():
        which = samples[is_broken]
        raise NonFiniteError(
            f"the network's output or the state became NaN or infinite in {len(which)} samples (the first is sample "
            f"{int(which[0])}), in a step from time {float(t[is_broken][0]):g}"
        )
    if is_stuck.any():
        raise out_of_steps("the steps became too short", samples[is_stuck], t[is_stuck], rtol, atol)
