"""The solvers by their names."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..sde import VPSDE
from ..validation import check_instance, check_int, check_number
from ..vocabulary import SOLVERS
from .ancestral import ddim, ddpm
from .dpm_solver import dpm_solver_pp_2m
from .euler_maruyama import euler_maruyama, exponential_euler_maruyama
from .forms import check_prediction
from .heun import heun
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
    sde: VPSDE,
    steps: int,
    *,
    t_end: float = 0.0,
    prediction: str = "score",
    clip: float | None = None,
) -> StepTable:
    """The table of a named solver with ``steps`` rows, on equidistant times from 1 down to ``t_end``.

    Raises:
        ValueError: for an unknown solver or prediction, steps below 1, t_end outside [0, 1), or a clip with a solver
            that does not predict x_0.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, or a StepTable, got {solver!r}")
    check_instance("sde", sde, VPSDE)
    check_int("steps", steps, 1)
    check_number("t_end", t_end, "in [0, 1)", lambda t: 0 <= t < 1)
    check_prediction(prediction)
    if solver in _SCHEDULE_SOLVERS:
        times = torch.linspace(1, t_end, steps + 1, dtype=torch.float64, device="cpu")
        return _SCHEDULE_SOLVERS[solver](sde.alpha(times), sde.sigma(times), times[:-1], prediction, clip=clip)
    if clip is not None:
        raise ValueError(
            f"clip bounds a predicted x_0, which {solver} does not use; pick {', '.join(_SCHEDULE_SOLVERS)}"
        )
    if solver == "heun":
        return _heun_of_rows(sde, steps, t_end, prediction)
    return _SDE_SOLVERS[solver](sde, torch.linspace(1, t_end, steps + 1, dtype=torch.float64, device="cpu"), prediction)


def _heun_of_rows(sde: VPSDE, rows: int, t_end: float, prediction: str) -> StepTable:
    """Heun with two rows an interval; an odd row is a last Euler step, which prediction kinds need at t = 0."""
    if rows % 2 == 0 and t_end == 0 and prediction != "score":
        raise ValueError(
            f"heun down to t = 0 with prediction={prediction!r} takes an odd number of steps, since its last row is "
            f"a lone Euler step: got steps={rows}, take {rows - 1} or {rows + 1}, or a t_end above 0"
        )
    times = torch.linspace(1, t_end, (rows + 1) // 2 + 1, dtype=torch.float64, device="cpu")
    return heun(sde, times, prediction, euler_final=rows % 2 == 1)
