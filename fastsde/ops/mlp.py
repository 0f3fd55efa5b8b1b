"""Whole trajectories of an MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import noise, reference
from ..dynamo import constant
from ..models.mlp import MLP, ConcatTime, linear_layers
from ..solvers import StepTable
from ..validation import check_instance, check_int, check_keys, check_tensor
from . import library  # noqa: F401 (registers the operations)
from .dispatch import contiguous, has_kernels, has_native, kernel
from .step import device_table

__all__ = ["PRECISIONS", "launch_mlp_sampler", "mlp_limits", "mlp_sampler", "pack_mlp", "unknown_activation"]

PRECISIONS = ("fp32", "tf32", "bf16")


def mlp_limits(device: torch.device) -> tuple[int, int]:
    """The most data and hidden units that the kernel takes."""
    return (1024, 1024) if has_native(device) else (64, 256)


@constant
def unknown_activation(activations: Sequence[str], device: torch.device) -> str | None:
    """The first of the activations that the kernel of a device does not have, or None."""
    has_activation = kernel("mlp_sampler", device).has_activation
    return next((name for name in activations if not has_activation(name)), None)


def pack_mlp(linears: Sequence[nn.Linear], activations: Sequence[str], dtype: torch.dtype) -> Any:
    """The layers of an MLP (`fastsde.models.mlp.linear_layers`) as `launch_mlp_sampler` takes them."""
    packed = kernel("mlp_sampler", linears[0].weight.device).Packed(
        [(linear.weight, linear.bias) for linear in linears], activations, dtype
    )
    if linears[0].weight.is_cuda:
        torch.cuda.current_stream(linears[0].weight.device).synchronize()  # another stream may be the first to read it
    return packed


def launch_mlp_sampler(
    packed: Any,
    table: StepTable,
    keys: Tensor,
    *,
    x_init: Tensor | None = None,
    precision: str = "fp32",
    every: int = 1,
    states: Tensor | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """`mlp_sampler` by its kernel, for an MLP that is packed. Arguments are trusted.

    Args:
        states: contiguous fp32 ``[K // every + 1, B, d]`` that the states go to, or None.
        progress: called with the number of rows that have been done since; on the CPU several times in a long run.
    """
    out = torch.empty((len(keys), packed.dim), dtype=torch.float32, device=keys.device)
    x_init, keys = contiguous(x_init, keys)
    known = dict(zip(("has_noise", "has_history", "uses_data"), table.terms(), strict=True))
    kernel("mlp_sampler", out.device).mlp_sampler(
        packed,
        device_table(table, out.device),
        keys,
        x_init=x_init,
        clip=table.clip,
        precision=precision,
        every=every,
        states=states,
        progress=progress,
        out=out,
        **known,
    )
    return out


def mlp_sampler(
    model: nn.Module,
    table: StepTable,
    keys: Tensor,
    *,
    x_init: Tensor | None = None,
    precision: str = "fp32",
    every: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """All rows of a table for an MLP of x and t: by one launch where the kernel runs, else `fastsde.reference.sample`.

    Args:
        model: an ``nn.Sequential`` of Linear layers and activations (`fastsde.models.activations`) that is fed with
            ``cat((x, t), -1)``, or a `fastsde.models.MLP` or `ConcatTime`. Its weights are fp32.
        keys: int64 ``[B, 2]``.
        x_init: fp32 ``[B, d]`` instead of a draw from the prior.
        precision: of the products on a GPU: "fp32", "tf32" or "bf16". They are fp32 on the CPU.
        every: m, to return the states after 0, m, 2m, ... rows too.

    Returns:
        The samples fp32 ``[B, d]``; with ``every`` a pair of them and the states ``[K // every + 1, B, d]``.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    layers = linear_layers(model)
    if layers is None:
        raise TypeError(f"model must be an MLP: a Sequential of Linear layers and activations, got {model!r}")
    check_instance("table", table, StepTable)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    linears, activations = layers
    weight, dim, widths = linears[0].weight, linears[-1].out_features, [linear.out_features for linear in linears]
    if linears[0].in_features != dim + 1:
        raise ValueError(f"model must take its {dim} outputs and the time, {dim + 1} inputs: {linears[0].in_features}")
    check_tensor("the model's weights", weight, floating=True)
    if weight.dtype != torch.float32:
        raise TypeError(f"the model's weights must be torch.float32, got {weight.dtype}")
    keys = check_keys(keys, len(check_tensor("keys", keys)), weight.device)
    if x_init is not None:
        check_tensor("x_init", x_init, shape=(len(keys), dim), device=weight.device, floating=True)
        x_init = x_init.float()
    count = len(table) // check_int("every", every, 1) + 1 if every is not None else 0
    max_dim, max_width = mlp_limits(weight.device)
    with torch.no_grad():
        if has_kernels(weight.device) and dim <= max_dim and max(widths) <= max_width:
            unknown = unknown_activation(activations, weight.device)
            if unknown is not None:
                raise ValueError(
                    f"model has the activation {unknown}, which the kernel on {weight.device} does not implement"
                )
            parameters = ([linear.weight for linear in linears], [linear.bias for linear in linears])
            drawn = (device_table(table, weight.device), keys, x_init, table.clip, *table.terms())
            packed = (*parameters, ",".join(activations), *drawn)
            x, states = torch.ops.fastsde.mlp_sampler(*packed, precision, every or 1, count)
        else:
            states = torch.empty((count, len(keys), dim), dtype=torch.float32, device=weight.device)
            x = _reference_mlp_sampler(model, table, keys, x_init, dim, every, states)
    return x if every is None else (x, states)


def _reference_mlp_sampler(
    model: nn.Module,
    table: StepTable,
    keys: Tensor,
    x_init: Tensor | None,
    dim: int,
    every: int | None,
    states: Tensor,
) -> Tensor:
    network = ConcatTime(model.net if isinstance(model, (MLP, ConcatTime)) else model)
    if every is not None:
        states[0] = noise.normal(keys, 0, (dim,)) if x_init is None else x_init

    def keep(row: int, time: float, x: Tensor) -> None:
        if every is not None and (row + 1) % every == 0:
            states[(row + 1) // every] = x

    return reference.sample(network, (len(keys), dim), table, keys, x_init=x_init, after_row=keep)
