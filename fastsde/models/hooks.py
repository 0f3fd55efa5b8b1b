"""A check whether hooks may change what a module computes."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as _module

__all__ = ["is_hooked"]


def is_hooked(model: nn.Module) -> bool:
    """Returns whether a module or a submodule has hooks or its own ``forward`` attribute, or global hooks exist.

    Such a module may compute anything.
    """
    return bool(_module._global_forward_hooks or _module._global_forward_pre_hooks) or any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )
