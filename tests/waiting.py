"""Which operations of PyTorch wait for a GPU, as far as that can be detected with all tensors on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["HostReads", "refuse_waiting"]

# The result, or its size, depends on values on the device: PyTorch tags most such operations.
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.cudagraph_unsafe}
# Operations without such a tag that read values on the host, or the status of a linear-algebra solver.
_UNTAGGED = {
    "_coalesce",
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "_to_sparse",
    "is_nonzero",
    "linalg_eig",
    "linalg_lstsq",
    "linalg_matrix_exp",
    "linalg_pinv",
}
_INDEXED = {"index", "_unsafe_index"}
_WRITTEN = {"index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
# Reads from the device to the host that the dispatcher does not see on the CPU.
_READS = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}


def refuse_waiting(func: Any, arguments: dict[str, Any]) -> None:
    """Raises the error that a GPU raises during capture, for an operation that waits for it.

    Args:
        func: an overload of an operation.
        arguments: of this call, by name.
    """
    if _waits(func, func._schema.name.removeprefix("aten::"), arguments):
        raise RuntimeError(f"operation not permitted when stream is capturing: {func} waits for the device")


def _waits(func: Any, name: str, arguments: dict[str, Any]) -> bool:
    if name in _INDEXED:
        return _has_mask(arguments)
    if name in _WRITTEN:  # a single element from the host is filled in by masked_fill
        return _has_mask(arguments) and arguments["values"].numel() != 1
    if name == "repeat_interleave":
        return arguments.get("output_size") is None
    if name == "histc":
        return bool(arguments.get("min", 0) == arguments.get("max", 0))  # then the bounds come from the values
    if name == "normal":
        return isinstance(arguments.get("std"), Tensor)  # it is checked to be non-negative
    if name == "lift_fresh":  # a list, as in torch.tensor or an index: copied from memory that is not pinned
        return bool(arguments["self"].ndim > 0)
    checks = arguments.get("check_errors") is True
    return checks or name in _UNTAGGED or not _TAGS.isdisjoint(func.tags)


def _has_mask(arguments: dict[str, Any]) -> bool:
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in arguments["indices"])


class HostReads(TorchFunctionMode):
    """Refuses functions that read a tensor on the host, including ``to("cpu")`` with exactly that word."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to_cpu = func is Tensor.to and "cpu" in [
            each for each in (*args[1:], *(kwargs or {}).values()) if _is_text(each)
        ]
        if func in _READS or to_cpu:
            raise RuntimeError(
                f"operation not permitted when stream is capturing: {func.__name__} waits for the device"
            )
        return func(*args, **(kwargs or {}))


def _is_text(value: object) -> bool:
    return isinstance(value, str)
