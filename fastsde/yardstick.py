"""Networks as `fastsde.verify` calls them for the truth and the yardstick, independently of the backends.

A fault of `fastsde.engines.network`, such as rounding times, is then not shared by the results it is compared with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .engines.inspection import dtype_of
from .models.mlp import with_time
from .models.unwrap import unwrap
from .reference import Model

__all__ = ["in_dtype", "in_its_own_dtype"]


def in_its_own_dtype(model: Model) -> Model:
    """Returns the network run in its own dtype, with float64 inputs and outputs."""
    net, dtype = _called(model), dtype_of(model)

    def run(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return net(x.to(dtype), t.float() if t.is_floating_point() else t, **kwargs).double()

    return run


def in_dtype(model: Model, dtype: torch.dtype) -> Model:
    """Returns a copy of the network in a dtype, called with x in that dtype and everything else as it is.

    A network that refuses that is called with integer times, with its other arguments in the dtype, or under
    ``torch.autocast``: whichever it accepts first.
    """
    net = _called(model)
    if isinstance(net, nn.Module) and dtype_of(net) != dtype:
        net = copy.deepcopy(net).to(dtype)

    def call(x: Tensor, t: Tensor, kwargs: dict[str, Any], integer: bool, cast: bool, autocast: bool) -> Tensor:
        if cast:
            kwargs = {name: _cast(value, dtype) for name, value in kwargs.items()}
        with torch.autocast(x.device.type, dtype=dtype) if autocast else nullcontext():
            return net(x.to(dtype), t.long() if integer else t, **kwargs)

    ways = [(integer, cast, False) for cast in (False, True) for integer in (False, True)]
    if dtype != torch.float32:
        ways += [(integer, False, True) for integer in (False, True)]
    return _first_taken(call, ways)


def _first_taken(call: Callable[..., Tensor], ways: list[tuple[bool, bool, bool]]) -> Model:
    def run(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        refusals = []
        for way in list(ways):
            if way[0] and not torch.equal(t, t.round()):  # these times are not integers
                continue
            try:
                f = call(x, t, kwargs, *way)
            except (RuntimeError, IndexError) as error:
                refusals.append(error)
                continue
            del ways[: ways.index(way)]
            return f
        raise refusals[0]

    return run


def _called(model: Model) -> Model:
    """Returns the network as a callable ``model(x, t)``."""
    return with_time(unwrap(model)) if isinstance(model, nn.Module) else model


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
