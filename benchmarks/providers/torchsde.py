"""torchsde's ``sdeint`` with the same network and the Euler method.

The Brownian motion is a `BrownianInterval` that is given the step size, the fastest choice: 1.5 times as fast as the
default for a thousand points and 999 rows, and 16 times for 100 rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..suite.case import imported
from ..suite.measure import Figures
from ..tasks.trajectory import Proof, Score, Trajectory
from .tutorial import beta_at

_LONGER = 1 + 1e-9  # without it, 999 steps of 1/999 add up to less than 1 in float64, and a tiny one follows


class ReverseSDE(nn.Module):
    """The reverse SDE of a state ``[B, d]``, with s = 1 - t from 0 to 1."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, score: Score, task: Trajectory) -> None:
        super().__init__()
        self._score, self._task = score, task

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        t, row = (1 - s).float(), min(round(float(s) * self._task.rows), self._task.rows - 1)
        beta = beta_at(t)
        x = y.view(self._task.shape)
        score = self._score.row(row, x, t.expand(self._task.n))
        return (0.5 * beta * x + beta * score).flatten(1)

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        return beta_at((1 - s).float()).sqrt().expand_as(y)


class Sdeint:
    """Calls ``sdeint``. For the check, its Brownian motion is replaced by independent normals."""

    def __init__(self, task: Trajectory, precision: str, package: Any) -> None:
        times = torch.linspace(1, 0, task.rows + 1, dtype=torch.float64)[:-1]
        self._task, self._precision, self._package = task, precision, package
        self._sde = ReverseSDE(Score(task.network(precision), task.checkpoint, times), task)
        self.motion = partial(package.BrownianInterval, 0.0, 1.0, device=task.device, dt=1 / task.rows)

    def __call__(self) -> Tensor:
        task = self._task
        with torch.no_grad(), task.precision_of_products(self._precision):
            y = torch.randn(task.shape, device=task.device).flatten(1)
            ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=task.device)
            motion = self.motion(size=y.shape)
            x: Tensor = self._package.sdeint(self._sde, y, ends, dt=_LONGER / task.rows, method="euler", bm=motion)[-1]
        return x.view(task.shape)

    def prove(self, proof: Proof, precision: str, x: Tensor) -> Figures:
        proof.check_samples(x)
        motion, self.motion = self.motion, Increments
        try:
            return proof.given_noise(precision, self, x)
        finally:
            self.motion = motion


class Increments:
    """A Brownian motion for ``sdeint`` whose increments are independent draws of ``torch.randn``."""

    levy_area_approximation = "none"

    def __init__(self, size: tuple[int, ...]) -> None:
        self.shape = size

    def __call__(self, start: Tensor, end: Tensor) -> Tensor:
        return torch.randn(self.shape, device=end.device) * float(end - start) ** 0.5


def sdeint(task: Trajectory, precision: str) -> Sdeint:
    return Sdeint(task, precision, imported("torchsde", "clients"))


def prove(proof: Proof, precision: str, run: Sdeint, x: Tensor) -> Figures:
    return run.prove(proof, precision, x)
