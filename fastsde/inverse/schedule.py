"""What the process and the prediction give at the rows of a table, as Python floats."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from ..sde import Process
from ..solvers import StepTable
from ..solvers.forms import data_form, has_signal, score_form

__all__ = ["Level", "Schedule"]


class Level(NamedTuple):
    """The network's input x at a row: p(x | x_0) = N(alpha x_0, sigma^2 I).

    Attributes:
        alpha: the factor of x_0.
        sigma: the standard deviation of the noise.
        p: of D = p x + q f, the data prediction of the network's output f.
        q: of D = p x + q f.
        per_score: what adding 1 to the score adds to f. It is 0 where alpha is 0 in fp32: there x has no information
            about x_0, and f may not determine the score.
    """

    alpha: float
    sigma: float
    p: float
    q: float
    per_score: float

    @property
    def data_per_score(self) -> float:
        """What adding 1 to the score adds to D."""
        return self.q * self.per_score


@dataclass(frozen=True)
class Schedule:
    """The levels of a named solver's rows.

    Args:
        sde: the process.
        prediction: what the network predicts.
        table: whose rows call the network at times of the process, and whose state after a row is the network's input
            of the next one, up to the scale of the first.
        t_end: the time after the last row.
        ends_with_data: whether the last row gives the data prediction.
        goes_up: whether rows may end at a larger time than they start (`fastsde.solvers.repaint`).
    """

    sde: Process
    prediction: str
    table: StepTable
    t_end: float
    ends_with_data: bool
    goes_up: bool = False

    @cached_property
    def before(self) -> list[Level]:
        """The level of each row's network call.

        Raises:
            ValueError: if the network determines the score or x_0 at one of the times only up to infinite factors.
        """
        time = self.table.time
        alpha, sigma = self.sde.alpha(time), self.sde.sigma(time)
        p, q = data_form(alpha, sigma, self.prediction)
        _, s = score_form(self.sde, time, self.prediction)
        per_score = torch.where(has_signal(alpha, sigma), 1 / s, torch.zeros_like(s))
        columns = torch.stack((alpha, sigma, p, q, per_score), dim=1)
        finite = torch.isfinite(columns.float()).all(dim=1)
        if not finite.all():
            raise ValueError(
                f"a network that predicts {self.prediction} does not determine x_0 at t = {float(time[~finite][0]):g}, "
                f"where alpha is {float(alpha[~finite][0]):g}: start below, by t_start with an x_init of that time"
            )
        return [Level(*row) for row in columns.tolist()]

    @cached_property
    def after(self) -> list[tuple[float, float]]:
        """alpha and sigma of the state after each row: 1 and 0, that is data, at t = 0 or after a data prediction."""
        end = torch.tensor([self.t_end], dtype=torch.float64, device="cpu")
        time = torch.cat((self.table.time[1:], end))
        levels = torch.stack((self.sde.alpha(time), self.sde.sigma(time)), dim=1).tolist()
        if self.ends_with_data or self.t_end == 0:
            levels[-1] = [1.0, 0.0]
        return [(alpha, sigma) for alpha, sigma in levels]
