"""Brownian paths that keep the increments of rejected steps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sde import match_dims

__all__ = ["BrownianPath"]


class BrownianPath:
    """A Brownian path for each sample, backwards in time, drawn as far as its solver has looked ahead.

    If a rejected step simply drew new noise, those with small increments would be accepted more often, and the samples
    biased. So the increment of a rejected step is kept: a shorter step takes its part of it, by a Brownian bridge, and
    the next steps the rest (rejection sampling with memory: Rackauckas & Nie 2017, doi:10.3934/dcdsb.2017133).

    The points ahead at which a path is known are a stack, the next one on top. A step may pass the last of them, with
    new noise for what is beyond; before any other it ends.

    Args:
        x: a state ``[b, *shape]``, for shape, dtype and device.
        remembers: whether increments of rejected steps are kept.
    """

    def __init__(self, x: Tensor, remembers: bool = True) -> None:
        self._remembers = remembers
        self._rows = torch.arange(len(x), device=x.device)
        self._known = torch.zeros_like(self._rows)  # how many points are ahead
        # By height in the stack: the times of the points, and the increment up to each from the one above it.
        self._times = torch.zeros((0, len(x)), dtype=torch.float64, device=x.device)
        self._increments = x.new_zeros((0, *x.shape))

    def end_of_step(self, after: Tensor) -> Tensor:
        """Returns where a step ends that would end at ``after`` ``[b]``."""
        if not len(self._times):
            return after
        return torch.where(self._known > 1, torch.maximum(after, self._next(after)[0]), after)

    def increment(self, t: Tensor, after: Tensor, z: Tensor) -> Tensor:
        """Returns the increments ``[b, *shape]`` from t to ``after``, float64 ``[b]``, for a normal draw z of each."""
        if not len(self._times):
            return match_dims((t - after).sqrt().to(z.dtype), z) * z
        point, to_point = self._next(t)
        share = torch.where(point < t, (t - after) / (t - point), 0.0).clamp_(max=1)
        new = torch.where(after < point, point - after, (t - after) * (1 - share))
        share, std = (match_dims(value.to(z.dtype), z) for value in (share, new.sqrt()))
        return std * z + share * to_point

    def advance(self, t: Tensor, after: Tensor, increment: Tensor, accepted: Tensor) -> None:
        """Moves the accepted samples from t on to ``after``, and keeps the increments of the others."""
        is_kept = ~accepted if self._remembers else torch.zeros_like(accepted)
        depth = len(self._times)
        if not depth and not is_kept.any():
            return
        has_point, point = self._known > 0, self._next(t)[0] if depth else t
        passes, splits = has_point & (after < point), (has_point & (after > point)).nonzero()[:, 0]
        beyond, pushes = (is_kept & passes).nonzero()[:, 0], (is_kept & (after != point) & ~passes).nonzero()[:, 0]
        needed = max((int(self._known[rows].max()) + 1 for rows in (beyond, pushes) if len(rows)), default=0)
        if needed > depth:
            self._times = torch.cat((self._times, torch.zeros_like(t)[None]))
            self._increments = torch.cat((self._increments, torch.zeros_like(increment)[None]))
        top = self._known - 1
        self._increments[top[splits], splits] -= increment[splits]
        if len(beyond):  # what is beyond the last point goes under it
            self._times[1, beyond], self._increments[1, beyond] = self._times[0, beyond], self._increments[0, beyond]
            self._times[0, beyond] = after[beyond]
            self._increments[0, beyond] = increment[beyond] - self._increments[1, beyond]
        self._times[self._known[pushes], pushes] = after[pushes]
        self._increments[self._known[pushes], pushes] = increment[pushes]
        self._known[beyond] += 1
        self._known[pushes] += 1
        self._known -= (accepted & has_point & (after <= point)).long()

    def keep(self, rows: Tensor) -> None:
        """Drops all samples but those at ``rows``."""
        self._known, self._times, self._increments = self._known[rows], self._times[:, rows], self._increments[:, rows]
        self._rows = self._rows[: len(rows)]

    def _next(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the next known point of each sample and the increment up to it; without one, t and anything."""
        top = (self._known - 1).clamp_(min=0)
        return torch.where(self._known > 0, self._times[top, self._rows], t), self._increments[top, self._rows]
