"""What torch.library knows of the kernels: torch.compile takes each whole, and autograd the backward of the loss.

The engines go past these, to the launchers themselves: an operation of Python takes some ten microseconds a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..solvers.terms import Terms, named_terms
from .dispatch import contiguous, kernel

__all__ = ["launch_normal", "launch_sample_keys"]


def launch_normal(keys: Tensor, step: int, stream: int, shape: Sequence[int]) -> Tensor:
    """`fastsde.ops.normal` by its kernel. Arguments are trusted."""
    out = _normal_output(keys, step, stream, shape)
    kernel("normal", keys.device).normal(keys.contiguous(), step, stream, out)
    return out


def _normal_output(keys: Tensor, step: int, stream: int, shape: Sequence[int]) -> Tensor:
    return torch.empty((len(keys), *shape), dtype=torch.float32, device=keys.device)


torch.library.custom_op("fastsde::normal", launch_normal, mutates_args=()).register_fake(_normal_output)


def launch_sample_keys(seed: int, n: int, first_sample: int, device: torch.device) -> Tensor:
    """`fastsde.ops.sample_keys` by its kernel, for ints in int64. Arguments are trusted."""
    out = _sample_keys_output(seed, n, first_sample, device)
    kernel("sample_keys", device).sample_keys(seed, first_sample, out)
    return out


def _sample_keys_output(seed: int, n: int, first_sample: int, device: torch.device) -> Tensor:
    return torch.empty((n, 2), dtype=torch.int64, device=device)


torch.library.custom_op("fastsde::sample_keys", launch_sample_keys, mutates_args=()).register_fake(_sample_keys_output)


@torch.library.custom_op("fastsde::solver_step", mutates_args=())
def _solver_step(
    slots: Sequence[Tensor],
    f: Tensor,
    table: Tensor,
    row: int,
    kinds: Sequence[int],
    z: Tensor | None,
    keys: Tensor | None,
    f_uncond: Tensor | None,
    guidance: float | None,
    clip: float | None,
) -> list[Tensor]:
    """The new slots that do not just take over an old one. ``kinds`` are `StepTable.kinds` of the row."""
    terms = _step_terms(kinds, slots)
    f, z, keys, f_uncond, *slots = contiguous(f, z, keys, f_uncond, *slots)
    out = [torch.empty_like(slots[0]) if source is None else None for source in terms.sources]
    given = {"z": z, "keys": keys, "f_uncond": f_uncond, "guidance": guidance, "clip": clip}
    kernel("solver_step", f.device).solver_step(slots, f, table, row, terms=terms, out=out, **given)
    return [made for made in out if made is not None]


def _step_terms(kinds: Sequence[int], slots: Sequence[Tensor]) -> Terms:
    return named_terms(tuple(kinds), len(slots))


@_solver_step.register_fake
def _(slots: Sequence[Tensor], f: Tensor, table: Tensor, row: int, kinds: Sequence[int], *rest: Any) -> list[Tensor]:
    x = slots[0]
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for source in _step_terms(kinds, slots).sources
        if source is None
    ]


@torch.library.custom_op("fastsde::mlp_sampler", mutates_args=())
def _mlp_sampler(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: str,
    table: Tensor,
    keys: Tensor,
    x_init: Tensor | None,
    clip: float | None,
    has_noise: bool,
    has_history: bool,
    uses_data: bool,
    precision: str,
    every: int,
    states: int,
) -> tuple[Tensor, Tensor]:
    module = kernel("mlp_sampler", keys.device)
    dtype = torch.bfloat16 if precision == "bf16" and keys.is_cuda else torch.float32
    packed = module.Packed(
        list(zip(weights, biases, strict=True)), activations.split(",") if activations else [], dtype
    )
    out, kept = _mlp_sampler_outputs(weights, keys, states)
    x_init, table, keys = contiguous(x_init, table, keys)
    known = {"has_noise": has_noise, "has_history": has_history, "uses_data": uses_data, "precision": precision}
    given = {"x_init": x_init, "clip": clip, "every": every, "states": kept if states else None}
    module.mlp_sampler(packed, table, keys, out=out, **given, **known)
    return out, kept


def _mlp_sampler_outputs(weights: Sequence[Tensor], keys: Tensor, states: int) -> tuple[Tensor, Tensor]:
    out = torch.empty((len(keys), len(weights[-1])), dtype=torch.float32, device=keys.device)
    return out, out.new_empty((states, *out.shape))


@_mlp_sampler.register_fake
def _(weights: Sequence[Tensor], biases: Any, activations: str, table: Tensor, keys: Tensor, *rest: Any) -> Any:
    return _mlp_sampler_outputs(weights, keys, rest[-1])


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
    x_t, t_out = _perturb_outputs(x_0, index, dtype)
    x_0, keys, index, t, z = contiguous(x_0, keys, index, t, z)
    given = {"index": index, "scale": scale, "shift": shift, "t": t, "z": z, "t_min": t_min, "counter": counter}
    kernel("perturb", x_0.device).perturb(x_0, keys, step, beta_min, beta_max, out=x_t, t_out=t_out, **given)
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
    grad, f, x_0, t, keys, index, z = contiguous(grad, f, x_0, t, keys, index, z)
    given = {"index": index, "scale": scale, "shift": shift, "z": z, "prediction": prediction, "weighting": weighting}
    given["counter"] = counter
    kernel("dsm_loss", f.device).dsm_loss(f, x_0, t, keys, step, beta_min, beta_max, grad=grad, out=out, **given)
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
