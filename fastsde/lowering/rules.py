"""What each of PyTorch's operations becomes in a program."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import elementwise, linear, norms
from .builder import Builder
from .recording import Needs, NotLowered, Operation, Value

__all__ = ["lower_operation"]

_RULES = {**elementwise.RULES, **linear.RULES, **norms.RULES}
# Operations that move elements and do not compute.
_MOVES = """
    _reshape_alias _unsafe_view alias as_strided cat clone contiguous copy detach diagonal expand expand_as flip
    index index_select lift_fresh movedim narrow permute repeat reshape roll select slice split split_with_sizes
    squeeze stack t transpose unbind unfold unsqueeze unsafe_split view view_as _to_copy to unsafe_chunk
    """.split()  # noqa: SIM905


def lower_operation(builder: Builder, operation: Operation) -> None:
    """Adds to a program what an operation computes.

    Raises:
        NotLowered: if a program cannot compute it.
    """
    name = operation.name
    builder.at = operation
    try:
        if name not in _MOVES and name not in _RULES:
            raise NotLowered("a program has no such operation")
        for output in operation.outputs:
            if output is not None and output.tensor.dtype != torch.float32:
                raise NotLowered(f"it computes in {output.tensor.dtype}")
        if name in _MOVES:
            _move(builder, operation)
        else:
            _RULES[name](builder, operation)
    except NotLowered as error:
        raise NotLowered(f"{name}: {error}", operation.module) from None


def _move(builder: Builder, operation: Operation) -> None:
    """Runs an operation on the codes of its arguments."""
    if operation.writes:
        raise NotLowered("it works in place")
    leaves: list[Any] = []
    for leaf in operation.leaves:
        if not isinstance(leaf, Value):
            leaves.append(torch.int64 if isinstance(leaf, torch.dtype) else leaf)
        elif leaf.tensor.dtype == torch.int64 and not builder.is_traced(leaf) and operation.name.startswith("index"):
            if builder.recorder.needs(leaf) != Needs.NOTHING:
                raise NotLowered("its index follows the time or a condition")
            builder.recorder.read.append(leaf)
            leaves.append(leaf.tensor.cpu())
        else:
            leaves.append(builder.codes_of(leaf))
    args, kwargs = tree_unflatten(leaves, operation.spec)
    kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    found, _ = tree_flatten(operation.function(*args, **kwargs))
    for output, codes in zip(operation.outputs, found, strict=True):
        assert output is not None
        builder.set(output, codes)
