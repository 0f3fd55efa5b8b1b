"""Whole trajectories of a small network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..dynamo import constant
from ..lowering import Program, Vectors
from ..solvers import StepTable
from .dispatch import contiguous, has_native, kernel

__all__ = [
    "launch_mlp_sampler",
    "mlp_limits",
    "pack_mlp",
    "pack_program",
    "unknown_activation",
    "unknown_instruction",
]


def mlp_limits(device: torch.device) -> tuple[int, int]:
    """Returns the largest data dimension and the largest hidden width that the kernel takes."""
    return (1024, 1024) if has_native(device) else (64, 256)


@constant
def unknown_activation(activations: Sequence[str], device: torch.device) -> str | None:
    """Returns the first of the activations that the Triton kernel of MLPs does not have, or None."""
    has_activation = kernel("mlp_sampler", device).has_activation
    return next((name for name in activations if not has_activation(name)), None)


def pack_mlp(linears: Sequence[nn.Linear], activations: Sequence[str], dtype: torch.dtype) -> Any:
    """Packs the layers of an MLP (`fastsde.models.mlp.linear_layers`) for the Triton kernel."""
    packed = kernel("mlp_sampler", linears[0].weight.device).Packed(
        [(linear.weight, linear.bias) for linear in linears], activations, dtype
    )
    if linears[0].weight.is_cuda:
        torch.cuda.current_stream(linears[0].weight.device).synchronize()  # another stream may be the first to read it
    return packed


def unknown_instruction(names: Sequence[str], device: torch.device) -> str | None:
    """Returns the first of the kinds of instructions that the native kernel does not have, or None."""
    unknown: str | None = kernel("mlp_sampler", device).unknown_instruction(names)
    return unknown


def pack_program(program: Program, device: torch.device) -> Any:
    """Packs a program for the native kernel."""
    return kernel("mlp_sampler", device).Packed(program)


def launch_mlp_sampler(
    packed: Any,
    table: StepTable,
    keys: Tensor,
    *,
    vectors: Vectors | None = None,
    x_init: Tensor | None = None,
    precision: str = "fp32",
    every: int = 1,
    states: Tensor | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Runs all rows of a table for a small network in one launch. Arguments are not checked.

    Args:
        packed: the result of `pack_mlp` or `pack_program`.
        keys: int64 ``[B, 2]``.
        vectors: the numbers of a program, with the table's rows and B samples.
        x_init: fp32 ``[B, d]`` instead of a draw from the prior.
        precision: of the products on a GPU: "fp32", "tf32" or "bf16". On the CPU they are fp32.
        every: which states are kept: those after 0, every, 2 every, ... rows.
        states: contiguous fp32 ``[K // every + 1, B, d]`` for these states, or None.
        progress: called with the number of rows done since the last time; on the CPU several times in a long run.

    Returns:
        The samples fp32 ``[B, d]``.
    """
    out = torch.empty((len(keys), packed.dim), dtype=torch.float32, device=keys.device)
    x_init, keys = contiguous(x_init, keys)
    of_program = {} if vectors is None else {"vectors": vectors}
    kernel("mlp_sampler", out.device).mlp_sampler(
        packed,
        table.on(out.device),
        keys,
        **of_program,
        terms=table.trajectory_terms,
        x_init=x_init,
        clip=table.clip,
        precision=precision,
        every=every,
        states=states,
        progress=progress,
        out=out,
    )
    return out
