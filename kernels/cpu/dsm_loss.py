"""Denoising score matching, forward and backward (the twin of ``fastsde.reference.dsm_loss``)."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import call, code


def dsm_loss(
    f: Tensor,
    x_0: Tensor,
    t: Tensor,
    keys: Tensor | None,
    step: int,
    beta_min: float,
    beta_max: float,
    *,
    index: Tensor | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    z: Tensor | None = None,
    prediction: str = "score",
    weighting: str = "sigma2",
    counter: Tensor | None = None,
    grad: Tensor | None = None,
    out: Tensor,
) -> None:
    """Writes the loss, fp32 ``[]``, to ``out``; with the ``grad`` of the loss, the gradient of ``f`` instead.

    Args:
        f: contiguous fp32, bf16 or fp16 ``[B, *shape]``, not empty.
        x_0, index, scale, shift, keys, step, counter, z: as for `perturb`.
        t: fp32 ``[B]``.
        grad: fp32 ``[]``.
        out: with ``grad``, shaped like ``f``.
    """
    result = torch.empty_like(out if grad is None else f, dtype=torch.float32)
    step += 0 if counter is None else int(counter)
    call(
        "dsm_loss",
        f.float(),
        x_0,
        x_0.dtype == torch.uint8,
        index,
        len(x_0),
        t,
        keys,
        z,
        step,
        scale,
        shift,
        beta_min,
        beta_max,
        code("prediction", prediction),
        code("weighting", weighting),
        len(f),
        f.numel() // len(f),
        None if grad is None else grad.float(),
        result,
    )
    out.copy_(result)
