"""Calls of the native kernels: tensors are passed as pointers, and the number of threads is PyTorch's own.

A pointer to another dtype could be read and written past its end, so each tensor is checked.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import build

__all__ = ["address", "available", "call", "call_products", "code", "function", "has_code", "pointers"]

_TYPES = {
    "s": ctypes.c_int,
    "l": ctypes.c_int64,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
    "n": ctypes.c_char_p,  # a name
}
_DTYPES = {"F": torch.float32, "L": torch.int64, "I": torch.int32}  # of tensors; for p, the launcher checks the dtype
# What each kernel returns (- for nothing, s for a status), then its arguments except the last, the number of threads.
_SIGNATURES = {
    "coefficients": "l F l F l l l F",
    "step_coefficients": "l L l l f f l F l l l F",
    "normal": "- L l l l l F",
    "bits": "- L l l l l I",
    "uniform": "- L l l l l F",
    "sample_keys": "- l l l L",
    "solver_step": "i p",
    "langevin_size": "- p F F F L F F F F l l f f l l F",
    "rescale_factor": "- F F F F l f l l F",
    "perturb": "- p i L l L F F l f f l l F F F",
    "dsm_loss": "s F p i L l F L F l f f l l F F F",
    "mlp_sampler": "s p l l l l l F F l F l l l L F f l l l l F F F",
    "mlp_training": "s p l l l l l L l p l p p p p p i l f f L l F d d d l l l F F",
    "unet": "s l l l l l p p p F F F F l F i",
    "unet_has_bf16": "i",
    "unet_training_has_bf16": "i",
    "unet_training_floats": "l l l l l l p i i i",
    "unet_training_forward": "s l l l l l p i i i p p F F F F F",
    "unet_training_backward": "s l l l l l p i F F F p p F F",
    "lanes": "i",
    "activation": "i n",
    "operation": "i n",
    "instruction_bytes": "i",
}
_SOURCES = {
    "mlp_training": "mlp_training.cpp",
    "unet": "unet.cpp",
    "unet_has_bf16": "unet.cpp",
    "unet_training_has_bf16": "unet_training.cpp",
    "unet_training_floats": "unet_training.cpp",
    "unet_training_forward": "unet_training.cpp",
    "unet_training_backward": "unet_training.cpp",
}  # kernels with their own library
_LANE_PRODUCTS = 5e8  # multiply-adds of a vector lane in a quarter of a second
_OUT_OF_MEMORY = 1  # a status
_functions: dict[str, Any] = {}


def _loaded(name: str) -> Any:
    if name not in _functions:
        source = _SOURCES.get(name, build.MAIN)
        library = build.load(source)
        if library is None:
            raise RuntimeError(f"the native kernels are not available: {build.unavailable_reason(source)}")
        function = getattr(library, f"fastsde_{name}")
        result, *arguments = _SIGNATURES[name].split()
        function.restype = _TYPES.get(result)
        function.argtypes = [*(_TYPES.get(each, ctypes.c_void_p) for each in arguments), ctypes.c_int]
        places = [(i, _DTYPES.get(each)) for i, each in enumerate(arguments) if each in ("p", *_DTYPES)]
        _functions[name] = (function, places, len(arguments), result == "s")
    return _functions[name]


def available(name: str) -> bool:
    """Returns whether a kernel is available, compiling it on first use."""
    return build.load(_SOURCES.get(name, build.MAIN)) is not None


def call(name: str, *arguments: Any) -> Any:
    """Runs a kernel on as many threads as PyTorch would use.

    Raises:
        TypeError: for a tensor that is not contiguous, not on the CPU, or of another dtype than the kernel takes.
        OutOfMemoryError: if the kernel cannot allocate its working memory.
        ValueError: for a code that the kernel does not know.
    """
    kernel, places, count, tells = _loaded(name)
    if len(arguments) != count:
        raise TypeError(f"the native kernel {name} takes {count} arguments, got {len(arguments)}")
    values = list(arguments)
    for i, dtype in places:
        each = values[i]
        if isinstance(each, Tensor):  # the checks of `address`, inlined: a call would cost as much as a small kernel
            fits = each.is_cpu and each.is_contiguous() and (dtype is None or each.dtype is dtype)
            values[i] = each.data_ptr() if fits else address(each, dtype)
    result = kernel(*values, torch.get_num_threads())
    if tells and result == _OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"the native kernel {name} cannot allocate its working memory")
    if tells and result:
        raise ValueError(f"the native kernel {name} was given a code that it does not know")
    return result


def function(name: str) -> Any:
    """Returns the kernel itself, for launchers that keep arguments between calls; its last argument is the threads."""
    return _loaded(name)[0]


@functools.cache
def _code(kind: str, name: str) -> int:
    code: int = call(kind, name.encode())
    return code


def has_code(kind: str, name: str) -> bool:
    """Returns whether the kernels know a name, where ``kind`` is "activation" or "operation"."""
    return _code(kind, name) >= 0


def code(kind: str, name: str) -> int:
    """Returns the number by which the kernels know a name.

    Raises:
        ValueError: if they do not know it.
    """
    if not has_code(kind, name):
        raise ValueError(f"{kind} must be one that the native kernels know, got {name!r}")
    return _code(kind, name)


def call_products() -> float:
    """Returns about how many multiply-adds a thread may do in a call: a quarter of a second of them.

    Between two calls Ctrl-C takes effect and the progress bar moves.
    """
    products: float = _LANE_PRODUCTS * call("lanes")
    return products


def pointers(tensors: Sequence[Tensor | None], dtype: torch.dtype | None = torch.float32) -> Any:
    """Returns an array of pointers to tensors, null for None; it does not keep the tensors alive.

    Args:
        dtype: of the tensors, or None if the launcher checks it.

    Raises:
        TypeError: as for `call`.
    """
    addresses = (None if each is None else address(each, dtype) for each in tensors)
    return (ctypes.c_void_p * len(tensors))(*addresses)


def address(tensor: Tensor, dtype: torch.dtype | None) -> int:
    """Returns the address of a tensor's elements.

    Args:
        dtype: the expected dtype, or None if the launcher checks it.

    Raises:
        TypeError: for a tensor that is not contiguous, not on the CPU, of another dtype, or without memory.
    """
    if not (tensor.is_cpu and tensor.is_contiguous() and (dtype is None or tensor.dtype is dtype)):
        wanted = f"contiguous{'' if dtype is None else f' {dtype}'} on the CPU"
        came = f"{tensor.dtype} of strides {tensor.stride()} on {tensor.device}"
        raise TypeError(f"a native kernel takes tensors that are {wanted}, got {came}")
    place = tensor.data_ptr()
    if not place and tensor.numel():  # for example a subclass that wraps other tensors, or a freed storage
        raise TypeError(f"a native kernel takes tensors that have memory, got a {type(tensor).__name__} without memory")
    return place
