"""Diffusion posterior sampling: a gradient step on the misfit after each row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..validation import check_number
from .correction import Change, Point
from .measurement import Measurement

__all__ = ["DPS"]


@dataclass(frozen=True, eq=False)
class DPS(Measurement):
    """Diffusion posterior sampling (Chung et al. 2023, arXiv:2209.14687, algorithm 1).

    After each row, with D the network's data prediction at the row's x:

        x' <- x' - scale grad_x |y - operator(D(x))|

    The norm is Euclidean, of each sample. The paper writes the step as zeta_i grad |.|^2 with zeta_i = zeta' / |.|,
    which is this with scale = 2 zeta'; its authors' code has this form. Its steps are those of the variance-preserving
    process: on another one, x / sqrt(alpha^2 + sigma^2) takes that step. The steps have about the length ``scale``
    however long the row and however small the misfit is: fewer rows need a larger scale, which meets y less closely,
    and it must be small beside the norm of a sample, or the trajectory diverges. 1 suits digits of 784 pixels and some
    hundred rows; 0.02 points in the plane and a thousand. Even for Gaussian data, samples are not those of the
    posterior: what is not measured follows y too far.

    Args:
        operator: as for `Measurement`; it need not be linear.
        y: the measurement, ``[n, ...]``, or ``[...]`` for all samples.
        scale: the length of the steps.

    Raises:
        TypeError, ValueError: for an invalid argument; the message names it.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scale", self.scale, "at least 0 and finite", lambda scale: 0 <= scale < math.inf)

    def __call__(self, point: Point) -> Change:
        _, residual = self.residual(point.data)
        misfit = torch.linalg.vector_norm(residual.reshape(len(residual), -1), dim=1)
        (gradient,) = torch.autograd.grad(misfit.sum(), point.x)
        norm = math.hypot(point.level.alpha, point.level.sigma) * math.hypot(*point.after)
        return Change(state=-self.scale * norm * gradient)
