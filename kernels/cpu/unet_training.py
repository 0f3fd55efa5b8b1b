"""Forward and backward of the tutorial's U-Net (the twin of ``fastsde.models.UNet``)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .library import available, call, pointers

CHANNELS = 16  # the channels of a level must be a multiple of this
_MOST_CHANNELS = 2048  # of an image or a level


def takes(image_channels: int, channels: Sequence[int], dtype: torch.dtype = torch.float32) -> bool:
    """Returns whether the kernel trains U-Nets of these channels with products in fp32, or bf16 if the CPU has it."""
    fit = all(each % CHANNELS == 0 for each in channels) and max(image_channels, *channels) <= _MOST_CHANNELS
    if not (fit and available("unet_training_forward")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(call("unet_training_has_bf16")))


class Network(NamedTuple):
    """The channels of a U-Net's levels, and the dtype of its signals and products: fp32, or bf16 with sums in fp32."""

    channels: tuple[int, ...]
    dtype: torch.dtype

    def of(self, x: Tensor) -> tuple[Any, ...]:
        """Returns the network and the shape of a batch ``[B, C, H, W]`` as the kernel takes them."""
        levels = (ctypes.c_int64 * len(self.channels))(*self.channels)
        return (*x.shape, len(levels), levels, self.dtype == torch.bfloat16)


class Gradients(NamedTuple):
    """The gradients of the weights, the biases, the films and x, None if they were not asked for or there are none."""

    weights: list[Tensor] | None
    biases: list[Tensor] | None
    films: Tensor | None
    x: Tensor | None


def floats(network: Network, x: Tensor, modulates: bool, trains: bool) -> int:
    """Returns how much memory, in floats, `forward` and `backward` of a batch share.

    Args:
        x: the images ``[B, C, H, W]``.
        modulates: whether there are scales and shifts.
        trains: whether `backward` computes the gradients of the weights, the biases and the films.
    """
    count: int = call("unet_training_floats", *network.of(x), modulates, trains)
    return count


def forward(
    network: Network,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    x: Tensor,
    t: Tensor,
    films: Tensor | None,
    memory: Tensor,
    out: Tensor,
    trains: bool,
    is_packed: bool = False,
) -> None:
    """Writes the network's output to ``out``, and what `backward` needs to ``memory``.

    Args:
        weights, biases: of encoder, decoder and head, in the order of their use, contiguous fp32.
        x, out: contiguous fp32 ``[B, C, H, W]``.
        t: contiguous fp32 ``[B]``.
        films: contiguous fp32 ``[B, widths]``, of each layer but the last its scales - 1 and then its shifts, or None.
        memory: fp32 ``[floats]``, with any content.
        trains: as for `floats`.
        is_packed: whether the memory comes from a pass of as many images with the same weights, which then are not
            packed again: for few images that takes as long as the rest.
    """
    given = pointers(weights), pointers(biases), x, t, films
    call("unet_training_forward", *network.of(x), trains, is_packed, *given, memory, out)


def backward(
    network: Network,
    films: Tensor | None,
    d_out: Tensor,
    memory: Tensor,
    weights: Sequence[Tensor] | None,
    needs_x: bool = False,
) -> Gradients:
    """Returns the gradients after a `forward`, whose results stay in its memory: it may be called again.

    Args:
        d_out: the gradient of the output, contiguous fp32 ``[B, C, H, W]``.
        weights: as for `forward` if it trains, else None.
        needs_x: whether to compute the gradient of x.
        network, films, memory: as for `forward`.
    """
    d_x = torch.empty_like(d_out) if needs_x else None
    if weights is None:
        call("unet_training_backward", *network.of(d_out), films, d_out, memory, None, None, None, d_x)
        return Gradients(None, None, None, d_x)
    d_weights = [torch.empty_like(each) for each in weights]
    levels = len(network.channels)
    outputs = (each.shape[levels <= number < 2 * levels - 1] for number, each in enumerate(weights))  # [in, out, 3, 3]
    d_biases = [weight.new_empty(count) for weight, count in zip(weights, outputs, strict=True)]
    d_films = None if films is None else torch.empty_like(films)
    given = pointers(d_weights), pointers(d_biases), d_films
    call("unet_training_backward", *network.of(d_out), films, d_out, memory, *given, d_x)
    return Gradients(d_weights, d_biases, d_films, d_x)
