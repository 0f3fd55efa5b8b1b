"""Pseudoinverse-guided diffusion: the score of a Gaussian approximation of the measurement's likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..notices import warn_once
from ..sde import match_dims
from ..validation import check_int, check_number
from .correction import Change, Point
from .measurement import Measurement

__all__ = ["PiGDM", "conjugate_gradient"]

# How far H D may be moved along y - H D, in lengths of that. At 1 reconstructions of digits are worse, at 16 the same
# as without a limit.
_MOST = 10.0


@dataclass(frozen=True, eq=False)
class PiGDM(Measurement):
    """Pseudoinverse-guided diffusion (Song et al. 2023, "Pseudoinverse-Guided Diffusion Models for Inverse Problems",
    ICLR), as a term of the score.

    Given x_t, the data are taken to be N(D, r^2 I) around the data prediction D, so that the score gains

        J^T H^T (r^2 H H^T + noise_std^2 I)^-1 (y - operator(D)),    r^2 = sigma^2 s^2 / (alpha^2 s^2 + sigma^2)

    with J the Jacobian of D and H that of the operator at D: exact for data N(0, s^2 I) and a linear operator. The
    inverse is applied by conjugate gradients, which need the derivatives of the operator alone. Where alpha is 0 in
    fp32, so that x_t has no information about the data, nothing is added.

    Beyond the paper, the term is left out where it would move H D away from y, and scaled down where it would move it
    further than ten times y - H D. The exact term does neither, and this one not for Gaussian data. But J contains the
    network's error divided by alpha, and the spread of the data given x_t, which between two modes is far larger than
    r: without the limits some trajectories diverge.

    Args:
        operator: as for `Measurement`; one that is not linear is linearised in each row, and must be twice
            differentiable by PyTorch.
        y: the measurement, ``[n, ...]``, or ``[...]`` for all samples.
        noise_std: the standard deviation of the noise in y. Without noise, H H^T should be regular, or y be a value
            that the operator can take: for a blur, give more than 0.
        data_std: s, the standard deviation of the data. The paper's is 1.
        iterations: the most steps of conjugate gradients a row; a warning tells if they do not suffice.
        tolerance: how far they are to reduce the residual. Each step differentiates the operator twice; blurred digits
            come out the same with any tolerance up to 0.1.

    Raises:
        TypeError, ValueError: for an invalid argument; the message names it.
    """

    noise_std: float = 0.0
    data_std: float = 1.0
    iterations: int = 50
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("noise_std", self.noise_std, "at least 0 and finite", lambda std: 0 <= std < math.inf)
        check_number("data_std", self.data_std, "positive and finite", lambda std: 0 < std < math.inf)
        check_int("iterations", self.iterations, 1)
        check_number("tolerance", self.tolerance, "in [0, 1)", lambda tolerance: 0 <= tolerance < 1)

    def __call__(self, point: Point) -> Change:
        alpha, sigma = point.level.alpha, point.level.sigma
        variance = (sigma * self.data_std) ** 2 / math.hypot(alpha * self.data_std, sigma) ** 2
        data = point.data.detach().requires_grad_()
        measured, residual = self.residual(data)
        # H^T w is linear in w, so its derivative with respect to w, transposed, is H.
        w = torch.zeros_like(measured, requires_grad=True)
        (back,) = torch.autograd.grad(measured, data, w, create_graph=True)
        if not back.requires_grad:
            raise ValueError("operator must be twice differentiable for PiGDM, but its gradient is a constant, as of 0")

        def covariance(u: Tensor) -> Tensor:
            (transposed,) = torch.autograd.grad(measured, data, u, retain_graph=True)
            (both,) = torch.autograd.grad(back, w, transposed, retain_graph=True)
            return variance * both + self.noise_std**2 * u

        residual = residual.detach()
        weights, is_solved = conjugate_gradient(covariance, residual, self.iterations, self.tolerance)
        if not is_solved:
            warn_once(
                f"PiGDM did not solve its linear system in {self.iterations} iterations, and its samples may not meet "
                f"y: give noise_std above 0 (got {self.noise_std:g}), or more iterations"
            )
        (towards,) = torch.autograd.grad(measured, data, weights, retain_graph=True)
        (score,) = torch.autograd.grad(point.data, point.x, towards)
        (reach,) = torch.autograd.grad(back, w, point.level.data_per_score * score)
        ratio = dot(reach, residual) / dot(residual, residual)
        factor = torch.where(ratio > 0, (_MOST / ratio).clamp(max=1), 0)
        return Change(score=match_dims(factor, score) * score)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Returns the inner product of each sample, ``[B]``."""
    return (a * b).reshape(len(a), -1).sum(dim=1)


def conjugate_gradient(
    matrix: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, bool]:
    """Solves matrix(u) = b for each sample ``[B, ...]``, for symmetric positive semidefinite matrices.

    (Hestenes & Stiefel 1952.) A sample is done when its residual is ``tolerance`` times as long as b (or 32 roundings),
    after ``iterations``, or where a direction has no curvature left; it then no longer changes, so that it does not
    depend on the others.

    Returns:
        u, and whether no sample has more than a tenth of b left.
    """

    u, rest, direction = 0 * b, b.clone(), b.clone()  # NaN where b is
    start = square = dot(rest, rest)
    least = start * max(tolerance, 32 * torch.finfo(b.dtype).eps) ** 2
    is_active = square > least
    for _ in range(iterations):
        if not is_active.any():
            break
        image = matrix(direction)
        curvature = dot(direction, image)
        is_active = is_active & (curvature > 0)
        step = match_dims(torch.where(is_active, square / torch.where(is_active, curvature, 1), 0), b)
        u, rest = u + step * direction, rest - step * image
        reached = torch.where(is_active, dot(rest, rest), square)
        direction = rest + match_dims(reached / torch.where(is_active, square, 1), b) * direction
        square, is_active = reached, is_active & (reached > least)
    return u, not bool((is_active & (square > 1e-2 * start)).any())
