"""The activations of MLPs: the one list of them, by the names that checkpoints and kernels call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["ACTIVATIONS", "Activation", "name_of"]


@dataclass(frozen=True)
class Activation:
    """A class of modules and what makes one of them this function.

    Args:
        module: the class.
        options: arguments of the class. A module whose attributes are equal to them is this function.
        also: what else has to be true of such a module.
    """

    module: type[nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    also: Callable[[Any], bool] = lambda module: True

    def build(self) -> nn.Module:
        """A new module."""
        return self.module(**self.options)

    def is_of(self, module: nn.Module) -> bool:
        """Returns whether a module computes this function; a subclass may compute anything."""
        if type(module) is not self.module:
            return False
        return all(getattr(module, name) == value for name, value in self.options.items()) and self.also(module)


ACTIVATIONS: dict[str, Activation] = {
    "LogSigmoid": Activation(nn.LogSigmoid),
    "SiLU": Activation(nn.SiLU),
    "ReLU": Activation(nn.ReLU),
    "Tanh": Activation(nn.Tanh),
    "GELU": Activation(nn.GELU, {"approximate": "none"}),
    "GELU_tanh": Activation(nn.GELU, {"approximate": "tanh"}),
    # Above its threshold, Softplus is the identity to the last bit of fp32.
    "Softplus": Activation(nn.Softplus, {"beta": 1}, lambda softplus: softplus.threshold >= 20),
    "Identity": Activation(nn.Identity),
}


def name_of(module: nn.Module) -> str | None:
    """The name of an activation, or None where it has none."""
    kind = type(module)
    for name, activation in ACTIVATIONS.items():
        if activation.module is kind and activation.is_of(module):
            return name
    return None
