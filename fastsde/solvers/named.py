"""`build`, which builds the table of a solver by its name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..sde import VPSDE, Process, check_process
from ..validation import check_bool, check_int, check_number
from ..vocabulary import SOLVERS
from .forms import check_prediction, data_form
from .registry import REGISTRY, Solver
from .repaint import repaint
from .table import StepTable
from .times import spaced

__all__ = ["SOLVERS", "build", "find"]

for _module in pkgutil.iter_modules([str(Path(__file__).parent)]):  # each registers its builders
    importlib.import_module(f"{__package__}.{_module.name}")


def find(solver: str) -> Solver:
    """Returns the solver with a name.

    Raises:
        ValueError: for an unknown name.
    """
    if solver not in REGISTRY:
        raise ValueError(
            f"solver must be one of {', '.join(REGISTRY)}, a StepTable, or an adaptive solver, got {solver!r}"
        )
    return REGISTRY[solver]


def build(
    solver: str,
    sde: Process,
    steps: int,
    *,
    t_start: float | None = None,
    t_end: float = 0.0,
    spacing: str | None = None,
    rho: float | None = None,
    prediction: str = "score",
    clip: float | None = None,
    eta: float | None = None,
    solver_options: Mapping[str, Any] | None = None,
    denoise: bool = False,
    resamples: int = 1,
    jump: int = 10,
) -> StepTable:
    """Builds the table of a named solver with ``steps`` rows, from ``t_start`` down to ``t_end``, or up to it.

    Only solvers without noise run upwards, from where sigma is above 0 to where alpha is, or for ``heun`` and ``rk4``
    between any times at which the velocity is finite.

    Args:
        solver: one of `SOLVERS`.
        sde: the process.
        steps: the number of rows, that is, of network calls.
        t_start: the time to start at, by default that of the prior.
        t_end: the time to end at.
        spacing: how the times lie between the two (`fastsde.solvers.times.spaced`); by default as the process says.
        rho: the exponent of "karras" spacing, by default 7.
        prediction: what the network predicts, one of `PREDICTIONS`.
        clip: the bound of the predicted x_0, for builders that have it.
        eta: the share of the noise, for builders that have it.
        solver_options: any options of the builder, by name.
        denoise: whether the last row gives the data prediction, instead of a step to ``t_end``. No other row changes.
        resamples: how often RePaint comes down each part of the way (`fastsde.solvers.repaint`).
        jump: over how many rows RePaint goes back up.

    Raises:
        ValueError: for an unknown solver, prediction, spacing or option, steps below 1, times out of range or order,
            or an option that the solver does not have.
    """
    entry = find(solver)
    check_process("sde", sde)
    check_int("steps", steps, 1)
    check_bool("denoise", denoise)
    check_prediction(prediction)
    first = sde.t_max if t_start is None else t_start
    _check_ends(sde, first, t_end, denoise)
    options = _options(entry, {"clip": clip, "eta": eta}, solver_options)
    rows = entry.rows_of(options)
    whole = (steps - 1) // rows  # the last interval takes what is left, with ``denoise`` only the row to be replaced
    intervals = whole + 1 if not denoise else -(-(steps - 1) // rows) + 1
    final = 1 if denoise else steps - rows * whole
    if final == rows and entry.corrects_at is not None and not entry.corrects_at(sde, t_end, prediction):
        parity = "an odd number of steps" if rows == 2 else f"a number of steps that {rows} does not divide"
        raise ValueError(
            f"{solver} to t = {t_end:g} with prediction={prediction!r} takes {parity}, since its last interval has no "
            f"row at its end: got steps={steps}, take {steps - 1} or {steps + 1}, or another t_end"
        )
    options |= entry.ending(final)
    times = spaced(sde.spacing if spacing is None else spacing, sde, intervals, first, t_end, rho)
    if entry.is_on_schedule:
        table = entry.builder(sde.alpha(times), sde.sigma(times), times[:-1], prediction, **options)
    else:
        table = entry.builder(sde, times, prediction, **options)
    if not isinstance(table, StepTable) or len(table) < steps - denoise:
        came = f"{len(table)} rows" if isinstance(table, StepTable) else type(table).__name__
        raise TypeError(f"the solver {solver} must return a StepTable of {steps} rows, got {came}")
    table = _denoised(table, sde, prediction, steps - 1) if denoise else table
    if check_int("resamples", resamples, 1) > 1 and not _may_go_up(table):
        names = [name for name in REGISTRY if _may_go_up(build(name, VPSDE(), 5, prediction="eps"))]
        raise ValueError(f"resamples needs rows without history and Langevin steps, not {solver}: {', '.join(names)}")
    return repaint(table, sde, resamples, jump)


def _may_go_up(table: StepTable) -> bool:
    """Returns whether `repaint` takes a table."""
    return table.slots == 1 and not table.has_langevin


def _check_ends(sde: Process, t_start: float, t_end: float, denoise: bool) -> None:
    """Raises unless the two times lie within those of the process, and differ."""
    end = sde.t_max
    check_number("t_start", t_start, f"in [0, {end:g}]", lambda t: 0 <= t <= end)
    expected = f"in [0, {t_start:g})" + (f" or, to run upwards, in ({t_start:g}, {end:g}]" if t_start < end else "")
    check_number("t_end", t_end, expected, lambda t: 0 <= t <= end and t != t_start)
    if denoise and t_end > t_start:
        raise ValueError(f"denoise is for runs down to the data, got t_start={t_start:g} and t_end={t_end:g}")


def _options(entry: Solver, named: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the options of a builder, checked against its signature."""
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"solver_options must be a mapping of names to values, got {type(given).__name__}")
    options = dict(given or {})
    for name, value in options.items():
        if name not in entry.options:
            known = f"its options are {', '.join(entry.options)}" if entry.options else "it has none"
            raise ValueError(f"solver_options[{name!r}] is not an option of {entry.name}: {known}; got {value!r}")
    meaning = {"clip": "bounds a predicted x_0", "eta": "is the share of noise"}
    for name, value in named.items():
        if value is None:
            continue
        if name in options:
            raise ValueError(f"{name} is given twice, as {name}={value!r} and in solver_options")
        if name not in entry.options:
            takers = ", ".join(other.name for other in REGISTRY.values() if name in other.options)
            raise ValueError(f"{name} {meaning[name]}, which {entry.name} does not use; pick {takers}; got {value!r}")
        options[name] = value
    return options


def _denoised(table: StepTable, sde: Process, prediction: str, row: int) -> StepTable:
    """Returns the table up to ``row``, in which the data prediction from the network's input replaces the step."""
    time = table.time[row : row + 1]
    p, q = data_form(sde.alpha(time), sde.sigma(time), prediction)
    if not torch.isfinite(torch.cat((p, q)).float()).all():
        raise ValueError(f"denoise: prediction={prediction!r} does not determine x_0 at t = {float(time):g}")
    clipped = table.clip is not None

    def with_last(name: str, last: Tensor) -> Tensor:
        return torch.cat((getattr(table, name)[:row], last))

    zero, n = torch.zeros_like(table.n[:1]), table.n[row : row + 1]
    A = torch.zeros_like(table.A[:1])
    first = torch.zeros_like(zero)
    first[:, 0] = 1
    if not clipped:
        A[:, 0] = p * n
    return StepTable(
        with_last("time", time),
        n=with_last("n", n),
        p=with_last("p", p * n if clipped else zero),
        q=with_last("q", q if clipped else torch.zeros_like(q)),
        A=with_last("A", A),
        b=with_last("b", zero if clipped else q * first),
        e=with_last("e", first if clipped else zero),
        d=with_last("d", zero),
        snr=with_last("snr", torch.zeros_like(time)),
        eps_max=with_last("eps_max", table.eps_max[row : row + 1]),
        clip=table.clip,
    )
