"""Score networks, called as ``model(x, t)`` with x ``[B, *shape]`` and t ``[B]``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..validation import check_instance
from .mlp import MLP, ConcatTime
from .preconditioned import Preconditioned
from .sinusoidal import Sinusoidal
from .unet import UNet
from .unwrap import shape_of, unwrap

__all__ = ["MLP", "ConcatTime", "Preconditioned", "Sinusoidal", "UNet", "from_config", "shape_of", "unwrap"]

# The AVX-512 log1p that PyTorch ships loads its result for -0 with a masked load. Until the page of that constant has
# really been read once, every masked-off load of it is slow: log1p takes some 15 times as long and log sigmoid 5 to 10
# times, in every thread of the process. This call reads the page.
torch.log1p(torch.full((64,), -0.0, dtype=torch.float32, device="cpu"))

_ARCHITECTURES: dict[str, type[MLP] | type[UNet]] = {"MLP": MLP, "UNet": UNet}


class _Fp32(TorchFunctionMode):
    """Makes parameters fp32 whatever the default dtype is, which is not changed since it is shared by all threads."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        return func(*args, **kwargs)


def from_config(config: Mapping[str, Any]) -> nn.Module:
    """Builds the model that ``model.config`` describes, freshly initialized, in fp32 whatever PyTorch's default dtype.

    Args:
        config: ``{"architecture": "MLP"}`` or ``{"architecture": "UNet"}``, with the arguments of the class.

    Raises:
        TypeError, ValueError: for an unknown architecture, or arguments that it does not take.
    """
    check_instance("config", config, Mapping)
    options = dict(config)
    architecture = options.pop("architecture", None)
    if architecture not in tuple(_ARCHITECTURES):
        raise ValueError(f"architecture must be one of {', '.join(_ARCHITECTURES)}, got {architecture!r}")
    with _Fp32():
        return _ARCHITECTURES[architecture](**options)
