"""Denoising score matching, forward and backward (the twin of ``fastsde.reference.dsm_loss``)."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import call

PREDICTIONS = ("score", "eps", "x0", "v")  # in the order of the C++ enum, as the weightings
WEIGHTINGS = ("sigma2", "likelihood", "target")


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
    gradient = None if grad is None else torch.empty_like(f, dtype=torch.float32)
    step += 0 if counter is None else int(counter)
    kinds = (PREDICTIONS.index(prediction), WEIGHTINGS.index(weighting))
    loss = call(
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
        *kinds,
        len(f),
        f.numel() // len(f),
        None if grad is None else grad.float(),
        gradient,
    )
    out.copy_(gradient) if gradient is not None else out.fill_(loss)
