"""Markers for ``torch.compile`` that do not import the compiler, which would import Triton too."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

__all__ = ["Uncompiled", "constant", "guard_identity", "untraced"]


class Uncompiled:
    """Comes before ``TorchDispatchMode`` among the bases of a mode, which PyTorch would else hide from the compiler by
    importing that, for a second, when the first operation runs under it.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """Marks a function like ``torch.compiler.assume_constant_result``: it is called while its caller is compiled, and
    its result is kept. Its arguments must be constants too, except the ``self`` of a method; the caller of such a
    method must call `guard_identity` on it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def guard_identity(value: object) -> None:
    """Makes a compiled caller recompile for another object, whose `constant` methods may give another result."""
    id(value)


def untraced(function: Function) -> Function:
    """Marks a function like ``torch.compiler.disable``: compiled callers call it uncompiled, at a graph break."""
    disabled: Function | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None and "torch._dynamo" in sys.modules:  # otherwise nothing is compiled
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return (disabled or function)(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast(Function, call)
