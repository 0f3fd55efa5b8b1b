"""Where kernels run, and in which form they take tensors."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..dynamo import constant

__all__ = [
    "contiguous",
    "find_kernel",
    "has_kernels",
    "has_native",
    "has_triton",
    "interpreter_problem",
    "is_plain",
    "kernel",
    "multiplies_bf16",
    "native_state",
    "needs_grad",
]

_PLAIN = (Tensor, nn.Parameter, type(None))
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux names them, the last on Arm
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def has_triton(device: torch.device) -> bool:
    """Returns whether Triton kernels run on a device: a GPU of capability 8.0 up, or the CPU with TRITON_INTERPRET."""
    if not _HAS_TRITON:
        return False
    kind = device.type
    if kind == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    interpret = os.environ.get("TRITON_INTERPRET") if kind == "cpu" else None
    return interpret is not None and interpret.lower() in ("1", "true", "yes", "on", "y")


@constant
def has_native(device: torch.device, name: str = "solver_step") -> bool:
    """Returns whether a native kernel runs on a device: the CPU, with a compiler and without Triton's interpreter.

    The kernels are compiled on first use, in about two seconds, unless an earlier process has done so.
    """
    return device.type == "cpu" and not has_triton(device) and _is_available(name)


def _is_available(name: str) -> bool:
    found: bool = _module("..kernels.cpu.library").available(name)
    return found


def native_state() -> str:
    """Returns a description of the native kernels for the CPU: "yes" with their library, or "no" with the reason."""
    from ..kernels.cpu import build

    library, reason = build.load(), build.unavailable_reason()
    return f"no: {reason}" if library is None else f"yes, {library._name}"


@functools.cache
def multiplies_bf16() -> bool:
    """Returns whether this CPU multiplies bf16 in hardware, or True if that is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return True
    flags = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), None)
    return flags is None or not _BF16.isdisjoint(flags)


def has_kernels(device: torch.device) -> bool:
    """Returns whether native or Triton kernels run on a device."""
    return has_native(device) or has_triton(device)


def find_kernel(name: str, device: torch.device) -> Any | None:
    """Returns the module of a kernel's launcher, as `kernel` does, or None if no kernel runs on the device."""
    if has_native(device):
        return _module(f"..kernels.cpu.{name}")
    return kernel(name, device) if has_triton(device) else None


def interpreter_problem() -> str | None:
    """Returns why Triton's interpreter does not run with the installed NumPy, or None if it does.

    Triton 3.6 converts arrays of one element to Python integers, which NumPy 2.4 and later refuse. This is not among
    the requirements of the package, since compiled kernels do not need NumPy.
    """
    triton, numpy = (importlib.import_module(name).__version__ for name in ("triton", "numpy"))
    if _release(triton) >= (3, 7) or _release(numpy) < (2, 4):
        return None
    return (
        f"Triton {triton} cannot interpret kernels with NumPy {numpy}: install 'numpy<2.4', or a PyTorch with Triton "
        f"3.7 or later; without TRITON_INTERPRET nothing is interpreted"
    )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def kernel(name: str, device: torch.device) -> Any:
    """Returns the module of a kernel's launcher for a device that `has_kernels`.

    Raises:
        RuntimeError: if Triton's interpreter is asked for but does not run.
    """
    is_triton = has_triton(device)
    problem = interpreter_problem() if is_triton and device.type == "cpu" else None
    if problem is not None:
        raise RuntimeError(problem)
    return _module(f"..kernels.{'' if is_triton else 'cpu.'}{name}")


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(name, __package__)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Returns whether a tensor needs a gradient, backward or forward, or a ``torch.func`` transformation is active."""
    if _is_transformed():
        return True
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110 (any() of a generator takes three times as long)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _is_transformed() -> bool:
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def is_plain(*tensors: Tensor | None) -> bool:
    """Returns whether these are plain tensors, or None, outside of any tracing or dispatch mode, so that a kernel may
    use their memory without PyTorch's dispatcher.
    """
    if _is_transformed() or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() != 0:
        return False
    for tensor in tensors:  # noqa: SIM110 (see above)
        if type(tensor) not in _PLAIN:
            return False
    return True


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Returns the tensors in contiguous memory, as the kernels take them."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
