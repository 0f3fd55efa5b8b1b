"""Guidance that varies: by sample, by row, within an interval of times, rescaled, or by a second network.

Guidance (Ho & Salimans 2022, arXiv:2207.12598) combines two outputs of a network in each row,

    f = f_uncond + w (f_cond - f_uncond)

`Guidance` says what w is, and where f_uncond comes from. The engines take it as `Weights`, those of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .solvers import StepTable
from .validation import check_number, check_range, check_tensor

__all__ = ["Guidance", "Weights"]


@dataclass(frozen=True, eq=False)
class Guidance:
    """How a sampler guides: f = f_uncond + w (f_cond - f_uncond), with w = scale[sample] schedule[row].

    Args:
        scale: w, a number or floating-point ``[n]`` with one number a sample.
        schedule: a factor of the scale in each row: a function of the rows' times, from float64 ``[K]`` to ``[K]``, or
            K numbers. By default 1.
        interval: the times (low, high), both included, at which there is guidance. In all other rows w is 1, and only
            the conditional output is computed, which saves a call (Kynkaanniemi et al. 2024, arXiv:2404.07724). The
            persistent engine computes both outputs in any case, with the same result.
        rescale: phi in [0, 1], which undoes the growth of the output's standard deviation under guidance: f is
            multiplied by phi std(f_cond) / std(f) + 1 - phi, with the deviations over all elements of a sample (Lin et
            al. 2023, arXiv:2305.08891, section 3.4, eqs. 14-16). Where std(f) is 0, so is the change.
        model: another network that gives f_uncond, called with the same ``model_kwargs`` unless ``uncond_kwargs`` are
            given: autoguidance by a worse version of the network (Karras et al. 2024, arXiv:2406.02507). Anything that
            `fastsde.Sampler` takes as a model, of the same process, prediction and sample shape.

    Raises:
        ValueError, TypeError: for an invalid argument; the message names it, the value given and what was expected.
    """

    scale: float | Tensor
    schedule: Callable[[Tensor], Tensor] | Sequence[float] | None = None
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    model: Any = None

    def __post_init__(self) -> None:
        scale = self.scale
        if isinstance(scale, Tensor) and scale.ndim:
            scale = check_tensor("guidance.scale", scale, floating=True, finite=True)
            if scale.ndim != 1:
                raise ValueError(f"guidance.scale must be a number or have shape [n], got shape {list(scale.shape)}")
        else:
            scale = check_number("guidance", scale.item() if isinstance(scale, Tensor) else scale)
        object.__setattr__(self, "scale", scale)
        if self.interval is not None:
            object.__setattr__(self, "interval", check_range("guidance.interval", self.interval))
        phi = check_number("guidance.rescale", self.rescale, "in [0, 1]", lambda phi: 0 <= phi <= 1)
        object.__setattr__(self, "rescale", phi)

    @classmethod
    def of(cls, guidance: float | Tensor | Guidance) -> Guidance:
        """Returns a guidance, also from its scale alone."""
        return guidance if isinstance(guidance, cls) else cls(guidance)  # type: ignore[arg-type]

    def along(self, table: StepTable) -> Guidance:
        """Returns the same guidance with its schedule as numbers, one for each row of a table.

        Raises:
            ValueError, TypeError: for a schedule of another length, or that is not finite.
        """
        if self.schedule is None:
            return self
        given = self.schedule(table.time.clone()) if callable(self.schedule) else self.schedule
        try:
            rates = torch.as_tensor(given, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"guidance.schedule must give numbers, got {type(given).__name__}") from error
        check_tensor("guidance.schedule", rates, shape=(len(table),), finite=True)
        return replace(self, schedule=tuple(rates.tolist()))

    def head(self, rows: int) -> Guidance:
        """Returns the guidance, `along` a table, of the table's first rows."""
        return self if self.schedule is None else replace(self, schedule=self.schedule[:rows])  # type: ignore[index]

    def part(self, n: int, part: slice) -> Guidance:
        """Returns the guidance of some of ``n`` samples."""
        if not isinstance(self.scale, Tensor):
            return self
        return replace(self, scale=check_tensor("guidance.scale", self.scale, shape=(n,))[part])

    def weights(self, n: int, table: StepTable, device: torch.device, dtype: torch.dtype, network: Any) -> Weights:
        """Returns the weights of ``n`` samples, for a guidance `along` the table.

        Args:
            dtype: of the state.
            network: the engines' form of ``model``, or None if there is none.

        Raises:
            ValueError: if there is not one scale for each sample.
        """
        scale, rates, times = self.scale, self.schedule, table.time.tolist()
        if isinstance(scale, Tensor):
            check_tensor("guidance.scale", scale, shape=(n,), device=device)
        assert not callable(rates)
        low, high = (-math.inf, math.inf) if self.interval is None else self.interval
        is_constant = rates is None and self.interval is None and not isinstance(scale, Tensor)
        return Weights(
            scale.to(dtype) if isinstance(scale, Tensor) else torch.full((n,), scale, dtype=dtype, device=device),
            (1.0,) * len(times) if rates is None else tuple(rates),
            tuple(low <= time <= high for time in times),
            self.rescale,
            scale if is_constant and not isinstance(scale, Tensor) else None,
            network,
        )


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of guidance in a batch: w = scale[sample] rates[row] in rows that are guided, elsewhere 1.

    Args:
        scale: ``[B]``, in the dtype and on the device of the state.
        rates: one number a row.
        guided: one bool a row: whether the unconditional output is needed.
        rescale: phi of `Guidance`.
        number: w, if it is the same for all samples and in all rows.
        network: what gives the unconditional output, or None for the sampler's own network.
    """

    scale: Tensor
    rates: tuple[float, ...]
    guided: tuple[bool, ...]
    rescale: float = 0.0
    number: float | None = None
    network: Any = None

    def of_row(self, row: int) -> float | Tensor:
        """Returns w in a guided row, a number or ``[B]``."""
        return self.scale * self.rates[row] if self.number is None else self.number

    def rates_on(self, device: torch.device) -> Tensor:
        """Returns the rates as the kernels read them, fp32 ``[K]``."""
        return torch.tensor(self.rates, dtype=torch.float32, device=device)

    def part(self, part: slice) -> Weights:
        """Returns the weights of some of the samples."""
        return replace(self, scale=self.scale[part])
