"""The sizes of the steps of a Langevin row (the twin of ``fastsde.reference.langevin_size``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .library import call, pointers


def langevin_size(
    slots: Sequence[Tensor],
    f: Tensor,
    table: Tensor,
    row: int,
    *,
    langevin: Tensor,
    terms: Any,
    z: Tensor | None = None,
    keys: Tensor | None = None,
    f_uncond: Tensor | None = None,
    scale: Tensor | None = None,
    rates: Tensor | None = None,
    factor: Tensor | None = None,
    sizes: Tensor,
) -> None:
    """Writes eps and sqrt(2 eps) of a batch to ``sizes``, fp32 ``[B, 2]``.

    Args:
        langevin: fp32 ``[K, 2]``: snr and eps_max.
        slots, f, table, row, terms, z, keys, f_uncond, scale, rates, factor: as for `solver_step`, contiguous.
    """
    if not f.numel():
        return
    f, f_uncond, z = (None if each is None else each.float() for each in (f, f_uncond, z))
    read = pointers([slot if kind else None for slot, kind in zip(slots, terms.p, strict=True)])
    m, n, (snr, largest) = len(slots), f.shape[0], langevin[row].tolist()
    outputs = (f, f_uncond, z, None if z is not None else keys)
    call("langevin_size", read, *outputs, table, scale, rates, factor, m, row, snr, largest, n, f.numel() // n, sizes)
