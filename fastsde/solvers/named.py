"""The solvers by their names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..sde import Process, check_process
from ..validation import check_int, check_number
from ..vocabulary import SOLVERS
from .ancestral import ddim, ddpm
from .dpm_solver import dpm_solver_pp_2m
from .euler_maruyama import euler_maruyama, exponential_euler_maruyama
from .forms import check_prediction
from .heun import corrects_at, heun
from .table import StepTable

__all__ = ["build"]


# Solvers on the times of the SDE, and solvers on a schedule of alpha and sigma, which may clip.
_SDE_SOLVERS: dict[str, Callable[..., StepTable]] = {
    "euler_maruyama": euler_maruyama,
    "exponential_euler_maruyama": exponential_euler_maruyama,
    "heun": heun,
}
_SCHEDULE_SOLVERS: dict[str, Callable[..., StepTable]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
}


def build(
    solver: str,
    sde: Process,
    steps: int,
    *,
    t_end: float = 0.0,
    prediction: str = "score",
    clip: float | None = None,
) -> StepTable:
    """The table of a named solver with ``steps`` rows, on equidistant times from ``t_max`` down to ``t_end``.

    Raises:
        TypeError: for what is not a process.
        ValueError: for an unknown solver or prediction, steps below 1, t_end outside [0, t_max), a clip with a solver
            that does not predict x_0, or a solver that the process or the prediction has no use for.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, or a StepTable, got {solver!r}")
    check_process("sde", sde)
    check_int("steps", steps, 1)
    check_number("t_end", t_end, f"in [0, {sde.t_max:g})", lambda t: 0 <= t < sde.t_max)
    check_prediction(prediction)
    if solver in _SCHEDULE_SOLVERS:
        times = _times(sde, t_end, steps)
        return _SCHEDULE_SOLVERS[solver](sde.alpha(times), sde.sigma(times), times[:-1], prediction, clip=clip)
    if clip is not None:
        raise ValueError(
            f"clip bounds a predicted x_0, which {solver} does not use; pick {', '.join(_SCHEDULE_SOLVERS)}"
        )
    if solver == "heun":
        return _heun_of_rows(sde, steps, t_end, prediction)
    return _SDE_SOLVERS[solver](sde, _times(sde, t_end, steps), prediction)


def _times(sde: Process, t_end: float, intervals: int) -> Tensor:
    return torch.linspace(sde.t_max, t_end, intervals + 1, dtype=torch.float64, device="cpu")


def _heun_of_rows(sde: Process, rows: int, t_end: float, prediction: str) -> StepTable:
    """Heun with two rows an interval; an odd row is a last Euler step, for where there is no velocity at the end."""
    if rows % 2 == 0 and not corrects_at(sde, t_end, prediction):
        raise ValueError(
            f"heun down to t = {t_end:g} with prediction={prediction!r} takes an odd number of steps, since its last "
            f"row is a lone Euler step: got steps={rows}, take {rows - 1} or {rows + 1}, or a t_end above {t_end:g}"
        )
    return heun(sde, _times(sde, t_end, (rows + 1) // 2), prediction, euler_final=rows % 2 == 1)
