"""Whether a module computes what its class says."""

from __future__ import annotations

from torch import nn

__all__ = ["is_hooked"]


def is_hooked(model: nn.Module) -> bool:
    """Returns whether a module or a submodule has hooks or a ``forward`` of its own, and so may compute anything."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )
