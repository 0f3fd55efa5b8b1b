"""Solvers that choose their own steps: not tables, since each sample takes as many steps as its tolerance asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..validation import check_bool, check_int, check_number

__all__ = ["ERROR_NORMS", "ODE_METHODS", "AdaptiveODE", "GottaGoFast"]

ODE_METHODS = ("dopri5", "tsit5")
ERROR_NORMS = ("l2", "linf")


def _check_tolerances(rtol: object, atol: object) -> None:
    for name, value in (("rtol", rtol), ("atol", atol)):
        check_number(name, value, "at least 0 and finite", lambda number: 0 <= number < math.inf)
    if rtol == 0 == atol:
        raise ValueError("one of rtol and atol must be above 0, got 0 for both")


@dataclass(frozen=True)
class AdaptiveODE:
    """An explicit Runge-Kutta method with adaptive steps: an embedded pair of orders 5 and 4, by torchode.

    A step is accepted if the root mean square over the elements of a sample of error / (atol + rtol max(|y|, |y'|)) is
    below 1 (Hairer, Norsett & Wanner 1993, sec. II.4). Each sample has steps of its own, so that it does not depend on
    its batch (Lienen & Guennemann 2022, arXiv:2210.12375).

    Args:
        rtol: the relative tolerance; score_sde's is 1e-5 (arXiv:2011.13456, app. D.2).
        atol: the absolute tolerance; score_sde's is 1e-5.
        method: "dopri5" (Dormand & Prince 1980), SciPy's RK45, or "tsit5" (Tsitouras 2011).
        max_steps: the most steps of a sample, rejected ones included.

    Raises:
        ValueError, TypeError: for an invalid argument.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    method: str = "dopri5"
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        _check_tolerances(self.rtol, self.atol)
        if self.method not in ODE_METHODS:
            raise ValueError(f"method must be one of {', '.join(ODE_METHODS)}, got {self.method!r}")
        check_int("max_steps", self.max_steps, 1)


@dataclass(frozen=True)
class GottaGoFast:
    """The reverse SDE with adaptive steps (Jolicoeur-Martineau et al. 2021, arXiv:2105.14080, algorithm 1).

    A step of length h from x at time t, with the reverse drift D = f x - g^2 score and a normal draw z, is

        x' = x - h D(x, t) + sqrt(h) g(t) z                       Euler-Maruyama
        x" = (x' + x - h D(x', t - h) + sqrt(h) g(t - h) z) / 2   improved Euler
        E = norm((x' - x") / max(atol, rtol max(|x'|, |x'_previous|)))

    If E <= 1, x" is accepted. The next step, or the next attempt at the same one, is min(t - t_end, safety h
    E^-exponent) long. Each sample has steps of its own, and calls the network twice an attempt.

    Beyond the paper, safety h E^-exponent is rounded down to three significant bits, that is by at most a fifth. As the
    noise depends on the lengths of steps, the network's rounding errors would otherwise change the whole sample.

    The paper draws new noise after a rejected attempt, so that small increments are accepted more often. For images
    that hardly matters, since E is a mean over many elements; but with a few elements the samples are wrong, at any
    tolerance: those of N(0.8, 0.5^2) in one dimension have a standard deviation of 0.7. By default the noise of a
    rejected attempt is therefore kept. Without rejections nothing differs.

    Args:
        rtol: the relative tolerance, the paper's eps_rel: 0.01 to 0.05, for more accurate or for faster sampling.
        atol: the absolute tolerance, the paper's eps_abs: one level of the data's range. The default, 2 / 256, is for
            8-bit images on [-1, 1]; images on [0, 1] take half of it.
        h_init: the length of the first step.
        safety: of the step size control, the paper's theta.
        exponent: of the step size control, the paper's r.
        extrapolate: whether x" is accepted, rather than x'.
        keeps_noise: whether the noise of rejected attempts is kept; in the paper it is not.
        norm: of the scaled error over the elements of a sample: "l2", the root mean square, or "linf", the maximum.
        max_steps: the most attempts of a sample, below 2^28.

    Raises:
        ValueError, TypeError: for an invalid argument.
    """

    rtol: float = 0.02
    atol: float = 0.0078
    h_init: float = 0.01
    safety: float = 0.9
    exponent: float = 0.9
    extrapolate: bool = True
    keeps_noise: bool = True
    norm: str = "l2"
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        _check_tolerances(self.rtol, self.atol)
        check_number("h_init", self.h_init, "above 0 and finite", lambda number: 0 < number < math.inf)
        check_number("safety", self.safety, "in (0, 1]", lambda number: 0 < number <= 1)
        check_number("exponent", self.exponent, "in (0, 1]", lambda number: 0 < number <= 1)
        check_bool("extrapolate", self.extrapolate)
        check_bool("keeps_noise", self.keeps_noise)
        if self.norm not in ERROR_NORMS:
            raise ValueError(f"norm must be one of {', '.join(ERROR_NORMS)}, got {self.norm!r}")
        check_int("max_steps", self.max_steps, 1, 2**28 - 1)  # attempt a draws the noise of step a + 1
