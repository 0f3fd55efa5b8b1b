"""The activations of MLPs, under the names that checkpoints and kernels use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Activation", "Sin", "name_of"]


class Sin(nn.Module):
    """The sine, of networks such as SIREN (Sitzmann et al. 2020, arXiv:2006.09661)."""

    def forward(self, x: Tensor) -> Tensor:
        """Computes sin x."""
        return torch.sin(x)


@dataclass(frozen=True)
class Activation:
    """An activation function, as a module class with its arguments.

    Args:
        module: the class.
        options: arguments of the class. A module whose attributes are equal to them computes this function.
        also: a further condition that such a module must fulfill.
    """

    module: type[nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    also: Callable[[Any], bool] = lambda module: True

    def build(self) -> nn.Module:
        """Builds a new module."""
        return self.module(**self.options)

    def is_of(self, module: nn.Module) -> bool:
        """Returns whether a module computes this function; never for a subclass, which may compute anything."""
        if type(module) is not self.module:
            return False
        return all(getattr(module, name) == value for name, value in self.options.items()) and self.also(module)


ACTIVATIONS: dict[str, Activation] = {
    "LogSigmoid": Activation(nn.LogSigmoid),
    "SiLU": Activation(nn.SiLU),
    "ReLU": Activation(nn.ReLU),
    "LeakyReLU": Activation(nn.LeakyReLU, {"negative_slope": 0.01}),
    "ELU": Activation(nn.ELU, {"alpha": 1.0}),
    "Tanh": Activation(nn.Tanh),
    "Sigmoid": Activation(nn.Sigmoid),
    "GELU": Activation(nn.GELU, {"approximate": "none"}),
    "GELU_tanh": Activation(nn.GELU, {"approximate": "tanh"}),
    # Above its threshold, Softplus is the identity to the last bit of fp32.
    "Softplus": Activation(nn.Softplus, {"beta": 1}, lambda softplus: softplus.threshold >= 20),
    "Mish": Activation(nn.Mish),
    "Sin": Activation(Sin),
    "Identity": Activation(nn.Identity),
}


def name_of(module: nn.Module) -> str | None:
    """Returns the name of an activation, or None if it is not one of these."""
    kind = type(module)
    for name, activation in ACTIVATIONS.items():
        if activation.module is kind and activation.is_of(module):
            return name
    return None
