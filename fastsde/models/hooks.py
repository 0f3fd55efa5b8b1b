"""Checks whether hooks may change what a module computes, or its gradients."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as _module

__all__ = ["has_gradient_hooks", "is_hooked"]


def is_hooked(model: nn.Module) -> bool:
    """Returns whether a module or a submodule has hooks or its own ``forward`` attribute, or global hooks exist.

    Such a module may compute anything.
    """
    return bool(_module._global_forward_hooks or _module._global_forward_pre_hooks) or any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )


def has_gradient_hooks(model: nn.Module) -> bool:
    """Returns whether a module, a submodule or a parameter has hooks that backward runs, or global ones exist."""
    if _module._global_backward_hooks or _module._global_backward_pre_hooks:
        return True
    parameters = any(each._backward_hooks or each._post_accumulate_grad_hooks for each in model.parameters())
    return parameters or any(each._backward_hooks or each._backward_pre_hooks for each in model.modules())
