"""The interface of what corrects the score or the state in each row by a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from .schedule import Level

__all__ = ["Change", "Correction", "Point"]


class Point(NamedTuple):
    """A row's network call, as a correction sees it.

    Attributes:
        x: the network's input ``[B, *shape]``, a leaf that requires a gradient.
        t: the network's times ``[B]``.
        data: the data prediction D of ``x``, with its graph; without one if no correction uses it.
        level: alpha, sigma and D = p x + q f at this row.
        after: alpha and sigma of the state after the row.
    """

    x: Tensor
    t: Tensor
    data: Tensor
    level: Level
    after: tuple[float, float]


class Change(NamedTuple):
    """What a correction adds in a row.

    Attributes:
        score: added to the score, ``[B, *shape]``, or None.
        state: added to the state after the row, ``[B, *shape]``, or None.
    """

    score: Tensor | None = None
    state: Tensor | None = None


class Correction(ABC):
    """Changes the score or the state of each row by a gradient with respect to x.

    Each sample must be changed by its own values alone, so that it does not depend on its batch.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The argument that it is given as."""

    @property
    def uses_data(self) -> bool:
        """Whether it differentiates the data prediction, and so the network."""
        return True

    @abstractmethod
    def __call__(self, point: Point) -> Change:
        """Returns the change in a row; runs with gradients enabled."""

    def prepared(self, n: int, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Self:
        """Returns the correction of ``n`` samples of a shape, after checks of what it holds.

        Raises:
            ValueError, TypeError: if it does not fit the samples.
        """
        return self

    def part(self, part: slice) -> Self:
        """Returns a prepared correction for some of the samples."""
        return self
