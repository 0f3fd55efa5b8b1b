"""What the tests hand to the tracer: cases of loops, small networks and initial states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Case:
    """A loop and what it is called with: ``loop(network, **arguments(dtype, seed))``.

    A ``made`` loop is the result of ``loop(network)`` and holds its network itself. ``state`` names its initial state.
    """

    loop: Callable[..., Any]
    network: Callable[[], nn.Module]
    arguments: Callable[[torch.dtype, int], dict[str, Any]]
    made: bool = False
    state: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    double: bool = True  # whether it can run in float64
    words: str = ""  # a pattern of the operations that the refusal may name

    @property
    def name(self) -> str:
        return self.loop.__name__


TRACED: list[Case] = []
EITHER: list[Case] = []
REFUSED: list[Case] = []


class Mixing(nn.Module):
    """Mixes the elements of a sample of any shape, and depends on the time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, t: Any) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return torch.tanh(self.weight * x + 0.3 * x.roll(1, -1)) * (0.8 + 0.2 * torch.cos(t))


class MLP(nn.Module):
    """Takes times of any form, and labels."""

    def __init__(self, out: int = 2, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, out))
        self.labels = nn.Embedding(4, 2)

    def forward(self, x: Tensor, t: Any, y: Tensor | None = None) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1).expand(len(x), 1)
        x = x if y is None else x + self.labels(y)
        return self.layers(torch.cat((x, torch.cos(t)), -1))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1))


def nothing(dtype: torch.dtype, seed: int) -> dict[str, Any]:
    return {}


def start(*shape: int, scale: float = 1.0, name: str = "x") -> Callable[[torch.dtype, int], dict[str, Any]]:
    """Returns arguments: an initial state."""

    def arguments(dtype: torch.dtype, seed: int) -> dict[str, Any]:
        draw = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return {name: (scale * draw).to(dtype)}

    return arguments


def _case(kind: list[Case], network: Any, arguments: Any, options: dict[str, Any]) -> Callable[[Any], Any]:
    def add(loop: Any) -> Any:
        kind.append(Case(loop, network, arguments, **options))
        return loop

    return add


def traces(network: Any = MLP, arguments: Any = nothing, **options: Any) -> Callable[[Any], Any]:
    return _case(TRACED, network, arguments, options)


def either(network: Any = MLP, arguments: Any = nothing, **options: Any) -> Callable[[Any], Any]:
    return _case(EITHER, network, arguments, options)


def refuses(words: str, network: Any = MLP, arguments: Any = nothing, **options: Any) -> Callable[[Any], Any]:
    return _case(REFUSED, network, arguments, {"words": words, **options})


def traces_as(name: str, loop: Any, **options: Any) -> None:
    """Adds a loop that no ``def`` has named."""
    loop.__name__ = name
    traces(**options)(loop)
