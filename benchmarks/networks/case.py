"""A network of a library, as its users call it, and what becomes of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastsde.lowering import NotLowered, described, lower

_TIMES = torch.linspace(1, 0.1, 4)


@dataclass
class Called:
    """A network and how it is called.

    Args:
        model: that its parts are named by.
        shape: of one sample.
        call: called as ``call(x, t, *conditions)`` with x ``[B, *shape]`` and t ``[B]``; by default the model itself.
        conditions: of a batch of two, each sample its own.
    """

    model: nn.Module
    shape: tuple[int, ...]
    call: Callable[..., Tensor] | None = None
    conditions: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Case:
    """A network by name. ``make`` builds it."""

    name: str
    make: Callable[[], Called]


@dataclass
class Result:
    """What became of a network: the instructions of its program, each kind once, or why there is none."""

    name: str
    weights: int = 0
    instructions: int | None = None
    kinds: tuple[str, ...] = field(default_factory=tuple)
    refused: str | None = None
    failed: str | None = None


def check(case: Case) -> Result:
    """Lowers a network. `lower` itself compares the program with the network, at other times and in another batch."""
    result = Result(case.name)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            called = case.make()
            model = called.model.eval().requires_grad_(False)
            result.weights = sum(parameter.numel() for parameter in model.parameters())
            program = lower(called.call or model, called.shape, _TIMES, called.conditions).program
            result.instructions, result.kinds = len(program.instructions), program.names
        except NotLowered as error:
            result.refused = described(error, model)
        except Exception as error:  # a crash is a result, too: the others must still run
            result.failed = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return result
