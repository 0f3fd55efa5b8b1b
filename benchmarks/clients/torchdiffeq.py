"""torchdiffeq: ``odeint`` with its fixed steps, and with the adaptive methods, which no table can follow."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchdiffeq
from torch import Tensor

from .case import SHAPE, Case, case

TITLE, PACKAGES = "torchdiffeq", ("torchdiffeq",)

METHODS = ("euler", "midpoint", "rk4", "heun3", "explicit_adams", "implicit_adams", "dopri5")


def flow(method: str) -> Callable[[Callable[..., Tensor]], Tensor]:
    def loop(net: Callable[..., Tensor]) -> Tensor:
        times = torch.linspace(0, 1, 6)
        with torch.no_grad():
            states: Tensor = torchdiffeq.odeint(lambda t, x: net(x, t), torch.randn(SHAPE), times, method=method)
        return states[-1]

    return loop


def cases() -> list[Case]:
    return [case(method, flow(method)) for method in METHODS]
