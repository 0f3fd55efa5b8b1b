"""The data order, posterior noising and the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..reference import WEIGHTINGS
from ..sde import VPSDE
from ..solvers import PREDICTIONS
from ..validation import check_instance, check_int, check_keys, check_number, check_tensor
from . import library  # noqa: F401 (registers the operations)
from .dispatch import has_kernels, kernel, needs_grad

__all__ = ["data_order", "dsm_loss", "perturb"]

_MAX_STEP = 2**28


def data_order(keys: Tensor, counter: Tensor, n: int, out: Tensor) -> None:
    """`fastsde.reference.data_order` of consecutive steps, where `has_triton` holds: one launch. Arguments are trusted.

    Args:
        keys: contiguous int64 ``[B, 2]``.
        counter: int64, one element on the device: the first step.
        n: how many rows the data have.
        out: int64 ``[R, B]``, each row contiguous, where the positions of R steps go.
    """
    kernel("data_order", keys.device).data_order(keys, 0, n, counter=counter, out=out)


def _check_data(
    x_0: Tensor,
    keys: Tensor | None,
    step: int,
    sde: VPSDE,
    index: Tensor | None,
    t: Tensor | None,
    z: Tensor | None,
    counter: Tensor | None,
) -> Tensor | None:
    """Raises for bad arguments; returns the keys as int64."""
    check_tensor("x_0", x_0)
    if x_0.ndim < 1 or not (x_0.is_floating_point() or x_0.dtype == torch.uint8):
        raise ValueError(f"x_0 must be uint8 or floating-point [B, *shape], got {x_0.dtype} {list(x_0.shape)}")
    check_int("step", step, 0, _MAX_STEP)
    check_instance("sde", sde, VPSDE)
    n = len(x_0)
    if index is not None:
        check_tensor("index", index, device=x_0.device)
        if index.dtype != torch.int64 or index.ndim != 1:
            raise ValueError(f"index must be int64 [B], got {index.dtype} {list(index.shape)}")
        # A check of values would wait for a GPU, and cut the graph of torch.compile or CUDA: a kernel then gives NaN.
        waits = index.device.type != "cpu" or torch.compiler.is_compiling() or counter is not None
        checks = len(index) and not waits
        if checks and not (index.min() >= 0 and index.max() < n):
            raise ValueError(f"index must be in [0, {n}), got {index.min()} .. {index.max()}")
        n = len(index)
    if t is not None:
        check_tensor("t", t, shape=(n,), device=x_0.device, floating=True)
    if z is not None:
        check_tensor("z", z, shape=(n, *x_0.shape[1:]), device=x_0.device, floating=True)
    if keys is not None:
        return check_keys(keys, n, x_0.device)
    if t is None or z is None:
        raise ValueError("keys must be given unless t and z both are, got None")
    return None


def _kernel_takes(x_0: Tensor, t: Tensor | None, z: Tensor | None) -> bool:
    """Whether the training kernels run on these: their arithmetic is that of the reference for uint8 and fp32 alone."""
    dtypes = [each.dtype for each in (t, z) if each is not None]
    if x_0.dtype not in (torch.uint8, torch.float32) or any(dtype != torch.float32 for dtype in dtypes):
        return False
    return has_kernels(x_0.device) and not needs_grad(x_0, t, z)


def _refuse_counter(counter: Tensor | None) -> None:
    if counter is not None:
        raise ValueError("counter must be None where no kernel runs (they take fp32 or uint8 data)")


def perturb(
    x_0: Tensor,
    keys: Tensor | None,
    step: int,
    sde: VPSDE,
    *,
    index: Tensor | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    t: Tensor | None = None,
    z: Tensor | None = None,
    t_min: float = 1e-4,
    dtype: torch.dtype | None = None,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastsde.reference.perturb`. Raises as `solver_step` does.

    Args:
        counter: int64, one element on the device, that is added to the step where a kernel runs, and only there.
    """
    keys = _check_data(x_0, keys, step, sde, index, t, z, counter)
    check_number("scale", scale), check_number("shift", shift)
    check_number("t_min", t_min, "in (0, 1)", lambda t: 0 < t < 1)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    if dtype != torch.float64 and _kernel_takes(x_0, t, z):
        dtype = torch.float32 if dtype is None else dtype
        numbers = (sde.beta_min, sde.beta_max, float(scale), float(shift), t_min)
        given = (x_0, keys, index, t, z, counter)
        result: tuple[Tensor, Tensor] = torch.ops.fastsde.perturb(*given, step, *numbers, dtype)
        return result
    _refuse_counter(counter)
    return reference.perturb(
        x_0, keys, step, sde, index=index, scale=scale, shift=shift, t=t, z=z, t_min=t_min, dtype=dtype
    )


def dsm_loss(
    f: Tensor,
    x_0: Tensor,
    t: Tensor,
    keys: Tensor | None,
    step: int,
    sde: VPSDE,
    *,
    index: Tensor | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    z: Tensor | None = None,
    prediction: str = "score",
    weighting: str = "sigma2",
    counter: Tensor | None = None,
) -> Tensor:
    """`fastsde.reference.dsm_loss`, with a ``counter`` as for `perturb`. The kernel has a first derivative alone.

    Raises as `solver_step` does.
    """
    keys = _check_data(x_0, keys, step, sde, index, check_tensor("t", t), z, counter)
    check_number("scale", scale), check_number("shift", shift)
    for name, value, choices in (("prediction", prediction, PREDICTIONS), ("weighting", weighting, WEIGHTINGS)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    check_tensor("f", f, shape=(len(t), *x_0.shape[1:]), device=x_0.device, floating=True)
    if f.dtype != torch.float64 and f.numel() and _kernel_takes(x_0, t, z):
        numbers = (sde.beta_min, sde.beta_max, float(scale), float(shift))
        given = (f, x_0, t, keys, index, z, counter)
        loss: Tensor = torch.ops.fastsde.dsm_loss(*given, step, *numbers, prediction, weighting)
        return loss
    _refuse_counter(counter)
    return reference.dsm_loss(
        f,
        x_0,
        t,
        keys,
        step,
        sde,
        index=index,
        scale=scale,
        shift=shift,
        z=z,
        prediction=prediction,
        weighting=weighting,
    )
