"""The loss of an objective, forward and backward (the twin of ``fastsde.reference.dsm_loss``)."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import call


def dsm_loss(
    f: Tensor,
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
    grad: Tensor | None = None,
    out: Tensor,
) -> None:
    """Writes the loss, fp32 ``[]``, to ``out``; if ``grad``, the gradient of the loss, is given, that of ``f`` instead.

    Args:
        f: contiguous fp32, bf16 or fp16 ``[B, *shape]``, not empty.
        x_0, index, scale, shift, keys, step, table, counter, z: as for `perturb`.
        grad: fp32 ``[]``.
        out: shaped like ``f`` if ``grad`` is given.
    """
    result = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    results = (None, result, None) if grad is None else (grad.float(), None, result)
    step += 0 if counter is None else int(counter)
    n, data = f.shape[0], (x_0, x_0.dtype == torch.uint8, index, x_0.shape[0])
    call("dsm_loss", f.float(), *data, table, keys, z, step, scale, shift, n, f.numel() // n, *results)
    if result is not out:
        out.copy_(result)


def loss_and_gradient(
    f: Tensor,
    x_0: Tensor,
    table: Tensor,
    keys: Tensor | None,
    index: Tensor | None,
    z: Tensor | None,
    counter: Tensor | None,
    step: int,
    scale: float,
    shift: float,
) -> tuple[Tensor, Tensor]:
    """Returns the loss, fp32 ``[]``, and its gradient, fp32 and shaped like ``f``, computed in one pass.

    Arguments are as for `dsm_loss`, in the order of the torch.library operation, with any strides.
    """
    f, x_0, table = f.float().contiguous(), x_0.contiguous(), table.contiguous()
    loss, gradient, n = table.new_empty(()), torch.empty_like(f), f.shape[0]
    keys = keys if keys is None else keys.contiguous()
    index = index if index is None else index.contiguous()
    z = z if z is None else z.contiguous()
    step += 0 if counter is None else int(counter)
    data, numbers = (x_0, x_0.dtype == torch.uint8, index, x_0.shape[0]), (step, scale, shift, n, f.numel() // n)
    call("dsm_loss", f, *data, table, keys, z, *numbers, None, loss, gradient)
    return loss, gradient
