"""Whole trajectories of an MLP score network in one call, or in a few where they take long."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .library import call, pointers

ACTIVATIONS = ("Identity", "LogSigmoid", "SiLU", "ReLU", "Tanh", "GELU", "GELU_tanh", "Softplus")  # as the C++ enum
# Between two calls, Ctrl-C is heard: a call has about this many multiply-adds a thread, a few tenths of a second.
_PRODUCTS = 2e10
_BLOCK = 64  # samples that a thread takes at once


class Packed:
    """An MLP as the kernel reads it: its own parameters, wherever they are.

    Args:
        layers: (weight ``[out, in]``, bias ``[out]`` or None) of each layer, each taking what the one before it gives;
            the last input of the first is the time.
        activations: the one after each layer but the last.
        dtype: of the products, torch.float32.
    """

    def __init__(
        self, layers: Sequence[tuple[Tensor, Tensor | None]], activations: Sequence[str], dtype: torch.dtype
    ) -> None:
        if dtype != torch.float32:
            raise ValueError(f"dtype must be torch.float32 on the CPU, got {dtype}")
        self.layers, self.dim = tuple(layers), layers[-1][0].shape[0]
        self.widths = (self.dim, *(len(weight) for weight, _ in layers))
        self.activations = tuple(ACTIVATIONS.index(name) for name in activations)


def mlp_sampler(
    packed: Packed,
    table: Tensor,
    keys: Tensor,
    *,
    x_init: Tensor | None = None,
    clip: float | None = None,
    every: int = 1,
    states: Tensor | None = None,
    out: Tensor,
    **known: Any,
) -> None:
    """Writes the samples to ``out`` fp32 ``[B, d]``, and every ``every``-th state to ``states`` where given.

    Args:
        table: fp32 ``[K, 8]``, as for `solver_step`.
        keys: int64 ``[B, 2]``.
        x_init: fp32 ``[B, d]`` instead of a draw from the prior.
        states: fp32 ``[K // every + 1, B, d]``, from the initial state on.
        known: what other kernels want to know ahead, and this one reads in the table.
    """
    batch, dim = out.shape
    if dim != packed.dim:
        raise ValueError(f"out must be [B, {packed.dim}], as the network's output is, got {list(out.shape)}")
    weights = [weight.detach().float().contiguous() for weight, _ in packed.layers]
    biases = [None if bias is None else bias.detach().float().contiguous() for _, bias in packed.layers]
    count = len(weights)
    network = (
        count,
        pointers(weights),
        pointers(biases),
        (ctypes.c_int64 * (count + 1))(*packed.widths),
        (ctypes.c_int32 * max(1, count - 1))(*packed.activations),
    )
    products = len(table) * sum(weight.numel() for weight in weights)
    blocks = max(1, math.ceil(_PRODUCTS / products / _BLOCK)) * torch.get_num_threads()
    limit = math.inf if clip is None else clip
    for first in range(0, batch, blocks * _BLOCK):
        part = (first, min(first + blocks * _BLOCK, batch), batch)
        call("mlp_sampler", *network, table, len(table), keys, x_init, limit, *part, every, states, out)
