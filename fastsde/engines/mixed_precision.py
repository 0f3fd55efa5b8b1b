"""Training in a low precision, with weights in full precision."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..models.hooks import has_gradient_hooks

__all__ = ["LowPrecisionCopy"]

_LOW = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


class LowPrecisionCopy:
    """A low-precision copy of a network, which runs in its place; the network keeps the master weights.

    ``torch.autocast`` casts each weight, and each gradient, with a kernel of its own: 44 in a step of the tutorial's
    U-Net. Here one kernel casts all weights, and one all gradients, to the same numbers. The rest runs under autocast
    as before.

    Args:
        model: a network that `fits`.
        dtype: the low precision.
    """

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Returns whether all parameters belong to layers that autocast runs in the low precision, or embeddings.

        Buffers and hooks on gradients are not allowed: those of a copy are not the network's.
        """
        owners = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
        if has_gradient_hooks(model) or any(True for _ in model.buffers()):
            return False
        return all(type(each) in _LOW or isinstance(each, nn.Embedding) for each in owners)

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.network = copy.deepcopy(model).to(dtype)
        self._masters: list[Tensor] = list(model.parameters())
        self._weights: list[Tensor] = list(self.network.parameters())
        self._trained = [number for number, each in enumerate(self._masters) if each.requires_grad]
        for number in self._trained:
            master = self._masters[number]
            master.grad = torch.zeros_like(master, requires_grad=False)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the weights from the network, and drops the gradients."""
        torch._foreach_copy_(self._weights, self._masters)
        for weight in self._weights:
            weight.grad = None

    @torch.no_grad()
    def hand_over(self) -> None:
        """Copies the gradients to the network; a parameter that the network does not use has none."""
        theirs, ours = list[Tensor](), list[Tensor]()
        for number in self._trained:
            master, gradient = self._masters[number], self._weights[number].grad
            if gradient is None:
                master.grad = None
                continue
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            theirs.append(master.grad)
            ours.append(gradient)
        if ours:
            torch._foreach_copy_(theirs, ours)
