"""Whole trajectories of a small network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..lowering import Program, Vectors
from ..solvers import StepTable
from .dispatch import contiguous, has_native, kernel

__all__ = [
    "launch_mlp_sampler",
    "mlp_limits",
    "pack_program",
    "unknown_instruction",
]


def mlp_limits(device: torch.device) -> tuple[int, int]:
    """Returns how many elements of a sample, and how many units side by side, the kernel takes."""
    return (1024, 4096) if has_native(device) else (64, 256)


def unknown_instruction(names: Sequence[str], device: torch.device) -> str | None:
    """Returns the first of the kinds of instructions that a device's kernel does not have, or None."""
    unknown: str | None = kernel("mlp_sampler", device).unknown_instruction(names)
    return unknown


def pack_program(program: Program, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """Packs a program for a device's kernel.

    Args:
        program: a small network as instructions (``fastsde.lowering.Program``).
        device: the device.
        dtype: of the weights on a GPU, fp32 or bf16.
    """
    module = kernel("mlp_sampler", device)
    if has_native(device):
        return module.Packed(program)
    packed = module.Packed(program, device, dtype)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # another stream may be the first to read it
    return packed


def launch_mlp_sampler(
    packed: Any,
    table: StepTable,
    keys: Tensor,
    *,
    vectors: Vectors,
    x_init: Tensor | None = None,
    precision: str = "fp32",
    every: int = 1,
    states: Tensor | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Runs all rows of a table for a small network in one launch. Arguments are not checked.

    Args:
        packed: the result of `pack_program`.
        table: the solver.
        keys: int64 ``[B, 2]``.
        vectors: the numbers of the program, with the table's rows and B samples.
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
    kernel("mlp_sampler", out.device).mlp_sampler(
        packed,
        table.on(out.device),
        keys,
        vectors=vectors,
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
