"""What an adaptive solver solves: a process backwards in time, by a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..guidance import Guidance
from ..sde import Process
from ..solvers import AdaptiveODE, GottaGoFast, StepTable
from ..solvers.forms import check_prediction, data_form, score_form, velocity_form
from ..validation import check_bool, check_number

__all__ = ["AdaptiveProblem", "AdaptiveSolver", "make_problem"]

AdaptiveSolver = AdaptiveODE | GottaGoFast
"""A solver that chooses the steps of each sample."""


@dataclass(frozen=True)
class AdaptiveProblem:
    """The probability flow (`AdaptiveODE`) or the reverse SDE (`GottaGoFast`) from ``t_start`` down to ``t_end``.

    Args:
        denoise: whether the prediction of x_0 at ``t_end`` is the sample, which takes one more call of the network.

    Raises:
        ValueError: if a coefficient is not finite at either end.
    """

    solver: AdaptiveSolver
    sde: Process
    prediction: str
    t_start: float
    t_end: float
    denoise: bool = False

    def __post_init__(self) -> None:
        for time in (self.t_start, self.t_end):
            t = torch.tensor([time], dtype=torch.float64, device="cpu")
            values = self.velocity(t) if isinstance(self.solver, AdaptiveODE) else self.reverse(t)
            if not torch.isfinite(torch.cat(values).float()).all():
                raise ValueError(
                    f"{type(self.solver).__name__} needs finite coefficients, which the {self.sde.name} process with "
                    f"prediction={self.prediction!r} does not have at t = {time:g}: give another t_start or t_end"
                )

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (r, s) with dx/dt = r x + s f on the probability flow, for the network's output f, at times t."""
        return velocity_form(self.sde, t, self.prediction)

    def reverse(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (r, s, g) with the reverse SDE dx = (r x + s f) dt + g dw, for the network's output f."""
        squared = self.sde.squared_diffusion(t)
        r, s = score_form(self.sde, t, self.prediction)
        return self.sde.drift_coefficient(t) - squared * r, -squared * s, squared.sqrt()

    def data(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (p, q) with x_0 = p x + q f."""
        return data_form(self.sde.alpha(t), self.sde.sigma(t), self.prediction)

    def check_options(self, **options: object) -> None:
        """Raises for an option of a call that needs rows, which all samples have in common."""
        for name, value in options.items():
            if value is not None:
                raise ValueError(f"{name} needs rows, which {type(self.solver).__name__} does not have: leave it out")

    def check_guidance(self, guidance: Guidance) -> None:
        """Raises for guidance that varies along rows, or needs more than its scale."""
        for name, default in (("schedule", None), ("interval", None), ("rescale", 0.0), ("model", None)):
            given = getattr(guidance, name)
            if given is not default and not (name == "rescale" and given == default):
                raise ValueError(f"guidance.{name} needs rows, which {type(self.solver).__name__} does not have")

    def one_call(self) -> StepTable:
        """Returns a table of one row, which calls the network at ``t_start``, to be timed."""
        one = torch.ones(1, dtype=torch.float64, device="cpu")
        return StepTable(self.t_start * one, a=one, b=0 * one)


def make_problem(
    solver: AdaptiveSolver, sde: Process, steps: int, prediction: str, options: Mapping[str, Any]
) -> AdaptiveProblem:
    """Returns the problem that the arguments of `fastsde.Sampler` describe.

    Args:
        options: the options that a table is built from, by name. Without ``t_end`` the problem ends at ``sde.t_min``,
            the smallest time that networks are trained at: below, an extrapolating network may be so steep in t that
            the step size collapses.

    Raises:
        ValueError, TypeError: for an invalid argument, or one that an adaptive solver does not have.
    """
    check_prediction(prediction)
    name = type(solver).__name__
    if steps != 999:
        raise ValueError(f"{name} chooses its own steps by its rtol and atol: leave steps out, got {steps}")
    if options["resamples"] != 1:
        raise ValueError(f"resamples needs rows, which {name} does not have: leave it out")
    for option in ("spacing", "rho", "clip", "eta", "solver_options"):
        if options[option] is not None:
            raise ValueError(f"{option} is an option of tables, not of {name}: leave it out, got {options[option]!r}")
    t_start = sde.t_max if options["t_start"] is None else options["t_start"]
    check_number("t_start", t_start, f"in (0, {sde.t_max:g}]", lambda t: 0 < t <= sde.t_max)
    t_end = min(sde.t_min, t_start / 2) if options["t_end"] is None else options["t_end"]
    check_number("t_end", t_end, f"in [0, {t_start:g})", lambda t: 0 <= t < t_start)
    return AdaptiveProblem(solver, sde, prediction, t_start, t_end, check_bool("denoise", options["denoise"]))
