"""The operations of `fastsde.reference`, with their arguments checked and sent to the fastest code that can run them.

So far that is the reference itself, on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .reference import WEIGHTINGS
from .sde import VPSDE
from .solvers import PREDICTIONS, StepTable
from .validation import check_instance, check_int, check_keys, check_number, check_tensor

__all__ = ["dsm_loss", "perturb", "solver_step"]

_MAX_STEP = 2**28


def solver_step(
    x: Tensor,
    f: Tensor,
    table: StepTable,
    row: int,
    *,
    history: Tensor | None = None,
    z: Tensor | None = None,
    keys: Tensor | None = None,
    f_uncond: Tensor | None = None,
    guidance: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastsde.reference.solver_step` for x fp32 or float64 and f of any floating-point dtype.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    check_tensor("x", x, floating=True)
    if x.ndim < 1 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64 [B, *shape], got {x.dtype} {list(x.shape)}")
    check_instance("table", table, StepTable)
    check_int("row", row, 0, len(table))

    def like_x(name: str, value: Tensor) -> Tensor:
        return check_tensor(name, value, shape=x.shape, device=x.device, floating=True).to(x.dtype)

    f = like_x("f", f)
    history = None if history is None else like_x("history", history)
    z = None if z is None else like_x("z", z)
    f_uncond = None if f_uncond is None else like_x("f_uncond", f_uncond)
    if z is None and table.d[row] != 0:
        if keys is None:
            raise ValueError(f"z or keys must be given for row {row}, where d is {table.d[row]:g}, got neither")
        keys = check_keys(keys, len(x), x.device)
    if (f_uncond is None) != (guidance is None):
        raise ValueError("f_uncond and guidance go together: give both or neither")
    if guidance is not None:
        check_number("guidance", guidance)
    return reference.solver_step(
        x, f, table, row, history=history, z=z, keys=keys, f_uncond=f_uncond, guidance=guidance
    )


def _check_data(
    x_0: Tensor, keys: Tensor | None, step: int, sde: VPSDE, index: Tensor | None, t: Tensor | None, z: Tensor | None
) -> None:
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
        if len(index) and not (index.min() >= 0 and index.max() < n):
            raise ValueError(f"index must be in [0, {n}), got {index.min()} .. {index.max()}")
        n = len(index)
    if t is not None:
        check_tensor("t", t, shape=(n,), device=x_0.device, floating=True)
    if z is not None:
        check_tensor("z", z, shape=(n, *x_0.shape[1:]), device=x_0.device, floating=True)
    if keys is not None:
        check_keys(keys, n, x_0.device)
    elif t is None or z is None:
        raise ValueError("keys must be given unless t and z both are, got None")


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
) -> tuple[Tensor, Tensor]:
    """`fastsde.reference.perturb`. Raises as `solver_step` does."""
    _check_data(x_0, keys, step, sde, index, t, z)
    check_number("scale", scale), check_number("shift", shift)
    check_number("t_min", t_min, "in (0, 1)", lambda t: 0 < t < 1)
    return reference.perturb(x_0, keys, step, sde, index=index, scale=scale, shift=shift, t=t, z=z, t_min=t_min)


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
) -> Tensor:
    """`fastsde.reference.dsm_loss`. Raises as `solver_step` does."""
    _check_data(x_0, keys, step, sde, index, check_tensor("t", t), z)
    check_number("scale", scale), check_number("shift", shift)
    for name, value, choices in (("prediction", prediction, PREDICTIONS), ("weighting", weighting, WEIGHTINGS)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    check_tensor("f", f, shape=(len(t), *x_0.shape[1:]), device=x_0.device, floating=True)
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
