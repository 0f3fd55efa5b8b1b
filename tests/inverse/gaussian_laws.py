"""Gaussian data N(mean, cov), whose score is known at all times, and the exact law of what a one-slot table draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastsde import StepTable
from fastsde.sde import Process


class Law(NamedTuple):
    """A Gaussian on d coordinates, float64."""

    mean: Tensor
    cov: Tensor

    def at(self, sde: Process, t: float) -> tuple[Tensor, Tensor]:
        """Returns (slope, c) with score = slope x + c at a time."""
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        inverse = torch.linalg.inv(alpha**2 * self.cov + sigma**2 * torch.eye(len(self.mean)).double())
        return -inverse, inverse @ (alpha * self.mean)

    def given(self, h: Tensor, y: Tensor, noise_std: float) -> Law:
        """Returns the posterior of y = h x + noise."""
        gain = self.cov @ h.T @ torch.linalg.inv(h @ self.cov @ h.T + noise_std**2 * torch.eye(len(h)).double())
        return Law(self.mean + gain @ (y - h @ self.mean), self.cov - gain @ h @ self.cov)


def network(law: Law, sde: Process, prediction: str = "score") -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the exact network of Gaussian data: ``(x [B, d], t [B]) -> [B, d]``, for one time a call."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = float(sde.alpha(float(t[0]))), float(sde.sigma(float(t[0])))
        slope, c = law.at(sde, float(t[0]))
        if prediction == "score":
            return x @ slope.T.to(x) + c.to(x)
        gain = -alpha * slope @ law.cov  # E[x_0 | x_t] = mean + gain (x_t - alpha mean); also at alpha = 0
        data = law.mean.to(x) + (x - alpha * law.mean.to(x)) @ gain.to(x)
        eps = (x - alpha * data) / sigma
        return {"eps": eps, "x0": data, "v": alpha * eps - sigma * data, "flow": eps - data}[prediction]

    return model


def row_of(table: StepTable, row: int, law: Law, state: Law, sde: Process) -> Law:
    """Returns the law after one row of a one-slot table for the score network of ``law``."""
    k = table.row(row)
    slope, c = law.at(sde, k.time)
    eye = torch.eye(len(c)).double()
    step = k.A[0][0] * eye + k.b[0] * slope
    return Law(step @ state.mean + k.b[0] * c, step @ state.cov @ step.T + k.d[0] ** 2 * eye)


def with_known(state: Law, mask: Tensor, known: Tensor, alpha: float, sigma: float) -> Law:
    """Returns the law after the coordinates in the mask have become alpha known + sigma z, independently."""
    mean, cov = torch.where(mask, alpha * known, state.mean), state.cov.clone()
    cov[mask] = 0
    cov[:, mask] = 0
    return Law(mean, cov + sigma**2 * torch.diag(mask.double()))


def prior(d: int) -> Law:
    return Law(torch.zeros(d).double(), torch.eye(d).double())
