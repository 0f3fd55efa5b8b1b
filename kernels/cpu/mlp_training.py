"""Training steps of an MLP score network: forward, backward, Adam and the moving average, dozens of steps per call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .library import call, code, has_code, pointers


def takes(activations: Sequence[str]) -> bool:
    """Returns whether the kernel has all of these activations."""
    return all(has_code("activation", name) for name in activations)


class Parameters(NamedTuple):
    """Tensors of an MLP's parameters: weight ``[out, in]`` and bias ``[out]`` or None of each layer, in order.

    All are contiguous fp32. ``average`` and ``square`` are Adam's averages of the gradient and of its square, and
    ``moving`` is the moving average of the weights, if there is one.
    """

    weights: Sequence[Tensor | None]
    average: Sequence[Tensor | None]
    square: Sequence[Tensor | None]
    moving: Sequence[Tensor | None] | None


def mlp_training(
    parameters: Parameters,
    activations: Sequence[str],
    x_0: Tensor,
    keys: Tensor,
    table: Tensor,
    *,
    scale: float,
    shift: float,
    betas: tuple[float, float],
    epsilon: float,
    first: int,
    taken: int,
    rates: Tensor,
) -> Tensor:
    """Takes steps in place and returns their losses, fp32 ``[count]``.

    Args:
        activations: the activation after each layer except the last.
        x_0: the data, contiguous uint8 or fp32 ``[N, d]``, N at least 1.
        keys: int64 ``[B, 2]``, the keys of the positions in the batch.
        table: the coefficients of the steps, contiguous fp32 ``[count, B, 6]``.
        betas, epsilon: Adam's.
        first: the number of the first step; the random numbers of a step depend on its number.
        taken: how many steps Adam has taken before.
        rates: contiguous fp32 ``[count, 2]``, the learning rate and 1 - the decay of the moving average of each step.
    """
    weights = parameters.weights[::2]
    widths = [weight.shape[1] for weight in weights if weight is not None] + [x_0[0].numel()]
    codes = [code("activation", name) for name in activations]
    losses = torch.empty_like(rates[:, 0])
    call(
        "mlp_training",
        len(weights),
        (ctypes.c_int64 * len(widths))(*widths),
        (ctypes.c_int32 * max(1, len(codes)))(*codes),
        *(None if each is None else pointers(each) for each in parameters),
        x_0,
        x_0.dtype == torch.uint8,
        len(x_0),
        scale,
        shift,
        keys,
        len(keys),
        table,
        *betas,
        epsilon,
        first,
        len(rates),
        taken,
        rates,
        losses,
    )
    return losses
