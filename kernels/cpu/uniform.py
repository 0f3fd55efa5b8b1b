"""Uniforms of the noise contract (the twin of ``fastsde.noise.uniform``), one per key, for consecutive steps."""

from __future__ import annotations

from torch import Tensor

from .library import call


def uniform(keys: Tensor, step: int, stream: int, out: Tensor, *, counter: Tensor | None = None) -> None:
    """Writes the uniforms of ``R`` steps from ``step`` on.

    Args:
        keys: contiguous int64 ``[B, 2]``.
        counter: int64, one element, added to the step.
        out: contiguous fp32 ``[R, B]``.
    """
    step += 0 if counter is None else int(counter)
    call("uniform", keys, step, stream, *out.shape, out)
