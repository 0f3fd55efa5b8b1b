"""What torch.library knows of the training kernels: torch.compile takes each whole, and autograd its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import contiguous

__all__: list[str] = []


@torch.library.custom_op("fastsde::perturb", mutates_args=())
def _perturb(
    x_0: Tensor,
    keys: Tensor | None,
    index: Tensor | None,
    t: Tensor | None,
    z: Tensor | None,
    counter: Tensor | None,
    step: int,
    beta_min: float,
    beta_max: float,
    scale: float,
    shift: float,
    t_min: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from ..kernels import perturb as kernel

    x_t, t_out = _perturb_outputs(x_0, index, dtype)
    x_0, keys, index, t, z = contiguous(x_0, keys, index, t, z)
    given = {"index": index, "scale": scale, "shift": shift, "t": t, "z": z, "t_min": t_min, "counter": counter}
    kernel.perturb(x_0, keys, step, beta_min, beta_max, out=x_t, t_out=t_out, **given)
    return x_t, t_out


def _perturb_outputs(x_0: Tensor, index: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n = len(x_0) if index is None else len(index)
    return x_0.new_empty((n, *x_0.shape[1:]), dtype=dtype), x_0.new_empty((n,), dtype=torch.float32)


@_perturb.register_fake
def _(x_0: Tensor, keys: Any, index: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return _perturb_outputs(x_0, index, rest[-1])


@torch.library.custom_op("fastsde::dsm_loss", mutates_args=())
def _dsm_loss(
    f: Tensor,
    x_0: Tensor,
    t: Tensor,
    keys: Tensor | None,
    index: Tensor | None,
    z: Tensor | None,
    counter: Tensor | None,
    step: int,
    beta_min: float,
    beta_max: float,
    scale: float,
    shift: float,
    prediction: str,
    weighting: str,
) -> Tensor:
    out = f.new_empty((), dtype=torch.float32)
    numbers = (beta_min, beta_max, scale, shift)
    return _launch_dsm_loss(None, out, f, x_0, t, keys, index, z, counter, step, *numbers, prediction, weighting)


@torch.library.custom_op("fastsde::dsm_loss_backward", mutates_args=())
def _dsm_loss_backward(
    grad: Tensor,
    f: Tensor,
    x_0: Tensor,
    t: Tensor,
    keys: Tensor | None,
    index: Tensor | None,
    z: Tensor | None,
    counter: Tensor | None,
    step: int,
    beta_min: float,
    beta_max: float,
    scale: float,
    shift: float,
    prediction: str,
    weighting: str,
) -> Tensor:
    out = torch.empty_like(f, memory_format=torch.contiguous_format)
    numbers = (beta_min, beta_max, scale, shift)
    return _launch_dsm_loss(grad, out, f, x_0, t, keys, index, z, counter, step, *numbers, prediction, weighting)


def _launch_dsm_loss(
    grad: Tensor | None,
    out: Tensor,
    f: Tensor,
    x_0: Tensor,
    t: Tensor,
    keys: Tensor | None,
    index: Tensor | None,
    z: Tensor | None,
    counter: Tensor | None,
    step: int,
    beta_min: float,
    beta_max: float,
    scale: float,
    shift: float,
    prediction: str,
    weighting: str,
) -> Tensor:
    from ..kernels import dsm_loss as kernel

    grad, f, x_0, t, keys, index, z = contiguous(grad, f, x_0, t, keys, index, z)
    given = {"index": index, "scale": scale, "shift": shift, "z": z, "prediction": prediction, "weighting": weighting}
    given["counter"] = counter
    kernel.dsm_loss(f, x_0, t, keys, step, beta_min, beta_max, grad=grad, out=out, **given)
    return out


@_dsm_loss.register_fake
def _(f: Tensor, *rest: Any) -> Tensor:
    return f.new_empty((), dtype=torch.float32)


@_dsm_loss_backward.register_fake
def _(grad: Tensor, f: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(f, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.rest = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.fastsde.dsm_loss_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (gradient, *[None] * (6 + len(ctx.rest)))


_dsm_loss.register_autograd(_backward, setup_context=_save_for_backward)
