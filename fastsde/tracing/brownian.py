"""A Brownian motion whose increments are linear in plain normal draws, in place of torchsde's trees.

k-diffusion, diffusers and torchsde ask a tree for W(b) - W(a). The tree draws each node from a generator of its own,
and some nodes twice, with the same seed. Here the line is cut into pieces as points come up: a new piece at an end is
an independent draw, and a cut inside a piece is a Brownian bridge. So the loop draws plain normals, once each.
"""

from __future__ import annotations

import bisect
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["NOTE", "LinearBrownian", "linear_brownian"]

NOTE = "draws from a Brownian tree, which is replaced by independent normals"


class LinearBrownian:
    """Takes the arguments of ``torchsde.BrownianTree(t0, w0, t1)`` and ``torchsde.BrownianInterval(t0, t1, size)``."""

    levy_area_approximation = "none"

    def __init__(
        self,
        t0: Any = None,
        w0: Tensor | None = None,
        t1: Any = None,
        *,
        size: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        **options: Any,
    ) -> None:
        self.shape = tuple(size) if w0 is None else tuple(w0.shape)
        self.dtype = dtype if w0 is None else w0.dtype
        self.device = device if w0 is None else w0.device
        self.points: list[float] = []
        self.pieces: list[Tensor] = []  # pieces[i]: the increment from points[i] to points[i + 1]

    def draw(self, variance: float) -> Tensor:
        z: Tensor = variance**0.5 * torch.randn(self.shape, dtype=self.dtype, device=self.device)
        return z

    def _cut(self, t: float) -> None:
        points, pieces = self.points, self.pieces
        i = bisect.bisect_left(points, t)
        if i < len(points) and points[i] == t:
            return
        if i == len(points):
            pieces += [self.draw(t - points[-1])] if points else []
        elif i == 0:
            pieces.insert(0, self.draw(points[0] - t))
        else:
            left, right = points[i - 1], points[i]
            whole = pieces[i - 1]
            bridge = self.draw((t - left) * (right - t) / (right - left))
            first = (t - left) / (right - left) * whole + bridge
            pieces[i - 1 : i] = [first, whole - first]
        points.insert(i, t)

    def __call__(self, a: Any, b: Any, *args: Any, **options: Any) -> Any:
        a, b = float(a), float(b)
        self._cut(a)
        self._cut(b)
        start, stop = sorted((self.points.index(a), self.points.index(b)))
        total = self.pieces[start]
        for piece in self.pieces[start + 1 : stop]:
            total = total + piece
        return total if a < b else -total


@contextlib.contextmanager
def linear_brownian(tell: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Replaces torchsde's trees, if torchsde is imported; ``tell`` is called when the loop makes one."""
    torchsde: Any = sys.modules.get("torchsde")
    if torchsde is None or not hasattr(torchsde, "BrownianTree"):
        yield
        return

    class Told(LinearBrownian):
        def __init__(self, *args: Any, **options: Any) -> None:
            tell()
            super().__init__(*args, **options)

    held = torchsde.BrownianTree, torchsde.BrownianInterval
    torchsde.BrownianTree = torchsde.BrownianInterval = Told
    try:
        yield
    finally:
        torchsde.BrownianTree, torchsde.BrownianInterval = held
