"""Whole trajectories of an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import noise, reference
from ..models.mlp import MLP, ConcatTime, linear_layers
from ..solvers import StepTable
from ..validation import check_instance, check_int, check_keys, check_tensor
from .dispatch import contiguous, has_kernels
from .step import device_table

__all__ = ["MAX_MLP_DIM", "MAX_MLP_WIDTH", "PRECISIONS", "launch_mlp_sampler", "mlp_sampler", "pack_mlp"]

PRECISIONS = ("fp32", "tf32", "bf16")
MAX_MLP_DIM, MAX_MLP_WIDTH = 64, 256  # that the kernel takes


def pack_mlp(linears: Sequence[nn.Linear], activations: Sequence[str], dtype: torch.dtype) -> Any:
    """The layers of an MLP (`fastsde.models.mlp.linear_layers`) as `launch_mlp_sampler` takes them."""
    from ..kernels.mlp_sampler import Packed

    packed = Packed([(linear.weight, linear.bias) for linear in linears], activations, dtype)
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
) -> Tensor:
    """`mlp_sampler` by the Triton kernel, for an MLP that is packed. Arguments are trusted.

    Args:
        states: contiguous fp32 ``[K // every + 1, B, d]`` that the states go to, or None.
    """
    from ..kernels import mlp_sampler as kernel

    out = torch.empty((len(keys), packed.dim), device=keys.device)
    x_init, keys = contiguous(x_init, keys)
    kernel.mlp_sampler(
        packed,
        device_table(table, out.device),
        keys,
        x_init=x_init,
        clip=table.clip,
        has_noise=bool((table.d != 0).any()),
        has_history=bool((table.c != 0).any()),
        uses_data=bool((table.e != 0).any()),
        precision=precision,
        every=every,
        states=states,
        out=out,
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
        model: an ``nn.Sequential`` of Linear layers and activations (LogSigmoid, SiLU, ReLU, Tanh, GELU, Softplus) that
            is fed with ``cat((x, t), -1)``, or a `fastsde.models.MLP` or `ConcatTime`. Its weights are fp32.
        keys: int64 ``[B, 2]``.
        x_init: fp32 ``[B, d]`` instead of a draw from the prior.
        precision: of the kernel's products: "fp32", "tf32" or "bf16". The reference's are fp32.
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
    states = torch.empty((count, len(keys), dim), device=weight.device) if every is not None else None
    with torch.no_grad():
        if has_kernels(weight.device) and dim <= MAX_MLP_DIM and max(widths) <= MAX_MLP_WIDTH:
            packed = pack_mlp(linears, activations, torch.bfloat16 if precision == "bf16" else torch.float32)
            given: dict[str, Any] = {"x_init": x_init, "precision": precision, "every": every or 1, "states": states}
            x = launch_mlp_sampler(packed, table, keys, **given)
        else:
            x = _reference_mlp_sampler(model, table, keys, x_init, dim, every, states)
    return x if states is None else (x, states)


def _reference_mlp_sampler(
    model: nn.Module,
    table: StepTable,
    keys: Tensor,
    x_init: Tensor | None,
    dim: int,
    every: int | None,
    states: Tensor | None,
) -> Tensor:
    network = ConcatTime(model.net if isinstance(model, (MLP, ConcatTime)) else model)
    if states is not None:
        states[0] = noise.normal(keys, 0, (dim,)) if x_init is None else x_init

    def keep(row: int, time: float, x: Tensor) -> None:
        if states is not None and every is not None and (row + 1) % every == 0:
            states[(row + 1) // every] = x

    return reference.sample(network, (len(keys), dim), table, keys, x_init=x_init, after_row=keep)
