"""Training times drawn by importance: more often where the loss is large and varies."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import distributed, noise
from ..objective import Objective

__all__ = ["ImportanceTimes"]

_BINS = 64
_KEPT = 0.99  # of a bin's mean in each step that visits it
_FIRST = 10  # visits of each bin before times are drawn by importance
_UNIFORM = 1e-3  # the share of times that stay uniform


class ImportanceTimes:
    """Draws times with a density proportional to sqrt(E[loss^2]), and weights the loss by the inverse (Nichol &
    Dhariwal 2021, arXiv:2102.09672, section 3.3).

    Times are binned evenly. A bin's E[loss^2] is a moving average over the steps that visited it, and times are uniform
    until each has been visited ten times. The expected gradient is that of uniform times. The average is part of a
    run's state.

    Args:
        objective: what the network learns, with times on [t_min, t_max].
        device: where the steps run.
    """

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self._objective = objective
        self.moments = torch.zeros(_BINS, dtype=torch.float64, device=device)
        self.visits = torch.zeros(_BINS, dtype=torch.int64, device=device)
        self._sums = torch.zeros((2, _BINS), dtype=torch.float64, device=device)
        self._place = self._weight = torch.empty(0, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the state by name; its tensors may be written to."""
        return {"moments": self.moments, "visits": self.visits}

    def probabilities(self) -> Tensor:
        """Returns the probability of each bin, float64 ``[bins]``."""
        roots = self.moments.sqrt()
        weighted = roots / roots.sum().clamp(min=1e-300) * (1 - _UNIFORM) + _UNIFORM / _BINS
        uniform = torch.full_like(roots, 1 / _BINS)
        return torch.where((self.visits >= _FIRST).all() & (roots.sum() > 0), weighted, uniform)

    def coefficients(self, keys: Tensor, step: int | Tensor) -> Tensor:
        """Draws the times of a step, and returns their coefficients fp32 ``[B, 6]``, weighted.

        Args:
            keys: of the samples of this process.
            step: the step, or an int64 tensor ``[1]`` on the device.
        """
        u = noise.uniform(keys, step, (), noise.STREAM_TRAINING_TIME).reshape(-1).double()
        p = self.probabilities()
        edges = p.cumsum(0)
        place = torch.searchsorted(edges, u, right=True).clamp(max=_BINS - 1)
        within = ((u - (edges - p)[place]) / p[place]).clamp(0, 1)
        low, high = self._objective.t_min, self._objective.last_time
        t = (low + (place + within) / _BINS * (high - low)).clamp(low, high)
        table = self._objective.table(t, torch.float64)
        self._place, self._weight, self._taken = place, 1 / (_BINS * p[place]), 0
        table[:, 3:] *= self._weight.sqrt()[:, None]
        return table.float()

    def add(self, losses: Tensor) -> None:
        """Adds the weighted losses of the next samples of the step, ``[b]``."""
        rows = slice(self._taken, self._taken + len(losses))
        place, plain = self._place[rows], losses.double() / self._weight[rows]
        self._sums[0].index_add_(0, place, plain.square())
        self._sums[1].index_add_(0, place, torch.ones_like(plain))
        self._taken = rows.stop

    def move(self) -> None:
        """Moves the averages, once all samples of the step have been added."""
        distributed.sum_over_ranks(self._sums)
        squares, counts = self._sums
        visited = counts > 0
        mean = squares / counts.clamp(min=1)
        kept = torch.where(self.visits > 0, _KEPT, 0.0)
        self.moments.copy_(torch.where(visited, kept * self.moments + (1 - kept) * mean, self.moments))
        self.visits += visited
        self._sums.zero_()
