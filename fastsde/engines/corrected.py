"""The network of a request with corrections, and what they and known values do after each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..inverse import Point, Problem
from ..reference import check_finite, evaluate, guided
from ..request import Request
from .inspection import for_gradients
from .network import Network

__all__ = ["Corrected", "corrected"]


def corrected(
    network: Network, request: Request, normal: Callable[..., Tensor] = ops.normal
) -> tuple[Network | Corrected, Request]:
    """Returns the network and the request for an engine that calls the network once a row and runs the hooks.

    Without corrections these are the given network and, without known values, the given request.

    Args:
        network: one with gradients (`Network.differentiable`) if there are corrections.
        normal: the function that draws noise: `fastsde.ops.normal`, or the reference's.
    """
    problem, keys = request.problem, request.keys
    if problem is None:
        return network, request
    hooks = []
    run: Network | Corrected = network
    if problem.corrections:
        uncond = request.uncond_kwargs
        request = replace(
            request,
            model_kwargs=for_gradients(request.model_kwargs),
            uncond_kwargs=None if uncond is None else for_gradients(uncond),
        )
        run = Corrected(network, request, problem)
        hooks.append(run.after_row)
        request = replace(request, guidance=None, uncond_kwargs=None)
    if problem.mask is not None:
        hooks.append(lambda row, time, x: problem.replaced(row, x, keys, normal))
    return run, replace(request, problem=None, hooks=tuple(hooks))


class Corrected:
    """A network whose output f includes the corrections of the score: f + g / s where score = r x + s f.

    It is called once in each row, in their order; `after_row` then adds what corrections change in the state. Only
    gradients with respect to x are computed, and no graph outlives its row.

    Args:
        request: with the weight and arguments of classifier-free guidance, which is applied here: corrections see the
            guided output.
    """

    def __init__(self, network: Network, request: Request, problem: Problem) -> None:
        self._network, self._problem, self._dtype = network, problem, request.dtype
        self._times = request.table.time.tolist()
        self._request, self._row = request, 0
        other = None if request.guidance is None else request.guidance.network
        self._other = None if other is None else other.differentiable()
        self._change: Tensor | None = None
        self._uses_data = any(each.uses_data for each in problem.corrections)

    @property
    def has_own_threads(self) -> bool:
        """As for `Network`."""
        return self._network.has_own_threads

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        row, schedule = self._row, self._problem.schedule
        self._row, level = row + 1, schedule.before[row]
        with torch.inference_mode(False):  # whose tensors have no gradients; they become normal ones by copying
            leaf, t = x.detach().clone().requires_grad_(), t.clone()
            with torch.set_grad_enabled(self._uses_data):
                f = self._guided(row, leaf, t, kwargs)
                check_finite("the network returned", f.detach(), row, self._times[row])
                data = level.p * leaf + level.q * f
            if self._uses_data and not f.requires_grad:
                raise ValueError(
                    "measurement needs the network's gradient with respect to x, but its output has none: let it run "
                    "without torch.no_grad() and detach()"
                )
            with torch.enable_grad():
                changes = [each(Point(leaf, t, data, level, schedule.after[row])) for each in self._problem.corrections]
        f, states = f.detach(), [change.state for change in changes if change.state is not None]
        for each, change in zip(self._problem.corrections, changes, strict=True):
            for gradient in change:
                if gradient is not None:
                    check_finite(f"the gradient of {each.name} became", gradient, row, self._times[row])
            if change.score is not None:
                f = f + level.per_score * change.score
        self._change = sum(states[1:], states[0]) if states else None
        return f

    def _guided(self, row: int, x: Tensor, t: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Returns the network's output in the dtype of the state."""
        weights, uncond = self._request.guidance, self._request.conditions_of(row)[1]
        f, f_uncond = evaluate(self._network, x, t, kwargs, uncond, self._other)
        if weights is None:
            return f.to(self._dtype)
        return guided(f.to(self._dtype), f_uncond, weights.of_row(row), weights.rescale)

    def after_row(self, row: int, time: float, x: Tensor) -> Tensor | None:
        """Returns the state after the row with the changes of the corrections, or None if there are none."""
        change, self._change = self._change, None
        return None if change is None else x + change
