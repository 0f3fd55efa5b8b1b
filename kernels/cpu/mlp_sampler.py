"""Whole trajectories of an MLP score network in one call, or in several if they take long."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .library import call, call_products, code, has_code, pointers

_SPECIALS = 32  # an activation, or a normal, takes as long as so many multiply-adds
_BLOCK, _LEAST = 64, 16  # the most and the fewest samples that a thread takes at once
_PIECES = 100  # a run that needs more pieces is also cut by samples, so that the state goes through memory less often


class Packed:
    """An MLP as the kernel reads it: pointers to its own parameters, which are not copied if contiguous fp32.

    Args:
        layers: (weight ``[out, in]``, bias ``[out]`` or None) of each layer, each taking the output of the one before;
            the last input of the first is the time.
        activations: the activation after each layer except the last.
        dtype: of the products, torch.float32.

    Raises:
        ValueError: for another dtype, or an activation that the kernel does not have.
    """

    def __init__(
        self, layers: Sequence[tuple[Tensor, Tensor | None]], activations: Sequence[str], dtype: torch.dtype
    ) -> None:
        if dtype != torch.float32:
            raise ValueError(f"dtype must be torch.float32 on the CPU, got {dtype}")
        self.layers, self.dim = tuple(layers), layers[-1][0].shape[0]
        self.widths = (self.dim, *(len(weight) for weight, _ in layers))
        self.activations = tuple(code("activation", name) for name in activations)
        # Multiply-adds per sample and row.
        self.products = sum(weight.numel() for weight, _ in layers) + _SPECIALS * sum(self.widths)
        tensors = [each for layer in layers for each in layer if each is not None]
        is_plain = all(each.dtype == torch.float32 and each.is_contiguous() for each in tensors)
        self._arguments = self._made() if is_plain else None

    def arguments(self) -> tuple[tuple[Any, ...], Any]:
        """Returns the network as the kernel takes it, as pointers, and the tensors that they point to."""
        return self._made() if self._arguments is None else self._arguments

    def _made(self) -> tuple[tuple[Any, ...], Any]:
        weights = [weight.detach().float().contiguous() for weight, _ in self.layers]
        biases = [None if bias is None else bias.detach().float().contiguous() for _, bias in self.layers]
        widths = (ctypes.c_int64 * len(self.widths))(*self.widths)
        activations = (ctypes.c_int32 * max(1, len(self.activations)))(*self.activations)
        return (len(weights), pointers(weights), pointers(biases), widths, activations), (weights, biases)


def has_activation(name: str) -> bool:
    """Returns whether the kernel has an activation."""
    return has_code("activation", name)


def piece(rows: int, batch: int, products: int, threads: int) -> tuple[int, int]:
    """Returns how many rows of how many samples a call takes.

    Args:
        products: multiply-adds per sample and row.
    """
    most = call_products() / products  # rows times samples that a thread may take
    each = math.ceil(batch / threads / _LEAST) * _LEAST
    rows_each = int(most / each)
    if rows_each * _PIECES >= rows:
        return math.ceil(rows / math.ceil(rows / min(rows_each, rows))), batch
    rows_each = max(1, min(math.ceil(rows / _PIECES), int(most / _BLOCK)))
    return rows_each, max(1, int(most / rows_each / _BLOCK)) * _BLOCK * threads


def mlp_sampler(
    packed: Packed,
    table: Tensor,
    keys: Tensor,
    *,
    terms: Any,
    x_init: Tensor | None = None,
    clip: float | None = None,
    every: int = 1,
    states: Tensor | None = None,
    progress: Callable[[int], object] | None = None,
    precision: str = "fp32",
    out: Tensor,
) -> None:
    """Writes the samples to ``out`` fp32 ``[B, d]``, and every ``every``-th state to ``states`` if given.

    Args:
        table: fp32 ``[K, 2 + 5 m + m^2]``, as for `solver_step`.
        keys: int64 ``[B, 2]``.
        terms: `StepTable.trajectory_terms`; only its number of slots is used, since the kernel reads the table.
        x_init: fp32 ``[B, d]`` instead of a draw from the prior.
        states: fp32 ``[K // every + 1, B, d]``, from the initial state on.
        progress: called from time to time with the number of rows done since the last time.
        precision: ignored; the CPU computes in fp32.
    """
    (batch, dim), rows = out.shape, len(table)
    if dim != packed.dim:
        raise ValueError(f"out must be [B, {packed.dim}], like the network's output, got {list(out.shape)}")
    network, tensors = packed.arguments()
    rows_each, samples_each = piece(rows, max(1, batch), packed.products, torch.get_num_threads())
    one_call = rows_each == rows or terms.slots == 1
    others = None if one_call else out.new_empty((terms.slots - 1, batch, dim))
    limit = math.inf if clip is None else clip
    for row in range(0, rows, rows_each):
        end_row = min(row + rows_each, rows)
        for first in range(0, batch, samples_each):
            samples = (first, min(first + samples_each, batch), batch)
            drawn = (keys, x_init, limit, *samples)
            call("mlp_sampler", *network, table, terms.slots, row, end_row, *drawn, every, states, others, out)
        if progress is not None:
            progress(end_row - row)
    del tensors  # kept alive until here for the pointers
