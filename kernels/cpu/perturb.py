"""Posterior noising x_t = alpha(t) x_0 + sigma(t) z (the twin of ``fastsde.reference.perturb``)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .library import call


def perturb(
    x_0: Tensor,
    keys: Tensor | None,
    step: int,
    beta_min: float,
    beta_max: float,
    *,
    index: Tensor | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    t: Tensor | None = None,
    z: Tensor | None = None,
    t_min: float = 1e-4,
    counter: Tensor | None = None,
    out: Tensor,
    t_out: Tensor,
) -> None:
    """Writes x_t to ``out`` ``[B, *shape]`` and the times to ``t_out`` fp32 ``[B]``; all tensors are contiguous.

    Args:
        x_0: uint8 or fp32 ``[N, *shape]``.
        keys: int64 ``[B, 2]``, or None where ``t`` and ``z`` are given.
        step: the training step.
        counter: int64, one element, that is added to the step.
        index: int64 ``[B]``; a row outside the data is NaN.
        t: fp32 ``[B]``, or None to draw them on [t_min, 1].
        z: fp32 ``[B, *shape]``, or None to draw it.
    """
    if not len(out):
        return
    x_t = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    data = (x_0, x_0.dtype == torch.uint8, index, len(x_0))
    step += 0 if counter is None else int(counter)
    size = math.prod(out.shape[1:])
    call("perturb", *data, keys, t, z, step, scale, shift, t_min, beta_min, beta_max, len(out), size, x_t, t_out)
    if x_t is not out:
        out.copy_(x_t)
