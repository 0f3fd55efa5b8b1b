"""TF32 on NVIDIA GPUs: whether PyTorch multiplies fp32 numbers in it, and a network whose products are rounded to it.

Whether PyTorch's own kernels do so depends on the shape even if they may: for one image cuDNN may choose a kernel that
multiplies in fp32. Rounding shows what TF32 does to a network whatever kernels are chosen.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .reference import Model

__all__ = ["may_multiply", "rounded", "with_rounded_products"]

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_CONVOLUTIONS += (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)  # type: ignore[assignment]
_MATRICES = (F.linear, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)


def may_multiply(convolutions: bool, device: torch.device) -> bool:
    """Returns whether PyTorch may multiply fp32 numbers in TF32, in convolutions or in matrix products."""
    if device.type != "cuda" or (torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)):
        return False
    backends: Any = torch.backends
    of = (backends.cudnn.conv, backends.cudnn) if convolutions else (backends.cuda.matmul,)
    # PyTorch's newer switches, which also reflect the older ones; the older ones fail once a newer one is used.
    precision = next((each.fp32_precision for each in (*of, backends) if each.fp32_precision != "none"), "ieee")
    return bool(precision == "tf32")


def rounded(x: Tensor) -> Tensor:
    """Rounds fp32 to the nearest numbers of 11 significant bits (T. J. Dekker, A floating-point technique for extending
    the available precision, 1971). Numbers above 2^115 and infinity become NaN.
    """
    scaled = x * (2.0**13 + 1)
    return scaled - (scaled - x)


class _RoundedProducts(TorchFunctionMode):
    def __init__(self, functions: tuple[Any, ...]) -> None:
        super().__init__()
        self._functions = functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._functions:
            args = [rounded(a) if i < 2 and a.dtype == torch.float32 else a for i, a in enumerate(args)]
        return func(*args, **(kwargs or {}))


def with_rounded_products(model: Model, device: torch.device) -> Model | None:
    """Returns the network with the factors of its fp32 products rounded to TF32, where PyTorch may do so, or None.

    Covers convolutions, linear layers and products of two matrices, not `torch.einsum` or attention in one operation.
    """
    functions: tuple[Any, ...] = ()
    for convolutions, these in ((True, _CONVOLUTIONS), (False, _MATRICES)):
        functions += these if may_multiply(convolutions, device) else ()
    if not functions:
        return None

    def run(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        with _RoundedProducts(functions):
            return model(x, t, **kwargs)

    return run
