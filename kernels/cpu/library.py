"""Calls of the native kernels: tensors go as pointers, and the number of threads is PyTorch's own."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import build

__all__ = ["call", "pointers"]

_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float, "d": ctypes.c_double}
# Of each kernel: what it returns (or -), and its arguments but for the last, the number of threads.
_SIGNATURES = {
    "normal": "- p l l l l p",
    "bits": "- p l l l l p",
    "solver_step": "l p p p p p p p l f f l l p p",
    "perturb": "- p i p l p p p l f f f f f l l p p",
    "dsm_loss": "f p p i p l p p p l f f f f i i l l p p",
    "mlp_sampler": "- l p p p p p l p p f l l l l p p",
    "mlp_training": "- l p p p p p p p i l f f p l f f f i i d d d l l l p p",
}
_SOURCES = {"mlp_training": "mlp_training.cpp"}  # of the kernels that have a library of their own
_functions: dict[str, Any] = {}


def _function(name: str) -> Any:
    if name not in _functions:
        source = _SOURCES.get(name, build.MAIN)
        library = build.load(source)
        if library is None:
            raise RuntimeError(f"the native kernels cannot be had: {build.unavailable_reason(source)}")
        function = getattr(library, f"fastsde_{name}")
        result, *arguments = _SIGNATURES[name].split()
        function.restype = _TYPES.get(result)
        function.argtypes = [*(_TYPES[each] for each in arguments), ctypes.c_int]
        _functions[name] = function
    return _functions[name]


def call(name: str, *arguments: Any) -> Any:
    """Runs a kernel on as many threads as PyTorch would. Tensors must be contiguous and on the CPU."""
    values = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
    return _function(name)(*values, torch.get_num_threads())


def pointers(tensors: Sequence[Tensor | None]) -> Any:
    """An array of pointers, null for None; it does not keep the tensors alive."""
    return (ctypes.c_void_p * len(tensors))(*(None if each is None else each.data_ptr() for each in tensors))
