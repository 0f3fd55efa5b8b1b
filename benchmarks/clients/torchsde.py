"""torchsde: ``sdeint`` with fixed steps. Its Brownian motion is replaced (fastsde/tracing/brownian.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchsde
from torch import Tensor

from fastsde.tracing.brownian import LinearBrownian

from .case import Case, case

TITLE, PACKAGES = "torchsde", ("torchsde",)

SHAPE = (4, 3)


class SpaceTime(LinearBrownian):
    """Also gives the integral of W over a step, as Roessler's methods need it: linear in one more draw a step."""

    levy_area_approximation = "space-time"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._areas: dict[tuple[float, float], Tensor] = {}

    def __call__(self, a: Any, b: Any, return_U: bool = False, return_A: bool = False) -> Any:  # noqa: N803
        w = super().__call__(a, b)
        if not return_U:
            return w
        step = (float(a), float(b))
        if step not in self._areas:
            self._areas[step] = self.draw((step[1] - step[0]) / 12)
        return w, (step[1] - step[0]) * (w / 2 + self._areas[step])


class ReverseSDE:
    """A reverse process whose drift calls the network, with noise that is the same for all states."""

    sde_type = "ito"

    def __init__(self, net: Callable[..., Tensor], noise_type: str) -> None:
        self.net, self.noise_type = net, noise_type

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y, t) - 0.5 * y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        g = (0.5 + t) * torch.ones_like(y)
        return g if self.noise_type == "diagonal" else torch.diag_embed(g)


def integral(method: str, noise_type: str = "diagonal") -> Callable[[Callable[..., Tensor]], Tensor]:
    def loop(net: Callable[..., Tensor]) -> Tensor:
        y = torch.randn(SHAPE)
        motion = (SpaceTime if method == "srk" else LinearBrownian)(size=SHAPE, dtype=y.dtype)
        times = torch.linspace(0, 1, 2)
        sde = ReverseSDE(net, noise_type)
        with torch.no_grad():
            states: Tensor = torchsde.sdeint(sde, y, times, bm=motion, method=method, dt=0.1)
        return states[-1]

    return loop


def cases() -> list[Case]:
    return [
        case("sdeint euler", integral("euler")),
        case("sdeint milstein", integral("milstein")),
        case("sdeint srk", integral("srk")),
        case("sdeint srk, additive noise", integral("srk", "additive")),
    ]
