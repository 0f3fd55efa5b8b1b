"""Kernels that tests define themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

__all__ = ["jit"]


def jit(**options: Any) -> Callable[..., Any]:
    """`triton.jit`, interpreted if the package's kernels are."""
    triton = pytest.importorskip("triton")

    def decorate(function: Callable[..., None]) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
            return triton.jit(function, **options)

    return decorate
