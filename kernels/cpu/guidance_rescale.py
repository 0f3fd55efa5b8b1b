"""The factor of rescaled guidance (the twin of ``fastsde.reference.rescale_factor``)."""

from __future__ import annotations

from torch import Tensor

from .library import call


def rescale_factor(
    f: Tensor,
    f_uncond: Tensor,
    row: int,
    *,
    scale: Tensor,
    rates: Tensor | None = None,
    phi: float,
    factor: Tensor,
) -> None:
    """Writes the factors of a batch to ``factor``, fp32 ``[B]``.

    Args:
        f, f_uncond: contiguous fp32, bf16 or fp16 ``[B, *shape]``.
        scale, rates: fp32 ``[B]`` and ``[K]``; without rates these are 1.
    """
    if f.numel():
        n = f.shape[0]
        call("rescale_factor", f.float(), f_uncond.float(), scale, rates, row, phi, n, f.numel() // n, factor)
