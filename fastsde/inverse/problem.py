"""What a call of a sampler is given besides its network: known values and corrections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..noise import STREAM_OTHER
from ..validation import check_tensor
from .classifier import ClassifierGuidance
from .correction import Correction
from .dps import DPS
from .measurement import Measurement
from .schedule import Schedule

__all__ = ["Problem", "known_values", "problem_of"]


@dataclass(frozen=True, eq=False)
class Problem:
    """Corrections and known values for the rows of a schedule.

    Args:
        schedule: the levels of the rows.
        corrections: prepared for the batch.
        mask: bool ``[B, *shape]``, True where the data are known, or None.
        known: the data ``[B, *shape]`` in the dtype of the state; read only where the mask is True.
    """

    schedule: Schedule
    corrections: tuple[Correction, ...] = ()
    mask: Tensor | None = None
    known: Tensor | None = None

    @property
    def options(self) -> list[str]:
        """The names of the options in use."""
        return [*([] if self.mask is None else ["mask"]), *(each.name for each in self.corrections)]

    def part(self, part: slice) -> Problem:
        """Returns the problem of some of the samples."""
        return replace(
            self,
            corrections=tuple(each.part(part) for each in self.corrections),
            mask=None if self.mask is None else self.mask[part],
            known=None if self.known is None else self.known[part],
        )

    def replaced(self, row: int, x: Tensor, keys: Tensor, normal: Callable[..., Tensor]) -> Tensor:
        """Returns the state after a row with known values put in: alpha known + sigma z where the mask is True.

        (Song et al. 2021, arXiv:2011.13456, appendix I.2.) alpha and sigma are those after the row, and z is the draw
        of step ``row + 1`` in stream 4.

        Args:
            row: the row that was taken.
            x: the state after it.
            keys: int64 ``[B, 2]``.
            normal: the function that draws it: `fastsde.ops.normal`, or the reference's.
        """
        if self.mask is None or self.known is None:
            return x
        alpha, sigma = self.schedule.after[row]
        value = self.known
        if sigma > 0:
            value = alpha * value + sigma * normal(keys, row + 1, x.shape[1:], STREAM_OTHER).to(x.dtype)
        return torch.where(self.mask, value, x)


def problem_of(
    schedule: Schedule | None,
    shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    mask: Tensor | None,
    known: Tensor | None,
    classifier: ClassifierGuidance | None,
    measurement: Measurement | None,
) -> Problem | None:
    """Returns the problem that the arguments of a sampler's call pose, or None.

    Args:
        schedule: that of the rows, or None for a table that has none.
        shape: ``[B, *shape]``.
        device: that of the state.
        dtype: the dtype of the state.
        mask: as for `fastsde.sample`.
        known: as for `fastsde.sample`.
        classifier: the sampler's `ClassifierGuidance`, or None.
        measurement: as for `fastsde.sample`.

    Raises:
        ValueError, TypeError: for arguments that do not fit, or a table without a schedule.
    """
    if (mask is None) != (known is None):
        raise ValueError(f"mask and known go together, got only {'known' if mask is None else 'mask'}")
    if measurement is not None and not isinstance(measurement, Measurement):
        raise TypeError(f"measurement must be a fastsde.DPS or fastsde.PiGDM, got {type(measurement).__name__}")
    corrections = [each for each in (classifier, measurement) if each is not None]
    if mask is None and not corrections:
        return None
    names = ["mask"] * (mask is not None) + [each.name for each in corrections]
    if schedule is None:
        raise ValueError(
            f"{names[0]} needs the process and the prediction of each row, which only a solver given by its name tells"
        )
    if isinstance(measurement, DPS) and schedule.goes_up:
        raise ValueError("resamples goes with mask or PiGDM: DPS takes its steps on the way down alone")
    prepared = tuple(each.prepared(shape[0], shape[1:], device, dtype) for each in corrections)
    if mask is not None and known is not None:
        mask, known = known_values(mask, known, shape, device, dtype)
    return Problem(schedule, prepared, mask, known)


def known_values(
    mask: Tensor, known: Tensor, shape: Sequence[int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns the mask and the known values, checked and broadcast to ``[B, *shape]``.

    Raises:
        ValueError, TypeError: for a mask that is not bool, values that are not floating-point or not finite where they
            are known, or a shape that does not broadcast.
    """
    check_tensor("mask", mask, device=device)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where the data are known, got {mask.dtype}")
    check_tensor("known", known, device=device, floating=True)
    given = {"mask": mask, "known": known.to(dtype)}
    for name, value in given.items():
        try:
            given[name] = value.expand(*shape)
        except RuntimeError:
            raise ValueError(f"{name} must broadcast to {list(shape)}, got shape {list(value.shape)}") from None
    mask, known = given["mask"], given["known"]
    if not torch.isfinite(known[mask]).all():
        raise ValueError("known must be finite where mask is True, got NaN or infinity")
    return mask, known
