"""Solvers that choose their own steps: not tables, since each sample takes as many steps as its tolerance asks for."""

from __future__ import annotations

from dataclasses import dataclass

from ..validation import check_int, check_number

__all__ = ["ODE_METHODS", "AdaptiveODE"]

ODE_METHODS = ("dopri5", "tsit5")


def check_tolerance(name: str, value: object) -> float:
    """Returns a tolerance, a number of at least 0."""
    return check_number(name, value, "at least 0 and finite", lambda number: 0 <= number < float("inf"))


def check_tolerances(rtol: object, atol: object) -> None:
    """Raises unless both are tolerances, and one of them is above 0."""
    if check_tolerance("rtol", rtol) == 0 and check_tolerance("atol", atol) == 0:
        raise ValueError("rtol and atol must not both be 0")
    check_tolerance("atol", atol)


@dataclass(frozen=True)
class AdaptiveODE:
    """An explicit Runge-Kutta method with adaptive steps: an embedded pair of orders 5 and 4, by torchode.

    A step is accepted if the root mean square over the elements of a sample of error / (atol + rtol max(|y|, |y'|)) is
    below 1 (Hairer, Norsett & Wanner 1993, sec. II.4). Each sample has steps of its own, so that it does not depend on
    its batch (Lienen & Guennemann 2022, arXiv:2210.12375).

    Args:
        rtol, atol: the relative and the absolute tolerance; score_sde's are 1e-5 (arXiv:2011.13456, app. D.2).
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
        check_tolerances(self.rtol, self.atol)
        if self.method not in ODE_METHODS:
            raise ValueError(f"method must be one of {', '.join(ODE_METHODS)}, got {self.method!r}")
        check_int("max_steps", self.max_steps, 1)
