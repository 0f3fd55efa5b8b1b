"""A multilayer perceptron with t as one more input: the tutorial's swiss-roll network, generalized."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..validation import check_ints
from .activations import ACTIVATIONS, name_of
from .hooks import is_hooked

__all__ = ["MLP", "ConcatTime", "check_sample_shape", "is_sequential", "linear_layers"]


class MLP(nn.Module):
    """Linear layers and activations on the concatenation of x, flattened, and t.

    ``net`` is a plain ``nn.Sequential`` with the layout of the tutorial's own network.

    Args:
        shape: the shape of one sample (``()`` for a plain number), or its length.
        hidden: the widths of the hidden layers.
        activation: a name in `fastsde.models.activations.ACTIVATIONS`, such as LogSigmoid or SiLU.

    Raises:
        TypeError, ValueError: for sizes that are not positive ints, or an unknown activation.
    """

    def __init__(
        self, shape: int | Sequence[int] = 2, hidden: Sequence[int] = (64, 64, 64), activation: str = "LogSigmoid"
    ) -> None:
        super().__init__()
        self.shape = check_ints("shape", (shape,) if isinstance(shape, numbers.Integral) else shape, 1)
        self.hidden, self.activation = check_ints("hidden", hidden, 1), activation
        if activation not in tuple(ACTIVATIONS):
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        data_dim = math.prod(self.shape)
        layers: list[nn.Module] = []
        width = data_dim + 1
        for next_width in self.hidden:
            layers += [nn.Linear(width, next_width), ACTIVATIONS[activation].build()]
            width = next_width
        self.net = nn.Sequential(*layers, nn.Linear(width, data_dim))

    @property
    def config(self) -> dict[str, Any]:
        """The arguments from which `fastsde.models.from_config` builds this architecture."""
        return {
            "architecture": "MLP",
            "shape": list(self.shape),
            "hidden": list(self.hidden),
            "activation": self.activation,
        }

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Maps x ``[B, *shape]`` and t ``[B]`` to ``[B, *shape]``."""
        result: Tensor = self.net(torch.cat((x[:, None].flatten(1), t[:, None].to(x.dtype)), dim=1))
        return result.reshape(x.shape)


class ConcatTime(nn.Module):
    """A network of ``cat((x, t), -1)``, such as an ``nn.Sequential`` of Linear layers, called as ``model(x, t)``.

    Args:
        net: maps ``[B, d + 1]`` to ``[B, d]``. It is not copied.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.training = getattr(net, "training", True)  # a frozen TorchScript module has no mode

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Maps x ``[B, d]`` and t ``[B]`` to ``[B, d]``."""
        result: Tensor = self.net(torch.cat((x, t[:, None].to(x.dtype)), dim=-1))
        return result


def is_sequential(model: object) -> bool:
    """Returns whether a network is an ``nn.Sequential``, which is called with ``cat((x, t), -1)``."""
    return (
        isinstance(model, nn.Sequential)
        and type(model).forward is nn.Sequential.forward
        and "forward" not in vars(model)
    )


def check_sample_shape(model: object, shape: Sequence[int]) -> None:
    """Raises ValueError for samples that a network of ``cat((x, t), -1)`` cannot take.

    Args:
        model: the first layer of an ``nn.Sequential`` or a `ConcatTime` is checked; other models pass.
        shape: the shape of one sample.
    """
    net = model.net if type(model) is ConcatTime else model
    if not is_sequential(net) and net is model:
        return
    while isinstance(net, nn.Sequential) and len(net):
        net = net[0]
    # A lazy layer does not know its inputs yet.
    inputs = net.in_features - 1 if isinstance(net, nn.Linear) and net.in_features else None
    if len(shape) == 1 and inputs in (None, shape[0]):
        return
    expected, reason = "[d]", "for other samples wrap it in a module or function that is called as model(x, t)"
    if inputs is not None:
        expected, reason = f"[{inputs}]", f"its first Linear takes {inputs + 1} features, those of x and t"
    raise ValueError(
        f"a {type(model).__name__} is called with cat((x, t), -1), on samples of shape {expected}, got {list(shape)}: "
        f"{reason}"
    )


def _fit(linears: Sequence[nn.Linear]) -> bool:
    """Returns whether each layer fits the one before it, and each bias its weight (PyTorch broadcasts other shapes)."""
    width = linears[0].in_features
    for linear in linears:
        out, bias = linear.out_features, linear.bias
        if linear.weight.shape != (out, width) or (bias is not None and bias.shape != (out,)):
            return False
        width = out
    return True


def linear_layers(model: object) -> tuple[list[nn.Linear], list[str]] | None:
    """Returns the Linear layers of an MLP of ``cat((x, t), -1)``, and the names of the activations between them.

    Returns None for any other network. ``model`` is an `MLP`, a `ConcatTime` of a Sequential, or the Sequential itself.
    """
    # Only the exact classes, without hooks: subclasses and hooks may compute anything.
    net = model.net if isinstance(model, (MLP, ConcatTime)) and type(model) in (MLP, ConcatTime) else model
    if not isinstance(model, nn.Module) or not isinstance(net, nn.Sequential) or type(net) is not nn.Sequential:
        return None
    linears: list[nn.Linear] = []
    activations: list[str] = []
    for module in net:
        name = name_of(module)
        if type(module) is nn.Linear:
            activations += ["Identity"] * (len(linears) - len(activations))
            linears.append(module)
        elif name is not None and len(activations) == len(linears) - 1:
            activations.append(name)
        else:
            return None
    whole = linears and len(activations) == len(linears) - 1 and _fit(linears)
    return (linears, activations) if whole and not is_hooked(model) else None
