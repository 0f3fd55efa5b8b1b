"""Whether a module computes what its class says."""

from __future__ import annotations

from torch import nn

__all__ = ["is_hooked"]


def is_hooked(model: nn.Module) -> bool:
    """Whether a module, or one inside of it, has hooks or a ``forward`` of its own: it may then compute anything."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )
