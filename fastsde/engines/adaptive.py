"""The engine of adaptive solvers, which choose the steps of each sample while they run."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import adaptive, noise, ops
from ..adaptive import AdaptiveProblem
from ..reference import NonFiniteError
from ..request import Request
from ..sde import match_dims
from ..solvers import AdaptiveODE
from .network import Network
from .own_times import Output

__all__ = ["run"]


def run(network: Network, request: Request) -> Tensor:
    """Draws samples by the request's adaptive solver, and counts the calls of the network for each."""
    problem = request.adaptive
    assert problem is not None
    normal = noise.normal if request.dtype == torch.float64 else ops.normal
    x, output = request.start(normal).contiguous(), Output(network, request)
    if isinstance(problem.solver, AdaptiveODE):
        x, calls = _flow(output, x, problem)
    else:
        keys, shape = request.keys, request.shape[1:]

        def draw(samples: Tensor, attempt: int) -> Tensor:
            return normal(keys[samples], attempt + 1, shape).to(request.dtype)

        def drift(x: Tensor, t: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
            r, s, g = problem.reverse(t)
            return _affine(r, x, s, output(x, t, samples)), g

        x, calls = adaptive.simulate(drift, draw, x, problem.t_start, problem.t_end, problem.solver)
    if problem.denoise and len(x):
        x, calls = _denoised(output, x, problem), calls + 1
    if request.recorder is not None:
        request.recorder.count(calls)
    return x


def _flow(output: Output, x: Tensor, problem: AdaptiveProblem) -> tuple[Tensor, Tensor]:
    """Solves the probability flow, whose state `fastsde.adaptive.integrate` takes as ``[B, D]``."""
    assert isinstance(problem.solver, AdaptiveODE)
    shape = x.shape[1:]

    def velocity(t: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        x = y.reshape(len(y), *shape)
        r, s = problem.velocity(t)
        return _affine(r, x, s, output(x, t, samples)).reshape(y.shape)

    start, end = (
        torch.full((len(x),), t, dtype=torch.float64, device=x.device) for t in (problem.t_start, problem.t_end)
    )
    y, calls = adaptive.integrate(velocity, x.reshape(len(x), shape.numel()), start, end, problem.solver)
    return y.reshape(x.shape), calls


def _denoised(output: Output, x: Tensor, problem: AdaptiveProblem) -> Tensor:
    t = torch.full((len(x),), problem.t_end, dtype=torch.float64, device=x.device)
    x = _affine((pq := problem.data(t))[0], x, pq[1], output(x, t, torch.arange(len(x), device=x.device)))
    if not torch.isfinite(x).all():
        raise NonFiniteError(f"the network returned NaN or infinity in the denoising step, at time {problem.t_end:g}")
    return x


def _affine(r: Tensor, x: Tensor, s: Tensor, f: Tensor) -> Tensor:
    """Returns r x + s f for r and s float64 ``[b]``, in new memory."""
    r, s = (match_dims(value.to(x.dtype), x) for value in (r, s))
    return (s * f).addcmul_(r, x)
