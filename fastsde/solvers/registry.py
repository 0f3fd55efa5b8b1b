"""The registry of solvers: each builder registers its name, its variants and their orders of convergence.

The command line, `fastsde.solvers.build` and the tests take the names from it. The modules of this package are found
automatically, so that a new solver only needs its own file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from ..sde import Process
from .table import StepTable

__all__ = ["REGISTRY", "Solver", "Variant", "solver"]

# Arguments that are not options: euler_final and final_rows follow from the number of rows.
_PLACES = ("sde", "times", "alpha", "sigma", "time", "prediction", "euler_final", "final_rows")
Builder = TypeVar("Builder", bound=Callable[..., StepTable])


@dataclass(frozen=True)
class Variant:
    """Some options of a builder, and the expected properties of the table.

    Args:
        order: of convergence, on the probability-flow ODE or, with noise, in the weak sense; 0 for a solver with an
            error that does not fall with the step.
        noise: whether rows draw noise.
        options: arguments of the builder.
    """

    order: int
    noise: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Solver:
    """A registered builder of a `StepTable`.

    Args:
        builder: the function, such as `fastsde.solvers.ddim`.
        variants: its options and their orders of convergence; the first is without options.
        corrects_at: for a solver whose last row of an interval is at the new time, such as Heun's correction: returns
            whether that row exists for a process, a time and a prediction.
        needs_alpha: whether the solver cannot start a step where alpha is 0, whatever the network predicts.
        rows_per_interval: how many rows an interval of times takes, or a function from the builder's options to that.
            The last interval may take fewer, which the builder is told by ``euler_final`` (of two rows only the first)
            or by ``final_rows``.
        weights: for a Runge-Kutta method, the weights of the velocities of an interval's rows, by how many these are:
            with h the interval, x' = x + h sum_i weights_i v_i.
        is_affine: whether the samples are affine in the network's outputs and the noise: without Langevin rows.
    """

    builder: Callable[..., StepTable]
    variants: tuple[Variant, ...]
    corrects_at: Callable[[Process, float, str], bool] | None = None
    needs_alpha: bool = False
    rows_per_interval: int | Callable[[Mapping[str, Any]], int] = 1
    weights: Mapping[int, tuple[float, ...]] | None = None
    is_affine: bool = True

    @property
    def name(self) -> str:
        """The name of the builder."""
        return self.builder.__name__

    @cached_property
    def is_on_schedule(self) -> bool:
        """Whether it is built from alpha, sigma and the network's times, rather than from a process and its times."""
        return "alpha" in inspect.signature(self.builder).parameters

    @cached_property
    def options(self) -> tuple[str, ...]:
        """The names of the builder's options, such as clip or order."""
        return tuple(name for name in inspect.signature(self.builder).parameters if name not in _PLACES)

    def rows_of(self, options: Mapping[str, Any]) -> int:
        """Returns how many rows an interval takes with some options of the builder."""
        rows = self.rows_per_interval
        return rows(options) if callable(rows) else rows

    def ending(self, rows: int) -> dict[str, Any]:
        """Returns the argument that tells the builder how many rows its last interval takes."""
        if self.rows_per_interval == 1:
            return {}
        is_told = "final_rows" in inspect.signature(self.builder).parameters
        return {"final_rows": rows} if is_told else {"euler_final": rows == 1}


REGISTRY: dict[str, Solver] = {}
"""The registered solvers by name."""


def solver(
    *variants: Variant,
    corrects_at: Callable[[Process, float, str], bool] | None = None,
    needs_alpha: bool = False,
    rows_per_interval: int | Callable[[Mapping[str, Any]], int] = 1,
    weights: Mapping[int, tuple[float, ...]] | None = None,
    is_affine: bool = True,
) -> Callable[[Builder], Builder]:
    """Registers the decorated builder under its own name.

    Args:
        variants: options of the builder and their orders of convergence; the first one is without options.
        corrects_at: as for `Solver`.
        needs_alpha: as for `Solver`.
        rows_per_interval: as for `Solver`.
        weights: as for `Solver`.
        is_affine: as for `Solver`.

    Raises:
        TypeError: for no variant.
        ValueError: for the name of another solver.
    """

    if not variants or not all(isinstance(variant, Variant) for variant in variants):
        raise TypeError(f"solver takes one Variant or more, as in @solver(Variant(order)), got {variants}")

    def register(builder: Builder) -> Builder:
        known = REGISTRY.get(builder.__name__)
        if known is not None and known.builder.__module__ != builder.__module__:
            raise ValueError(f"a solver {builder.__name__} is already registered, by {known.builder.__module__}")
        REGISTRY[builder.__name__] = Solver(
            builder, variants, corrects_at, needs_alpha, rows_per_interval, weights, is_affine
        )
        return builder

    return register
