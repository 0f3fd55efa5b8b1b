"""Ordinary differential equations with adaptive steps, each sample with its own, by torchode's steps and control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..extras import require
from ..solvers.adaptive import AdaptiveODE
from .errors import check_steps, out_of_steps

__all__ = ["Velocity", "integrate"]

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]

# The next step is 0.9 E^(-gain / 5) times as long as one with the scaled error E. Near data the flow of a diffusion
# changes on the scale of t, so that steps of equal error are proportional to t: after an accepted step down to t', the
# next is shortened by t' / t too, at most to a fifth. Without that, every other step towards t = 0 is rejected: the
# flow of the shipped U-Net takes 116 calls instead of 212 at a tolerance of 1e-5.
_GAIN = 0.7
_LEAST = 0.2


@torch.no_grad()
def integrate(
    velocity: Velocity, y: Tensor, t_start: Tensor, t_end: Tensor, method: AdaptiveODE
) -> tuple[Tensor, Tensor]:
    """Solves dy/dt = velocity from ``t_start`` to ``t_end``, in either direction.

    torchode's own loop evaluates all samples until the last one has finished. This one runs torchode's steps and step
    size control too, but without the samples that have finished.

    Args:
        velocity: called as ``velocity(t, y, samples)`` with t float64 ``[b]``, y ``[b, D]`` and the indices int64
            ``[b]`` of the b samples that have not finished, in increasing order; returns dy/dt ``[b, D]`` in y's dtype.
            Autograd is off; the function may enable it for itself.
        y: the state ``[B, D]`` at ``t_start``, fp32 or float64.
        t_start, t_end: ``[B]``; a sample whose times are equal stays as it is.

    Returns:
        The state at ``t_end`` ``[B, D]``, and how often ``velocity`` was called for each sample, int64 ``[B]``.

    Raises:
        ImportError: if torchode is not installed.
        NonFiniteError: if the velocity or the state becomes NaN or infinite.
        StepSizeError: if a sample needs more than ``max_steps`` steps, or steps too short for float64 times.
    """
    y_end, calls = y.clone(), torch.zeros(len(y), dtype=torch.int64, device=y.device)
    samples = (t_start != t_end).nonzero()[:, 0]
    if not len(samples):
        return y_end, calls
    torchode, count = _library(), 0

    def counted(t: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return velocity(t, y, samples)

    y, t, end = y[samples], t_start[samples].double(), t_end[samples].double()
    term = torchode.ODETerm(counted, with_stats=False, with_args=True)
    stepper = {"dopri5": torchode.Dopri5, "tsit5": torchode.Tsit5}[method.method]()
    control = torchode.PIDController(method.atol, method.rtol, pcoeff=0.0, icoeff=_GAIN, dcoeff=0.0)
    problem, options = torchode.InitialValueProblem(y, t, end), {"stats": {}, "args": samples}
    dt, errors, f = control.init(term, problem, stepper.convergence_order(), None, **options)
    state = stepper.init(term, problem, f, **options)
    for _ in range(method.max_steps):
        left = end - t
        is_last = dt.abs() >= left.abs()
        dt = torch.where(is_last, left, dt)
        result, _, after, _ = stepper.step(term, None, y, t, dt, state, stats={}, args=samples)
        accepted, dt_next, errors, status = control.adapt_step_size(t, dt, y, result, errors, {})
        t_next = torch.where(is_last, end, t + dt)
        check_steps(status != 0, t_next == t, samples, t, method.rtol, method.atol)
        dt = torch.where(accepted, dt_next * (t_next / t).clamp(_LEAST, 1), dt_next)
        y, t = torch.where(accepted[:, None], result.y, y), torch.where(accepted, t_next, t)
        state = stepper.merge_states(accepted, after, state)
        has_finished = accepted & is_last
        if has_finished.any():
            done, rest = samples[has_finished], (~has_finished).nonzero()[:, 0]
            y_end[done], calls[done] = y[has_finished], count
            if not len(rest):
                return y_end, calls
            samples, y, t, dt, end = samples[rest], y[rest], t[rest], dt[rest], end[rest]
            state = state._replace(prev_vf1=state.prev_vf1[rest])
            errors = errors.update_error_ratios(errors.prev_error_ratio[rest], errors.prev_prev_error_ratio[rest])
    raise out_of_steps(f"{method.max_steps} steps (max_steps) were not enough", samples, t, method.rtol, method.atol)


def _library() -> Any:
    """Returns torchode."""
    return require("torchode", extra="ode", what="adaptive ODE solvers")
