"""The tutorial's U-Net from image to score (the twin of ``fastsde.models.UNet``), in one call or several for a large
batch.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .library import available, call, call_products, pointers

CHANNELS = 16  # the channels of a level must be a multiple of this
_IMAGES = 12  # images per thread that the kernel takes through the network at once


def takes(channels: Sequence[int], dtype: torch.dtype) -> bool:
    """Returns whether the kernel runs U-Nets of these channels in a dtype: fp32, or bf16 if the CPU has it."""
    if not all(each % CHANNELS == 0 for each in channels) or not available("unet"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(call("unet_has_bf16")))


class Packed:
    """A U-Net's weights as the kernel reads them, in fp32 or bf16.

    Args:
        convolutions: (weight, bias, whether transposed) of encoder, decoder and head, in the order of their use. The
            first weight has only the channels of the image, without the time's.
        plane: fp32 ``[H, W, channels[0]]``: what a time of 1 adds to the first convolution.
        dtype: of the products.
    """

    def __init__(self, convolutions: Sequence[tuple[Tensor, Tensor, bool]], plane: Tensor, dtype: torch.dtype) -> None:
        self.dtype, self.plane = dtype, plane.float().contiguous()
        self.biases = [bias.float().contiguous() for _, bias, _ in convolutions]
        self.weights: list[Tensor] = []
        for number, (weight, _, transposed) in enumerate(convolutions):
            taps = weight.permute((2, 3, 0, 1) if transposed else (2, 3, 1, 0)).flatten(0, 1)  # [9, in, out]
            if number == len(convolutions) - 1:
                self.weights.append(taps.permute(2, 0, 1).float().contiguous())
            elif number == 0 or dtype == torch.float32:
                self.weights.append(taps.float().contiguous())
            else:  # pairs of inputs are adjacent in memory
                self.weights.append(taps.unflatten(1, (-1, 2)).transpose(2, 3).to(dtype).contiguous())

    def products(self, height: int, width: int) -> int:
        """Returns the multiply-adds per image."""
        levels = len(self.weights) // 2
        pixels = [math.ceil(height / 2**level) * math.ceil(width / 2**level) for level in range(levels)]
        at = [*range(levels), *range(levels - 1, 0, -1), 0, 0]  # a transposed convolution counts at its input's level
        return sum(weight.numel() * pixels[level] for weight, level in zip(self.weights, at, strict=True))


def images_each(products: int, threads: int) -> int:
    """Returns how many images a call takes.

    Args:
        products: multiply-adds per image.
    """
    images, chunk = max(1, int(call_products() * threads / products)), _IMAGES * threads
    return images if images < chunk else images // chunk * chunk


def unet(packed: Packed, channels: Sequence[int], x: Tensor, t: Tensor, films: Tensor | None, out: Tensor) -> None:
    """Writes the network's output to ``out``.

    Args:
        channels: of the levels.
        x, out: contiguous fp32 ``[B, C, H, W]``.
        t: contiguous fp32 ``[B]``.
        films: contiguous fp32 ``[B, widths]``, of each layer but the last its scales - 1 and then its shifts, or None.
    """
    if not x.numel():
        return
    network = (
        len(channels),
        (ctypes.c_int64 * len(channels))(*channels),
        pointers(packed.weights, None),
        pointers(packed.biases),
        packed.plane,
    )
    images = images_each(packed.products(*x.shape[2:]), torch.get_num_threads())
    width, narrow = 0 if films is None else films.shape[1], packed.dtype == torch.bfloat16
    for first in range(0, len(x), images):
        rows = slice(first, first + images)
        film = None if films is None else films[rows]
        call("unet", *x[rows].shape, *network, x[rows], t[rows], film, width, out[rows], narrow)
