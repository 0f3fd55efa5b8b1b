"""What ``torch.compile`` makes of functions, told without importing the compiler, and Triton with it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

__all__ = ["constant", "guard_identity", "untraced"]

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``: the function is called while its caller is compiled, and its result
    kept. Arguments must be constants as well; another object can be the ``self`` of a method alone, and whoever calls
    that must `guard_identity`.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def guard_identity(value: object) -> None:
    """Makes a compiled caller compile again for another object, of which `constant` methods give another result."""
    id(value)


def untraced(function: Function) -> Function:
    """``torch.compiler.disable``: compiled callers call the function as it is, between two parts that are compiled."""
    disabled: Function | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None and "torch._dynamo" in sys.modules:  # or nobody compiles
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return (disabled or function)(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast(Function, call)
