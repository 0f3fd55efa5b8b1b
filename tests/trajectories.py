"""Whole trajectories of an MLP by the kernel of a device, without the engines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsde import StepTable, ops
from fastsde.models.mlp import linear_layers

__all__ = ["trajectory"]


def trajectory(
    model: Any,
    table: StepTable,
    keys: Tensor,
    *,
    x_init: Tensor | None = None,
    precision: str = "fp32",
    every: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns samples ``[B, d]`` of an MLP, and every ``every``-th state ``[K // every + 1, B, d]``, or no states.

    Everything is on the device of ``keys``, to which the MLP is moved.
    """
    linears, activations = linear_layers(model)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    packed = ops.pack_mlp([linear.to(keys.device) for linear in linears], activations, dtype)
    states = None
    if every is not None:
        shape = (len(table) // every + 1, len(keys), packed.dim)
        states = torch.full(shape, math.nan, dtype=torch.float32, device=keys.device)
    options = {"x_init": x_init, "precision": precision, "every": every or 1, "states": states, "progress": progress}
    out = ops.launch_mlp_sampler(packed, table, keys, **options)
    return out, torch.empty(0, *out.shape) if states is None else states
