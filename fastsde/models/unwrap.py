"""Unwraps the network inside PyTorch's wrappers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["shape_of", "unwrap"]

_WITH_MODULE = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def _is_compiled(model: nn.Module) -> bool:
    """Returns whether ``torch.compile`` made a module. Its class is not imported: importing torch._dynamo takes 1 s."""
    return any(
        each.__name__ == "OptimizedModule" and each.__module__.startswith("torch._dynamo")
        for each in type(model).__mro__
    )


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the module inside ``torch.compile``, DistributedDataParallel, DataParallel and AveragedModel.

    Wrappers may be nested, and their own hooks are dropped. Any other module is returned as it is.
    """
    while True:
        if isinstance(model, _WITH_MODULE):
            model = model.module
        elif _is_compiled(model):
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


def shape_of(model: nn.Module) -> tuple[int, ...] | None:
    """Returns a network's attribute ``shape``, that of one sample; None if it has none, or something else of that name.

    A network of the user's may call anything so.
    """
    shape: Any = getattr(unwrap(model), "shape", None)
    if not isinstance(shape, Sequence) or not all(type(each) is int for each in shape):
        return None
    return tuple(shape)
