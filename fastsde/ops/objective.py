"""A training step around its network: data order, times, coefficients, noising and loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import noise, reference
from ..objective import Objective
from ..reference import Noised
from ..validation import check_bool, check_instance, check_int, check_keys, check_number, check_tensor
from . import operators
from .dispatch import find_kernel, has_kernels, is_plain, kernel, needs_grad

__all__ = ["coefficients", "data_order", "dsm_loss", "perturb", "step_coefficients", "training_times"]

_MAX_STEP = 2**28
_KERNEL_DATA = (torch.uint8, torch.float32)
_COLUMNS = 6


def data_order(keys: Tensor, counter: Tensor, n: int, out: Tensor) -> None:
    """Runs `fastsde.reference.data_order` for consecutive steps in one launch. Arguments are not checked.

    This needs a device with `has_triton`.

    Args:
        keys: contiguous int64 ``[B, 2]``.
        counter: int64, one element on the device: the first step.
        n: the number of rows of the data.
        out: int64 ``[R, B]``, each row contiguous, for the positions of R steps.
    """
    kernel("data_order", keys.device).data_order(keys, 0, n, counter=counter, out=out)


def training_times(
    objective: Objective, keys: Tensor, step: int, steps: int = 1, *, counter: Tensor | None = None
) -> Tensor:
    """Returns the times fp32 ``[steps, B]`` of consecutive steps, as in `fastsde.reference.training_draws`.

    Arguments are not checked.

    Args:
        objective: what the network learns, which says how times are distributed.
        keys: contiguous int64 ``[B, 2]``.
        step: the first step.
        steps: how many.
        counter: int64, one element on the device, added to the step; only where a kernel runs.
    """
    launcher = None if torch.compiler.is_compiling() else find_kernel("uniform", keys.device)
    if launcher is not None:
        u = torch.empty((steps, len(keys)), dtype=torch.float32, device=keys.device)
        launcher.uniform(keys, step, noise.STREAM_TRAINING_TIME, u, counter=counter)
    else:
        _refuse_counter(counter)
        numbers = torch.arange(step, step + steps, device=keys.device)
        u = noise.uniform(keys, numbers, (), noise.STREAM_TRAINING_TIME)
    return objective.draw(u)


def coefficients(objective: Objective, t: Tensor) -> Tensor:
    """Returns `fastsde.objective.Objective.table` in fp32, at times ``[*times]``: ``[*times, 6]``.

    Kernels interpolate, to a rounding of fp32, between the objective's bounds of t. If other times are among them, a
    CPU computes all of them without interpolation; a GPU gives NaN for these, since checking them would wait for it.

    Raises:
        TypeError: for an objective or times of another type.
    """
    check_instance("objective", objective, Objective)
    check_tensor("t", t, floating=True)
    if type(t) is Tensor and t.dtype == torch.float32 and not (torch.compiler.is_compiling() or needs_grad(t)):
        launcher = find_kernel("coefficients", t.device)
        found = None if launcher is None else objective.interpolation
        if launcher is not None and found is not None:
            table = t.new_empty((*t.shape, _COLUMNS))
            rows = found.rows if t.is_cpu else _on_device(found.rows, t.device)
            if not launcher.coefficients(t.reshape(-1), rows, found.first, found.shift, table.view(-1, _COLUMNS)):
                return table
    return objective.table(t)


_copies: Any = WeakTensorKeyDictionary()


def _on_device(rows: Tensor, device: torch.device) -> Tensor:
    """Returns the rows of an interpolation on a device, copied once: before a step is captured, it has always run."""
    copies: dict[torch.device, Tensor] = _copies.setdefault(rows, {})
    if device not in copies:
        copies[device] = rows.to(device)
        torch.cuda.current_stream(device).synchronize()  # another stream may be the first to read it
    return copies[device]


def step_coefficients(
    objective: Objective,
    keys: Tensor,
    step: int,
    steps: int = 1,
    *,
    counter: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Returns `coefficients` at the `training_times` of consecutive steps, fp32 ``[steps, B, 6]``.

    Arguments are not checked.

    Args:
        out: contiguous memory for the result, used by the CPU kernel: new memory costs as much as the computation.
    """
    in_one = objective.times == "uniform" and keys.is_cpu and not torch.compiler.is_compiling()
    launcher: Any = find_kernel("coefficients", keys.device) if in_one else None
    found = objective.interpolation if hasattr(launcher, "step_coefficients") else None
    if found is not None:
        table = out
        if table is None:
            table = torch.empty((steps, len(keys), _COLUMNS), dtype=torch.float32, device=keys.device)
        low, high, step = objective.t_min, objective.last_time, step + (0 if counter is None else int(counter))
        if not launcher.step_coefficients(keys, step, low, high - low, *found, table):
            return table
    return coefficients(objective, training_times(objective, keys, step, steps, counter=counter))


def _check_batch(
    x_0: Tensor,
    keys: Tensor | None,
    step: int,
    table: Tensor,
    index: Tensor | None,
    scale: float,
    shift: float,
    z: Tensor | None,
    counter: Tensor | None,
) -> Tensor | None:
    """Raises for bad arguments; returns the keys as int64."""
    check_tensor("x_0", x_0)
    if x_0.ndim < 1 or not (x_0.is_floating_point() or x_0.dtype == torch.uint8):
        raise ValueError(f"x_0 must be uint8 or floating-point [B, *shape], got {x_0.dtype} {list(x_0.shape)}")
    check_int("step", step, 0, _MAX_STEP)
    check_number("scale", scale), check_number("shift", shift)
    n, device = x_0.shape[0], x_0.device
    if index is not None:
        n = _check_index(index, n, device, checks=counter is None)
    check_tensor("coefficients", table, shape=(n, _COLUMNS), device=device, floating=True)
    if z is not None:
        check_tensor("z", z, shape=(n, *x_0.shape[1:]), device=device, floating=True)
    if keys is not None:
        return check_keys(keys, n, device)
    if z is None:
        raise ValueError("keys must be given unless z is, got None")
    return None


def _check_index(index: Tensor, rows: int, device: torch.device, checks: bool) -> int:
    """Raises for a bad index; returns how many rows it has."""
    check_tensor("index", index, device=device)
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"index must be int64 [B], got {index.dtype} {list(index.shape)}")
    # Checking values would wait for a GPU, and break a graph of torch.compile or CUDA: there the kernel gives NaN.
    checks = checks and device.type == "cpu" and not torch.compiler.is_compiling()
    if checks and len(index) and not (index.min() >= 0 and index.max() < rows):
        raise ValueError(f"index must be in [0, {rows}), got {index.min()} .. {index.max()}")
    return len(index)


class _Route(NamedTuple):
    """The kernel of a call, and whether its launcher is called directly, which saves some ten microseconds."""

    launcher: Any
    is_direct: bool


def _route(name: str, x_0: Tensor, table: Tensor, z: Tensor | None, *others: Tensor | None) -> _Route | None:
    """Returns how a kernel runs on these tensors, or None: it matches the reference only for uint8 and fp32 data."""
    if x_0.dtype not in _KERNEL_DATA or table.dtype != torch.float32 or (z is not None and z.dtype != torch.float32):
        return None
    if needs_grad(x_0, table, z):
        return None
    if torch.compiler.is_compiling():  # compiled code calls the torch.library operations
        return _Route(operators, False) if has_kernels(x_0.device) else None
    launcher = find_kernel(name, x_0.device)
    return None if launcher is None else _Route(launcher, x_0.is_cpu and is_plain(x_0, table, z, *others))


def _refuse_counter(counter: Tensor | None) -> None:
    if counter is not None:
        raise ValueError("counter must be None where no kernel runs (kernels take fp32 or uint8 data), got a tensor")


def perturb(
    x_0: Tensor,
    keys: Tensor | None,
    step: int,
    coefficients: Tensor,
    *,
    index: Tensor | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    z: Tensor | None = None,
    dtype: torch.dtype | None = None,
    counter: Tensor | None = None,
    keep_noise: bool = False,
) -> Noised:
    """Runs `fastsde.reference.perturb`, by a kernel if one fits. Raises as `solver_step` does.

    Args:
        counter: int64, one element on the device, added to the step; only where a kernel runs.
        keep_noise: whether to return the noise, for `dsm_loss`. On a CPU drawing it again takes longer than reading it,
            on a GPU it takes less time.
    """
    keys = _check_batch(x_0, keys, step, coefficients, index, scale, shift, z, counter)
    check_bool("keep_noise", keep_noise)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    route = None if dtype == torch.float64 else _route("perturb", x_0, coefficients, z, keys, index, counter)
    if route is None:
        _refuse_counter(counter)
        found = reference.perturb(
            x_0, keys, step, coefficients, index=index, scale=scale, shift=shift, z=z, dtype=dtype
        )
        return found if keep_noise else found._replace(z=z)
    dtype, keeps = torch.float32 if dtype is None else dtype, keep_noise and z is None
    tensors, numbers = (x_0, keys, coefficients, index, z, counter), (step, float(scale), float(shift))
    if route.is_direct:
        x_in, tau, kept = operators.launch_perturb(route.launcher, *tensors, *numbers, dtype, keeps)
    else:
        x_in, tau, kept = torch.ops.fastsde.perturb(*tensors, *numbers, dtype, keeps)
    return Noised(x_in, tau, kept if keeps else z)


def dsm_loss(
    f: Tensor,
    x_0: Tensor,
    keys: Tensor | None,
    step: int,
    coefficients: Tensor,
    *,
    index: Tensor | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    z: Tensor | None = None,
    counter: Tensor | None = None,
) -> Tensor:
    """Runs `fastsde.reference.dsm_loss`, by a kernel if one fits, with a ``counter`` as for `perturb`.

    The kernel has only a first derivative. Raises as `solver_step` does.
    """
    keys = _check_batch(x_0, keys, step, coefficients, index, scale, shift, z, counter)
    check_tensor("f", f, shape=(coefficients.shape[0], *x_0.shape[1:]), device=x_0.device, floating=True)
    unfit = f.dtype == torch.float64 or not f.numel()
    route = None if unfit else _route("dsm_loss", x_0, coefficients, z, f, keys, index, counter)
    if route is None:
        _refuse_counter(counter)
        return reference.dsm_loss(f, x_0, keys, step, coefficients, index=index, scale=scale, shift=shift, z=z)
    tensors, numbers = (f, x_0, coefficients, keys, index, z, counter), (step, float(scale), float(shift))
    launcher = route.launcher
    if not (route.is_direct and hasattr(launcher, "loss_and_gradient")):
        loss: Tensor = torch.ops.fastsde.dsm_loss(*tensors, *numbers)
    elif torch.is_grad_enabled() and f.requires_grad:
        loss = _Loss.apply(f, partial(launcher.loss_and_gradient, *tensors, *numbers))
    else:
        loss = operators.launch_dsm_loss(launcher, None, f.new_empty((), dtype=torch.float32), *tensors, *numbers)
    return loss


class _Loss(torch.autograd.Function):
    """The loss on the CPU, whose kernel computes the gradient in the same pass over the data."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, launch: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        loss, gradient = launch()
        ctx.save_for_backward(f, gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        f, gradient = ctx.saved_tensors
        if float(grad) != 1:
            gradient = gradient * grad
        if gradient.dtype != f.dtype:
            gradient = gradient.to(f.dtype)
        if torch.is_grad_enabled():  # create_graph=True: going backward through the gradient raises an error
            error = torch._C._functions.DelayedError(b"the kernel of dsm_loss has only a first derivative", 1)
            gradient = error(gradient + (f - f.detach()))
        return gradient, None
