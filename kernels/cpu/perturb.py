"""Noising x_in = u_x x_0 + u_z z (the twin of ``fastsde.reference.perturb``)."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import call


def perturb(
    x_0: Tensor,
    keys: Tensor | None,
    step: int,
    table: Tensor,
    *,
    index: Tensor | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    z: Tensor | None = None,
    counter: Tensor | None = None,
    out: Tensor,
    tau: Tensor,
    kept: Tensor | None = None,
) -> None:
    """Writes x_in to ``out`` ``[B, *shape]`` and tau, fp32 ``[B]``; all tensors are contiguous.

    Args:
        x_0: uint8 or fp32 ``[N, *shape]``.
        keys: int64 ``[B, 2]``, or None if ``z`` is given.
        step: the training step.
        table: the coefficients, fp32 ``[B, 6]``.
        counter: int64, one element, added to the step.
        index: int64 ``[B]``; an index outside of the data gives NaN.
        z: fp32 ``[B, *shape]``, or None to draw it.
        kept: fp32 ``[B, *shape]``, where drawn noise is written, or None.
    """
    n = out.shape[0]
    if not n:
        return
    x_in = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    step += 0 if counter is None else int(counter)
    data = (x_0, x_0.dtype == torch.uint8, index, x_0.shape[0])
    call("perturb", *data, keys, table, z, step, scale, shift, n, out.numel() // n, x_in, tau, kept)
    if x_in is not out:
        out.copy_(x_in)
