"""Whole trajectories of a small network by the kernel of a device, without the engines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsde import StepTable, ops
from fastsde.engines.network import Network
from fastsde.lowering import Vectors, lower
from fastsde.models.mlp import linear_layers

__all__ = ["packed_for", "trajectory"]


def packed_for(
    model: Any, table: StepTable, n: int, device: torch.device, precision: str = "fp32"
) -> tuple[Any, Vectors]:
    """Returns an MLP of flat samples as the kernel of a device takes it: a program and its numbers."""
    model = model.to(device)
    linears, _ = linear_layers(model)
    shape = getattr(model, "shape", (linears[-1].out_features,))
    times = table.time.float().to(device)
    sizes = [size for each in model.parameters() for size in each.shape]
    lowered = lower(Network(model), shape, times, sizes=sizes)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return ops.pack_program(lowered.program, device, dtype), lowered.vectors(times, n, ())


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
    packed, vectors = packed_for(model, table, len(keys), keys.device, precision)
    states = None
    if every is not None:
        shape = (len(table) // every + 1, len(keys), packed.dim)
        states = torch.full(shape, math.nan, dtype=torch.float32, device=keys.device)
    options = {
        "vectors": vectors,
        "x_init": x_init,
        "precision": precision,
        "every": every or 1,
        "states": states,
        "progress": progress,
    }
    out = ops.launch_mlp_sampler(packed, table, keys, **options)
    return out, torch.empty(0, *out.shape) if states is None else states
