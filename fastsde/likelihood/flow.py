"""The probability-flow ODE with its divergence, integrated upwards from samples to the prior: their log density."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import adaptive, reference, solvers
from ..adaptive import AdaptiveProblem
from ..conditions import rows_of
from ..engines.eager import FiniteCheck
from ..sde import Process
from ..solvers import AdaptiveODE, StepTable
from ..solvers.forms import check_prediction, velocity_form
from ..validation import check_number
from . import native
from .divergence import Divergence

__all__ = ["AdaptiveFlow", "TableFlow", "make_flow"]

STEPS, SPACING = 100, "log_snr"


@dataclass(frozen=True)
class TableFlow:
    """The flow by a Runge-Kutta table from data to noise, whose weights integrate the divergence too.

    Args:
        weights: of the velocity in each row, with the length of the interval in it.
    """

    sde: Process
    prediction: str
    table: StepTable
    weights: tuple[float, ...]

    @property
    def calls(self) -> int:
        """How often the bar of a batch is advanced."""
        return len(self.table)

    def log_prob(self, x: Tensor, divergence: Divergence, kwargs: Mapping[str, Any], bar: tqdm[Any]) -> Tensor:
        """Returns the log density float64 ``[B]`` of samples ``[B, *shape]``."""
        table, rates = self.table, velocity_form(self.sde, self.table.time, self.prediction)
        r, s = (each.tolist() for each in rates)
        found = native.integrate(divergence, table, rates, x, kwargs, bar.update)
        if found is not None:
            end, change = found
            change += divergence.elements * sum(weight * each for weight, each in zip(self.weights, r, strict=True))
            return self.sde.prior_logp(end.double()) + change
        finite = FiniteCheck(table.time.tolist(), x.device)
        change = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        slots = [x, *(torch.zeros_like(x) for _ in range(1, table.slots))]
        for row, weight in enumerate(self.weights):
            t = torch.full((len(x),), table.row(row).time, dtype=x.dtype, device=x.device)
            f, trace = divergence(reference.network_input(slots, table, row), t, kwargs)
            finite("the network returned", f, row)
            change += weight * (r[row] * divergence.elements + s[row] * trace)
            slots = list(reference.solver_step(slots, f, table, row))
            finite("the state became", slots[0], row)
            bar.update()
        finite.finish()
        return self.sde.prior_logp(slots[0].double()) + change


@dataclass(frozen=True)
class AdaptiveFlow:
    """The flow with steps of each sample's own, in which log p is one more element of the state."""

    problem: AdaptiveProblem
    calls: int = field(default=1, init=False)

    def log_prob(self, x: Tensor, divergence: Divergence, kwargs: Mapping[str, Any], bar: tqdm[Any]) -> Tensor:
        """As for `TableFlow`."""
        problem, shape = self.problem, x.shape[1:]
        assert isinstance(problem.solver, AdaptiveODE)
        ends = (problem.t_start, problem.t_end)
        by_program = native.NativeDivergence.find(divergence, x, kwargs, ends)

        def by_autograd(x: Tensor, t: Tensor, samples: Tensor) -> Tensor:
            f, trace = divergence(x.reshape(len(x), *shape), t, rows_of(kwargs, samples), samples)
            return torch.cat((_flat(f), trace[:, None].to(f.dtype)), dim=1)

        output = by_program or by_autograd

        def velocity(t: Tensor, y: Tensor, samples: Tensor) -> Tensor:
            r, s = (each.to(y.dtype)[:, None] for each in problem.velocity(t))
            v = output(y[:, :-1], t.to(y.dtype), samples).mul_(s)
            v[:, :-1].addcmul_(r, y[:, :-1])
            v[:, -1:].add_(r, alpha=divergence.elements)
            return v

        start, end = (torch.full((len(x),), t, dtype=torch.float64, device=x.device) for t in ends)
        y = torch.cat((_flat(x), x.new_zeros(len(x), 1)), dim=1)
        y, _ = adaptive.integrate(velocity, y, start, end, problem.solver)
        bar.update()
        return problem.sde.prior_logp(y[:, :-1].double()) + y[:, -1].double()


def _flat(x: Tensor) -> Tensor:
    """Returns ``[B, D]`` for ``[B, *shape]``."""
    return x[:, None].flatten(1)


def make_flow(
    sde: Process,
    prediction: str,
    solver: str | AdaptiveODE,
    steps: int | None,
    t_start: float | None,
    spacing: str | None,
    rho: float | None,
) -> TableFlow | AdaptiveFlow:
    """Returns the flow that the arguments of `fastsde.log_prob` describe.

    Raises:
        ValueError, TypeError: for an invalid argument, or a solver that is no Runge-Kutta method.
    """
    check_prediction(prediction)
    first = sde.t_min if t_start is None else t_start
    check_number("t_start", first, f"in [0, {sde.t_max:g})", lambda t: 0 <= t < sde.t_max)
    if isinstance(solver, AdaptiveODE):
        for name, value in (("steps", steps), ("spacing", spacing), ("rho", rho)):
            if value is not None:
                raise ValueError(f"{name} must be None with AdaptiveODE, which chooses its own steps, got {value!r}")
        return AdaptiveFlow(AdaptiveProblem(solver, sde, prediction, first, sde.t_max))
    if not isinstance(solver, str):
        raise TypeError(f"solver must be a name or an AdaptiveODE, got {type(solver).__name__}")
    known = [entry.name for entry in solvers.REGISTRY.values() if entry.weights is not None]
    if solver not in known:
        raise ValueError(f"solver must be one of {', '.join(known)}, or an AdaptiveODE, got {solver!r}")
    if spacing is None and rho is None:
        spacing = SPACING
    rows = STEPS if steps is None else steps
    table = solvers.build(
        solver, sde, rows, t_start=first, t_end=sde.t_max, spacing=spacing, rho=rho, prediction=prediction
    )
    return TableFlow(sde, prediction, table, _weights(solver, table, sde.t_max))


def _weights(solver: str, table: StepTable, t_end: float) -> tuple[float, ...]:
    """Returns the weight of each row's velocity in the integral over time."""
    entry = solvers.REGISTRY[solver]
    assert entry.weights is not None
    rows = entry.rows_of({})
    times = [*table.time[::rows].tolist(), t_end]
    found = list[float]()
    for start, end in pairwise(times):
        found += [(end - start) * weight for weight in entry.weights[min(rows, len(table) - len(found))]]
    return tuple(found)
