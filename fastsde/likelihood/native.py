"""The divergence of small networks on the CPU by the native kernel of whole trajectories.

A network that is lowered to a program (`fastsde.lowering`) becomes one that computes its divergence too, with x and
log p as the state. A Runge-Kutta table is then one launch; adaptive steps are launches of one row, in which each sample
has a time of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..engines.programs import numbers_of
from ..lowering import Vectors, WithDivergence, with_divergence
from ..models.hooks import has_gradient_hooks, is_hooked
from ..request import Request
from ..solvers import StepTable
from .divergence import Divergence

__all__ = ["NativeDivergence", "integrate"]

_DIRECTIONS = 32  # that a program has instructions for
_TIMES = 8  # at which a program is compared with its network


def integrate(
    divergence: Divergence,
    table: StepTable,
    rates: tuple[Tensor, Tensor],
    x: Tensor,
    kwargs: Mapping[str, Any],
    progress: Callable[[int], object],
) -> tuple[Tensor, Tensor] | None:
    """Integrates the flow by a Runge-Kutta table in one launch.

    Args:
        table: of the network's output f.
        rates: r and s of the rows, float64 ``[K]``, where the velocity is r x + s f.
        x: the samples ``[B, *shape]``.
        progress: called with the number of rows done since the last time.

    Returns:
        The state at the end ``[B, *shape]`` and the integral of s div f, float64 ``[B]``; or None if the network does
        not run natively, or something is not finite: the usual way then gives the row and the time.
    """
    r, s = rates
    if not bool((s != 0).all()):
        return None
    found = _numbers(divergence, table, x, kwargs, False)
    if found is None:
        return None
    joint, vectors = found
    y = torch.cat((x.flatten(1), x.new_zeros(len(x), 1)), 1)
    numbers = joint.vectors(vectors, divergence.signs, rates)
    keys = divergence.keys  # nothing is drawn
    packed = ops.pack_program(joint.program, x.device)
    y = ops.launch_mlp_sampler(packed, _of_velocities(table, r, s), keys, vectors=numbers, x_init=y, progress=progress)
    if not torch.isfinite(y).all():
        return None
    return y[:, :-1].reshape(x.shape), y[:, -1].double()


class NativeDivergence:
    """A network's output with its divergence, at a time of each sample."""

    def __init__(self, divergence: Divergence, joint: WithDivergence, vectors: Vectors) -> None:
        self._keys = divergence.keys
        self._packed = ops.pack_program(joint.program, divergence.keys.device)
        self._vectors = joint.vectors(vectors, divergence.signs)
        one = torch.ones(1, dtype=torch.float64, device="cpu")
        self._table = StepTable(one, a=0 * one, b=one)  # the next state is the output
        self._samples: Tensor | None = None
        self._now = self._vectors

    @classmethod
    def find(
        cls, divergence: Divergence, x: Tensor, kwargs: Mapping[str, Any], interval: tuple[float, float]
    ) -> NativeDivergence | None:
        """Returns the native form of a divergence, or None if the network has none.

        Args:
            interval: of the times.
        """
        times = torch.linspace(*interval, _TIMES, dtype=torch.float64, device="cpu")
        found = _numbers(divergence, StepTable(times, a=0 * times, b=0 * times + 1), x, kwargs, True)
        return None if found is None else cls(divergence, *found)

    def __call__(self, x: Tensor, t: Tensor, samples: Tensor) -> Tensor:
        """Returns f and its divergence side by side, ``[b, d + 1]``, with the conditions that it was found with.

        Args:
            x, t: fp32 ``[b, d]``, with flattened samples, and ``[b]``.
            samples: the indices int64 ``[b]`` of the samples.
        """
        if samples is not self._samples:
            self._samples, self._now = samples, replace(self._vectors, given=self._vectors.given[samples])
        y = x.new_empty(len(x), x.shape[1] + 1)
        y[:, :-1], y[:, -1] = x, t
        keys = self._keys[: len(x)]  # nothing is drawn
        return ops.launch_mlp_sampler(self._packed, self._table, keys, vectors=self._now, x_init=y)


def _numbers(
    divergence: Divergence, table: StepTable, x: Tensor, kwargs: Mapping[str, Any], time_is_input: bool
) -> tuple[WithDivergence, Vectors] | None:
    """Returns the program of a network with its divergence, and the numbers of that without."""
    network, probes, dim = divergence.network, divergence.probes, divergence.elements
    if not divergence.may_be_native or network.dtype != torch.float32 or not ops.has_native(network.device):
        return None
    if not isinstance(network.model, nn.Module) or isinstance(network.model, torch.jit.ScriptModule) or not len(x):
        return None
    largest, most = ops.mlp_limits(network.device)
    if not dim or (probes or dim) > _DIRECTIONS or dim >= largest:
        return None
    if is_hooked(network.model) or has_gradient_hooks(network.model):
        return None
    request = Request(tuple(x.shape), table, divergence.keys, model_kwargs=kwargs)
    try:
        with torch.inference_mode(False):
            packed, vectors = numbers_of(network, request, time_is_input)
    except Exception:  # there is no program, or the network raises, as it then does in the usual way
        return None
    counts = len(vectors.constants), len(vectors.matrices)
    joint = with_divergence(packed.program, dim, probes, not time_is_input, *counts)
    return (joint, vectors) if max(joint.program.widths) <= most else None


def _of_velocities(table: StepTable, r: Tensor, s: Tensor) -> StepTable:
    """Returns a table of a network's output f as one of the velocity v = r n.s + s f, by f = (v - r n.s) / s."""
    b, q = table.b / s[:, None], table.q / s
    A = table.A - (r[:, None] * b)[:, :, None] * table.n[:, None, :]
    p = table.p - (r * q)[:, None] * table.n
    return StepTable(table.time, A=A, b=b, n=table.n, p=p, q=q, e=table.e)
