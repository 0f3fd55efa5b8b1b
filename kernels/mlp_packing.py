"""The weights of an MLP in the layout that the kernel ``mlp_sampler`` reads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .mlp_network import ACTIVATIONS, BINARY_LOGARITHM

MIN_WIDTH, _BLOCK = 16, 64


class Packed:
    """The weights and the biases of an MLP, each in one contiguous buffer.

    Widths are padded to a power of two up to 64, and to multiples of 64 beyond. The weights are stored block by block,
    each ``[out, in]``, with all blocks of the same outputs in a row; the biases as w_time, b_1, ..., b_L.

    Args:
        layers: (weight ``[out, in]``, bias ``[out]`` or None) of each layer; the last input of the first is the time.
        activations: the activation after each layer except the last.
        dtype: of the packed weights.

    Raises:
        ValueError: for an activation that the kernel does not have.
    """

    def __init__(
        self, layers: Sequence[tuple[Tensor, Tensor | None]], activations: Sequence[str], dtype: torch.dtype
    ) -> None:
        for name in activations:
            if not has_activation(name):
                raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
        self.activations, self.dtype = tuple(activations), dtype
        self.dim = layers[-1][0].shape[0]
        self.layers: tuple[tuple[int, int, int, int], ...] = ()  # first block, offset of the bias, blocks out, width
        self.blocks: tuple[tuple[int, int, int], ...] = ()  # offset, inputs, outputs
        self._sources: list[Tensor] = []
        self._places: list[tuple[int, tuple[int, int]]] = []  # of each source: its offset, and the shape of its block
        self._size = 0
        factors: list[tuple[float, int]] = []
        vectors: list[tuple[Tensor | None, float, int]] = []
        binary = [False, *(name in BINARY_LOGARITHM for name in activations), False]
        for number, (parameter, bias) in enumerate(layers):
            after = math.log2(math.e) if binary[number + 1] else 1.0
            before = math.log(2) if binary[number] else 1.0
            weight = parameter.detach()
            count, width = blocks_of(len(weight))
            if number == 0:
                vectors.append((weight[:, -1], after, count * width))
                weight = weight[:, :-1]
            self.layers += ((len(self.blocks), sum(size for _, _, size in vectors), count, width),)
            vectors.append((None if bias is None else bias.detach(), after, count * width))
            inputs = blocks_of(weight.shape[1])[1]
            for outputs in weight.split(width):
                for block in outputs.split(inputs, dim=1):
                    self.blocks += ((self._size, inputs, width),)
                    self._place(block, (width, inputs))
                    factors.append((before * after, width * inputs))
        self._weights_end = self._size
        for vector, factor, size in vectors:
            self._place(None if vector is None else vector[None], (1, size))
            factors.append((factor, size))
        each = [torch.full((size,), factor, dtype=torch.float32) for factor, size in factors]
        self._factor = torch.cat(each).to(layers[0][0].device)
        self.nbytes = self._weights_end * dtype.itemsize

    def _place(self, source: Tensor | None, shape: tuple[int, int]) -> None:
        if source is not None:
            self._sources.append(source)
            self._places.append((self._size, shape))
        self._size += math.prod(shape)

    def read(self) -> tuple[Tensor, Tensor]:
        """Returns the current weights and biases, in few launches and in memory that is not shared."""
        buffer = torch.zeros_like(self._factor)
        targets = [
            buffer[offset : offset + rows * columns].view(rows, columns)[: source.shape[0], : source.shape[1]]
            for source, (offset, (rows, columns)) in zip(self._sources, self._places, strict=True)
        ]
        torch._foreach_copy_(targets, self._sources)
        buffer *= self._factor
        return buffer[: self._weights_end].to(self.dtype), buffer[self._weights_end :].clone()


def has_activation(name: str) -> bool:
    """Returns whether the kernel implements an activation."""
    return name in ACTIVATIONS


def blocks_of(size: int) -> tuple[int, int]:
    """Returns how many blocks a width is cut into, and the width of a block."""
    width = min(_BLOCK, max(MIN_WIDTH, triton.next_power_of_2(size)))
    return triton.cdiv(size, width), width
