"""What a client hands to the check: loops that can be made afresh, on small tensors and a stand-in for the network."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SHAPE = (2, 3, 4, 4)

Make = Callable[[torch.dtype], "Loop"]


class StandIn(nn.Module):
    """A nonlinear network for any shape and dtype. It mixes the elements of a sample, and uses all that it is given.

    Real networks have their own rounding errors and dtypes, which would hide those of the tables.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3), requires_grad=False)

    def forward(self, x: Tensor, t: Any = 0.0, *more: Any, **named: Any) -> Tensor:
        t = self._column(torch.as_tensor(t), x)
        for condition in (*more, *named.values()):
            if isinstance(condition, Tensor):
                x = x + 0.2 * self._column(condition, x)
        return torch.tanh(x + self.weight * x.roll(1, -1)) * (0.8 + 0.2 * torch.sin(t)) + 0.1 * torch.cos(0.01 * t)

    @staticmethod
    def _column(value: Tensor, x: Tensor) -> Tensor:
        """Returns a condition as one value a sample, or element for element where it has the shape of x."""
        value = value.to(x.dtype)
        if value.shape == x.shape:
            return value
        value = value.reshape(len(value), -1).mean(1) if value.ndim > 1 else value.reshape(-1)
        return (value if len(value) in (1, len(x)) else value[:1]).reshape(-1, *[1] * (x.ndim - 1))


class LearnedVariance(StandIn):
    """Also predicts a variance, as twice as many channels."""

    def forward(self, x: Tensor, t: Any = 0.0, *more: Any, **named: Any) -> Tensor:
        f = super().forward(x, t, *more, **named)
        return torch.cat([f, 0.1 * f], dim=1)


@dataclass
class Loop:
    """A loop with all that it is called with, as `fastsde.tracing.record` takes it."""

    call: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    modules: tuple[nn.Module, ...] = ()  # networks that the loop holds itself
    state: str | None = None  # the name of the argument that is the initial state
    until_read: bool = False  # whether it ends where it first reads the state on the host, with what it reads

    def __call__(self) -> Any:
        return self.call(*self.args, **self.kwargs)

    @property
    def networks(self) -> list[nn.Module]:
        return [*(argument for argument in self.args if isinstance(argument, nn.Module)), *self.modules]

    @property
    def initial(self) -> Tensor | None:
        if self.state is None:
            return None
        arguments = inspect.signature(self.call).bind(*self.args, **self.kwargs).arguments
        state: Tensor = arguments[self.state]
        return state


@dataclass(frozen=True)
class Case:
    """A sampler of a client. ``make`` builds it from nothing, since schedulers and the like change as they are used."""

    name: str
    make: Make


def case(name: str, loop: Callable[..., Any], network: Callable[[], nn.Module] = StandIn) -> Case:
    """Returns the case of a loop without state of its own, which is called with its network only."""
    return Case(name, lambda dtype: Loop(loop, (network().to(dtype),)))


def fresh(name: str, build: Callable[[], Callable[..., Any]], network: Callable[[], nn.Module] = StandIn) -> Case:
    """Returns the case of a loop that is built anew each time, and called with its network."""
    return Case(name, lambda dtype: Loop(build(), (network().to(dtype),)))


def held(
    name: str, build: Callable[[nn.Module], Callable[..., Any]], network: Callable[[], nn.Module] = StandIn
) -> Case:
    """Returns the case of a loop that holds its network: ``build(network)`` is the loop, called with nothing."""

    def make(dtype: torch.dtype) -> Loop:
        module = network().to(dtype)
        return Loop(build(module), modules=(module,))

    return Case(name, make)


def start(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    """Returns an initial state: the same numbers in any dtype."""
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(shape or SHAPE, generator=generator, dtype=torch.float64).to(dtype)
