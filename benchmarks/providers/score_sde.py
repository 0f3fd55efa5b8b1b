"""score_sde's black-box ODE solver, in our own words (Song et al. 2021, arXiv:2011.13456, appendix D.2).

SciPy's RK45 takes the whole batch for one long vector in float64: all samples share their steps, and each call of the
network converts the state from NumPy and back. The likelihood adds log p to the vector, with Hutchinson's estimate of
the divergence by a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsde.solvers.forms import velocity_form

from ..suite.case import imported
from ..suite.measure import Figures
from ..tasks.flow import Flow

__all__ = ["Likelihood", "Sampling"]


def _velocity(task: Flow) -> Callable[[Tensor, float], Tensor]:
    """Returns dx/dt of the probability flow at (x, t)."""
    checkpoint, given = task.checkpoint, task.conditions

    def velocity(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        time = torch.tensor(t, dtype=torch.float64)
        r, s = (float(each) for each in velocity_form(checkpoint.sde, time, checkpoint.prediction))
        return r * x + s * checkpoint.model(x, times, **given)

    return velocity


class _Solver:
    """Solves an ODE of a long vector, and counts the evaluations."""

    def __init__(self, task: Flow) -> None:
        self.task, self.evaluations = task, 0
        self._solve_ivp = imported("scipy.integrate", "engines").solve_ivp

    def calls(self) -> Figures:
        """Returns the network's calls in the last run, for JSON."""
        return {"network_calls": self.evaluations, "evaluations": self.evaluations * self.task.n}

    def _solve(self, rate: Callable[[float, Any], Any], start: Tensor, interval: tuple[float, float]) -> Tensor:
        tolerance = self.task.tolerance
        found = self._solve_ivp(
            rate, interval, start.double().cpu().numpy(), rtol=tolerance, atol=tolerance, method="RK45"
        )
        self.evaluations = found.nfev
        return torch.from_numpy(found.y[:, -1])


class Sampling(_Solver):
    """From noise down to data."""

    def __call__(self) -> Tensor:
        task, velocity, shape = self.task, _velocity(self.task), self.task.prior.shape
        sde = task.checkpoint.sde

        @torch.no_grad()
        def rate(t: float, vector: Any) -> Any:
            x = torch.from_numpy(vector.reshape(shape)).to(task.device, task.dtype)
            return velocity(x, t).double().cpu().numpy().reshape(-1)

        return self._solve(rate, task.prior.flatten(), (sde.t_max, sde.t_min)).reshape(shape)


class Likelihood(_Solver):
    """From data up to noise, with log p."""

    def __call__(self) -> Tensor:
        task, velocity, shape = self.task, _velocity(self.task), self.task.data.shape
        sde, size, signs = task.checkpoint.sde, task.data.numel(), self.task.signs.to(task.dtype)

        def rate(t: float, vector: Any) -> Any:
            with torch.enable_grad():
                x = torch.from_numpy(vector[:size].reshape(shape)).to(task.device, task.dtype).requires_grad_()
                v = velocity(x, t)
                (product,) = torch.autograd.grad((v * signs).sum(), x)
            divergence = (product * signs).flatten(1).sum(1)
            return torch.cat((v.detach().flatten(), divergence)).double().cpu().numpy()

        start = torch.cat((task.data.flatten(), task.data.new_zeros(task.n)))
        end = self._solve(rate, start, (sde.t_min, sde.t_max))
        return sde.prior_logp(end[:size].reshape(shape)) + end[size:]
