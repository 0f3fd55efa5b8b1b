"""The kernels as torch.library operations, for torch.compile, and the backward of the loss for autograd.

The engines bypass these and call the launchers: an operation in Python takes some ten microseconds per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..solvers.terms import Terms, named_terms
from .dispatch import contiguous, kernel

__all__ = [
    "launch_dsm_loss",
    "launch_normal",
    "launch_perturb",
    "launch_sample_keys",
    "launch_solver_step",
]


def launch_normal(keys: Tensor, step: int, stream: int, shape: Sequence[int]) -> Tensor:
    """Runs the kernel of `fastsde.ops.normal`. Arguments are not checked."""
    out = _normal_output(keys, step, stream, shape)
    kernel("normal", keys.device).normal(keys.contiguous(), step, stream, out)
    return out


def _normal_output(keys: Tensor, step: int, stream: int, shape: Sequence[int]) -> Tensor:
    return torch.empty((len(keys), *shape), dtype=torch.float32, device=keys.device)


torch.library.custom_op("fastsde::normal", launch_normal, mutates_args=()).register_fake(_normal_output)


def launch_sample_keys(seed: int, n: int, first_sample: int, device: torch.device) -> Tensor:
    """Runs the kernel of `fastsde.ops.sample_keys`, for ints within int64. Arguments are not checked."""
    out = _sample_keys_output(seed, n, first_sample, device)
    kernel("sample_keys", device).sample_keys(seed, first_sample, out)
    return out


def _sample_keys_output(seed: int, n: int, first_sample: int, device: torch.device) -> Tensor:
    return torch.empty((n, 2), dtype=torch.int64, device=device)


torch.library.custom_op("fastsde::sample_keys", launch_sample_keys, mutates_args=()).register_fake(_sample_keys_output)


def launch_solver_step(
    slots: Sequence[Tensor],
    f: Tensor,
    table: Tensor,
    row: int,
    kinds: Sequence[int],
    z: Tensor | None,
    keys: Tensor | None,
    f_uncond: Tensor | None,
    scale: Tensor | None,
    rescale: float,
    snr: float,
    eps_max: float,
    clip: float | None,
) -> list[Tensor]:
    """Runs the kernel of a step; returns the new slots except those that take over an old one. Nothing is checked.

    Args:
        table: a `fastsde.ops.device_table`.
        kinds: `StepTable.kinds` of the row.
        scale: fp32 ``[B]``, the weights of guidance.
        rescale: phi of guidance that is rescaled.
        snr, eps_max: of the row.
    """
    terms = _step_terms(kinds, slots)
    f, z, keys, f_uncond, scale, *slots = contiguous(f, z, keys, f_uncond, scale, *slots)
    weights: dict[str, Tensor | None] = {"scale": scale, "factor": None}
    sizes = None
    if f_uncond is not None and rescale:
        weights["factor"] = slots[0].new_empty(f.shape[0])
        kernel("guidance_rescale", f.device).rescale_factor(f, f_uncond, row, phi=rescale, **weights)
    if snr > 0:
        sizes = slots[0].new_empty(f.shape[0], 2)
        langevin = slots[0].new_full((row + 1, 2), snr)
        langevin[:, 1] = eps_max
        given = {"langevin": langevin, "terms": terms, "z": z, "keys": keys, "f_uncond": f_uncond, **weights}
        kernel("langevin_size", f.device).langevin_size(slots, f, table, row, sizes=sizes, **given)
    out = [torch.empty_like(slots[0]) if source is None else None for source in terms.sources]
    given = {"z": z, "keys": keys, "f_uncond": f_uncond, **weights, "sizes": sizes, "clip": clip}
    kernel("solver_step", f.device).solver_step(slots, f, table, row, terms=terms, out=out, **given)
    return [made for made in out if made is not None]


def _step_terms(kinds: Sequence[int], slots: Sequence[Tensor]) -> Terms:
    return named_terms(tuple(kinds), len(slots))


def _solver_step_outputs(
    slots: Sequence[Tensor], f: Tensor, table: Tensor, row: int, kinds: Sequence[int], *rest: Any
) -> list[Tensor]:
    x = slots[0]
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for source in _step_terms(kinds, slots).sources
        if source is None
    ]


torch.library.custom_op("fastsde::solver_step", launch_solver_step, mutates_args=()).register_fake(_solver_step_outputs)


def launch_perturb(
    launcher: Any,
    x_0: Tensor,
    keys: Tensor | None,
    table: Tensor,
    index: Tensor | None,
    z: Tensor | None,
    counter: Tensor | None,
    step: int,
    scale: float,
    shift: float,
    dtype: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs the kernel of `fastsde.ops.perturb`; returns x_in, tau, and the noise if kept. Arguments are not checked."""
    x_in = _new_batch(x_0, index, dtype)
    tau, kept = table.new_empty(x_in.shape[0]), _new_batch(x_0, index, torch.float32) if keeps else None
    x_0, keys, table, index, z = contiguous(x_0, keys, table, index, z)
    given = {"index": index, "scale": scale, "shift": shift, "z": z, "counter": counter}
    launcher.perturb(x_0, keys, step, table, out=x_in, tau=tau, kept=kept, **given)
    return x_in, tau, kept


def _new_batch(x_0: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    n = x_0.shape[0] if index is None else index.shape[0]
    return x_0.new_empty((n, *x_0.shape[1:]), dtype=dtype)


@torch.library.custom_op("fastsde::perturb", mutates_args=())
def _perturb(
    x_0: Tensor,
    keys: Tensor | None,
    table: Tensor,
    index: Tensor | None,
    z: Tensor | None,
    counter: Tensor | None,
    step: int,
    scale: float,
    shift: float,
    dtype: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs `launch_perturb`; noise that is not kept is returned as a tensor without elements."""
    launcher, numbers = kernel("perturb", x_0.device), (step, scale, shift, dtype, keeps)
    x_in, tau, kept = launch_perturb(launcher, x_0, keys, table, index, z, counter, *numbers)
    return x_in, tau, table.new_empty(0) if kept is None else kept


@_perturb.register_fake
def _(x_0: Tensor, keys: Any, table: Tensor, index: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, dtype, keeps = rest
    x_in, kept = (_new_batch(x_0, index, each) for each in (dtype, torch.float32))
    return x_in, table.new_empty(len(x_in)), kept if keeps else table.new_empty(0)


@torch.library.custom_op("fastsde::dsm_loss", mutates_args=())
def _dsm_loss(
    f: Tensor,
    x_0: Tensor,
    table: Tensor,
    keys: Tensor | None,
    index: Tensor | None,
    z: Tensor | None,
    counter: Tensor | None,
    step: int,
    scale: float,
    shift: float,
) -> Tensor:
    launcher, out = kernel("dsm_loss", f.device), f.new_empty((), dtype=torch.float32)
    return launch_dsm_loss(launcher, None, out, f, x_0, table, keys, index, z, counter, step, scale, shift)


@torch.library.custom_op("fastsde::dsm_loss_backward", mutates_args=())
def _dsm_loss_backward(
    grad: Tensor,
    f: Tensor,
    x_0: Tensor,
    table: Tensor,
    keys: Tensor | None,
    index: Tensor | None,
    z: Tensor | None,
    counter: Tensor | None,
    step: int,
    scale: float,
    shift: float,
) -> Tensor:
    launcher, out = kernel("dsm_loss", f.device), torch.empty_like(f, memory_format=torch.contiguous_format)
    return launch_dsm_loss(launcher, grad, out, f, x_0, table, keys, index, z, counter, step, scale, shift)


def launch_dsm_loss(
    launcher: Any,
    grad: Tensor | None,
    out: Tensor,
    f: Tensor,
    x_0: Tensor,
    table: Tensor,
    keys: Tensor | None,
    index: Tensor | None,
    z: Tensor | None,
    counter: Tensor | None,
    step: int,
    scale: float,
    shift: float,
) -> Tensor:
    """Writes the loss to ``out``, or if its ``grad`` is given the gradient of ``f``. Arguments are not checked."""
    grad, f, x_0, table, keys, index, z = contiguous(grad, f, x_0, table, keys, index, z)
    given = {"index": index, "scale": scale, "shift": shift, "z": z, "counter": counter}
    launcher.dsm_loss(f, x_0, keys, step, table, grad=grad, out=out, **given)
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
