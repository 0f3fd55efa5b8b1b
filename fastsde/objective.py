"""The training objective as a table: six numbers per sample, whatever the process, prediction and weighting.

A training step on data x_0, noise z and time t is

    x_in = u_x x_0 + u_z z,    f = model(x_in, tau),    loss = mean (w_f f + w_x x_0 + w_z z)^2

with ``tau, u_x, u_z, w_f, w_x, w_z`` functions of t only. An `Objective` computes them in float64; the kernels for
noising, the loss and training read nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .interpolation import Interpolation, interpolate
from .sde import VPSDE, Process, check_process
from .validation import check_number
from .vocabulary import PRECONDITIONINGS, TIMES, WEIGHTINGS

__all__ = ["Coefficients", "Objective"]


class Coefficients(NamedTuple):
    """The six numbers of each sample, in the order of a table's columns; all have the same shape.

    Attributes:
        tau: the network's time.
        u_x: the weight of the data in the network's input.
        u_z: the weight of the noise in the network's input.
        w_f: the weight of the network's output in the residual.
        w_x: the weight of the data in the residual.
        w_z: the weight of the noise in the residual.
    """

    tau: Tensor
    u_x: Tensor
    u_z: Tensor
    w_f: Tensor
    w_x: Tensor
    w_z: Tensor


@dataclass(frozen=True)
class Objective:
    """Denoising score matching of a process (Vincent 2011; Song et al. 2021, arXiv:2011.13456, eq. 7).

    Args:
        sde: the process.
        prediction: what the network outputs: "score", "eps" (arXiv:2006.11239), "x0", "v" = alpha eps - sigma x_0
            (arXiv:2202.00512) or "flow" = eps - x_0, the velocity of flow matching (arXiv:2210.02747, 2209.03003).
        weighting: the weight of the score's squared error: "sigma2", lambda = sigma^2, whatever the prediction;
            "likelihood", lambda = g^2 (arXiv:2101.09258, eq. 7); or "target", the plain squared error of the network's
            output against its own target.
        preconditioning: "none", or "edm" for D = c_skip x + c_out f(c_in x, c_noise), which predicts x_0 (Karras et
            al. 2022, arXiv:2206.00364, table 1; applied to x_t / alpha and sigma / alpha where alpha is not 1). That
            paper's loss weight, 1 / c_out^2, is the weighting "target".
        sigma_data: the standard deviation of the data that "edm" scales by.
        times: how training times are drawn: "uniform" on [t_min, t_max], or "lognormal", ln t ~ N(time_mean,
            time_std^2) clamped to these bounds, which for the process of EDM is its distribution of sigma.
        t_min: the smallest time.
        t_max: the largest time, by default that of the process.
        time_mean: the mean of ln t for "lognormal" times.
        time_std: the standard deviation of ln t for "lognormal" times.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, an unknown name, or a value out of range.
    """

    sde: Process = field(default_factory=VPSDE)
    prediction: str = "score"
    weighting: str = "sigma2"
    preconditioning: str = "none"
    sigma_data: float = 0.5
    times: str = "uniform"
    t_min: float = 1e-4
    t_max: float | None = None
    time_mean: float = -1.2
    time_std: float = 1.2

    def __post_init__(self) -> None:
        check_process("sde", self.sde)
        for name, choices in (
            ("prediction", tuple(_RESIDUALS)),
            ("weighting", WEIGHTINGS),
            ("preconditioning", PRECONDITIONINGS),
            ("times", TIMES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.preconditioning == "edm" and self.prediction != "x0":
            raise ValueError(f"prediction must be 'x0' with preconditioning 'edm', got {self.prediction!r}")
        for name in ("sigma_data", "time_std"):
            check_number(name, getattr(self, name), "positive and finite", lambda value: 0 < value < math.inf)
        check_number("time_mean", self.time_mean)
        top = self.last_time
        check_number("t_max", top, f"in (0, {self.sde.t_max:g}]", lambda t: 0 < t <= self.sde.t_max)
        check_number("t_min", self.t_min, f"in (0, {top:g})", lambda t: 0 < t < top)
        for name, t in (("t_min", self.t_min), ("t_max", top)):
            if not torch.isfinite(self.table(torch.tensor(t, dtype=torch.float64, device="cpu"))).all():
                raise ValueError(
                    f"{name} is {t:g}, where the weighting {self.weighting!r} of {self.prediction} is not finite for "
                    f"{self.sde!r}: choose another weighting, or t_min and t_max further inside (in Python)"
                )

    @property
    def last_time(self) -> float:
        """The upper bound of the times."""
        return self.sde.t_max if self.t_max is None else self.t_max

    def draw(self, u: Tensor) -> Tensor:
        """Maps fp32 uniforms on [0, 1) to fp32 training times, increasing in u: a step draws one number per sample.

        "lognormal" applies the inverse of the normal distribution to u + 2^-25, in float64; "importance" depends on
        the history of the loss, which this object does not know, and is uniform here.
        """
        if self.times != "lognormal":
            return u.mul(self.last_time - self.t_min).add_(self.t_min)
        normal = torch.special.ndtri(u.double() + 2.0**-25)
        return torch.exp(self.time_mean + self.time_std * normal).clamp(self.t_min, self.last_time).float()

    def coefficients(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Coefficients:
        """Computes the coefficients in float64, each shaped like ``t``, of any shape and floating-point dtype."""
        t = t.double()
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        if self.preconditioning == "edm":
            noised, residual = _edm(alpha, sigma, self.sigma_data)
        else:
            noised, residual = [t, alpha, sigma], _RESIDUALS[self.prediction](alpha, sigma)
        columns: Sequence[Tensor] = torch.broadcast_tensors(  # type: ignore[no-untyped-call]
            *noised, *self._weighted(residual, t, sigma)
        )
        return Coefficients(*(column.to(dtype) for column in columns))

    def table(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns `coefficients` as the kernels expect them: contiguous ``[*t.shape, 6]``, one row per time."""
        return torch.stack(self.coefficients(t, torch.float64), dim=-1).to(dtype)

    @cached_property
    def interpolation(self) -> Interpolation | None:
        """`table` interpolated between the time bounds, for kernels; None if it would not be exact to rounding."""
        return interpolate(lambda t: self.table(t, torch.float64), self.t_min, self.last_time)

    def _weighted(self, residual: _Residual, t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.weighting == "sigma2":
            factor = residual.as_noise
        elif self.weighting == "likelihood":
            factor = residual.as_noise * (self.sde.diffusion(t) / sigma)
        else:  # only for "score" the residual is not the error of the network's own output, but sigma times that
            factor = 1 / sigma if self.prediction == "score" else torch.ones_like(sigma)
        return factor * residual.w_f, factor * residual.w_x, factor * residual.w_z


class _Residual(NamedTuple):
    """The error of a network's output, and the factor that makes it the noise's error, sigma (score - true score)."""

    w_f: Tensor
    w_x: Tensor
    w_z: Tensor
    as_noise: Tensor


def _score(alpha: Tensor, sigma: Tensor) -> _Residual:
    one = torch.ones_like(sigma)
    return _Residual(sigma, torch.zeros_like(sigma), one, as_noise=one)


def _eps(alpha: Tensor, sigma: Tensor) -> _Residual:
    one = torch.ones_like(sigma)
    return _Residual(one, torch.zeros_like(sigma), -one, as_noise=one)


def _x0(alpha: Tensor, sigma: Tensor) -> _Residual:
    one = torch.ones_like(sigma)
    return _Residual(one, -one, torch.zeros_like(sigma), as_noise=alpha / sigma)


def _v(alpha: Tensor, sigma: Tensor) -> _Residual:
    return _Residual(torch.ones_like(sigma), sigma, -alpha, as_noise=alpha / (alpha * alpha + sigma * sigma))


def _flow(alpha: Tensor, sigma: Tensor) -> _Residual:
    one = torch.ones_like(sigma)
    return _Residual(one, one, -one, as_noise=alpha / (alpha + sigma))


_RESIDUALS = {"score": _score, "eps": _eps, "x0": _x0, "v": _v, "flow": _flow}


def _edm(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[list[Tensor], _Residual]:
    """Returns [c_noise, c_in alpha, c_in sigma] for x_t / alpha, and the error of f against its target.

    The target is (x_0 - c_skip x_t / alpha) / c_out = x_0 sigma / (sigma_data n) - z alpha sigma_data / n, with
    n = sqrt(sigma^2 + alpha^2 sigma_data^2).
    """
    norm = torch.hypot(sigma, alpha * sigma_data)
    share = alpha * sigma_data / norm
    residual = _Residual(torch.ones_like(sigma), -sigma / (sigma_data * norm), share, as_noise=share)
    return [torch.log(sigma / alpha) / 4, alpha / norm, sigma / norm], residual
