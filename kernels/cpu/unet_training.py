"""Forward and backward of the tutorial's U-Net in training (the twin of ``fastsde.models.UNet``)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .library import available, call, pointers

CHANNELS = 16  # the channels of a level must be a multiple of this
_MOST_CHANNELS = 2048  # of a level


def takes(channels: Sequence[int]) -> bool:
    """Returns whether the kernel trains U-Nets of these channels."""
    fit = all(each % CHANNELS == 0 and each <= _MOST_CHANNELS for each in channels)
    return fit and available("unet_training_forward")


def _shape(x: Tensor, channels: Sequence[int]) -> tuple[Any, ...]:
    return (*x.shape, len(channels), (ctypes.c_int64 * len(channels))(*channels))


def floats(x: Tensor, channels: Sequence[int], modulates: bool) -> int:
    """Returns how much memory, in floats, `forward` and `backward` of a batch share.

    Args:
        x: the images ``[B, C, H, W]``.
        channels: of the levels.
        modulates: whether there are scales and shifts.
    """
    count: int = call("unet_training_floats", *_shape(x, channels), modulates)
    return count


def forward(
    channels: Sequence[int],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    x: Tensor,
    t: Tensor,
    films: Tensor | None,
    memory: Tensor,
    out: Tensor,
) -> None:
    """Writes the network's output to ``out``, and what `backward` needs to ``memory``.

    Args:
        channels: of the levels.
        weights, biases: of encoder, decoder and head, in the order of their use, contiguous fp32.
        x, out: contiguous fp32 ``[B, C, H, W]``.
        t: contiguous fp32 ``[B]``.
        films: contiguous fp32 ``[B, widths]``, of each layer but the last its scales - 1 and then its shifts, or None.
        memory: fp32 ``[floats]``, with any content.
    """
    call("unet_training_forward", *_shape(x, channels), pointers(weights), pointers(biases), x, t, films, memory, out)


def backward(
    channels: Sequence[int], films: Tensor | None, d_out: Tensor, memory: Tensor, weights: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Returns the gradients of the weights, the biases and the films, after one `forward`, whose memory it overwrites.

    Args:
        d_out: the gradient of the output, contiguous fp32 ``[B, C, H, W]``.
        channels, films, memory, weights: as for `forward`.
    """
    d_weights = [torch.empty_like(each) for each in weights]
    number, transposed = len(weights), range(len(channels), 2 * len(channels) - 1)
    outputs = [weight.shape[1 if i in transposed else 0] for i, weight in zip(range(number), weights, strict=True)]
    d_biases = [weight.new_empty(count) for weight, count in zip(weights, outputs, strict=True)]
    d_films = None if films is None else torch.empty_like(films)
    given = pointers(d_weights), pointers(d_biases), d_films
    call("unet_training_backward", *_shape(d_out, channels), films, d_out, memory, *given)
    return d_weights, d_biases, d_films
