"""Score networks, called as ``model(x, t)`` with x ``[B, *shape]`` and t ``[B]``."""

from __future__ import annotations

from typing import Any

from torch import nn

from .mlp import MLP
from .unet import UNet

__all__ = ["MLP", "UNet", "from_config"]

_ARCHITECTURES: dict[str, type[MLP] | type[UNet]] = {"MLP": MLP, "UNet": UNet}


def from_config(config: dict[str, Any]) -> nn.Module:
    """The model that ``model.config`` describes, freshly initialised.

    Raises:
        ValueError: for an architecture that this package does not have.
    """
    options = dict(config)
    architecture = options.pop("architecture", None)
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(_ARCHITECTURES)}, got {architecture!r}")
    return _ARCHITECTURES[architecture](**options)
