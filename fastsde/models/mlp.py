"""A multilayer perceptron with t as one more input: the tutorial's swiss-roll network, generalized."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..validation import check_int, check_ints
from .activations import ACTIVATIONS, name_of
from .hooks import is_hooked
from .labels import LabelEmbedding, check_conditions

__all__ = ["MLP", "ConcatTime", "check_sample_shape", "is_sequential", "linear_layers"]


class MLP(nn.Module):
    """Linear layers and activations on the concatenation of x, flattened, and t.

    ``net`` is a plain ``nn.Sequential`` with the layout of the tutorial's own network. What a label or a vector
    contributes is added to the output of its first layer.

    Args:
        shape: the shape of one sample (``()`` for a plain number), or its length.
        hidden: the widths of the hidden layers.
        activation: "LogSigmoid", "SiLU", "ReLU", "LeakyReLU", "ELU", "Tanh", "Sigmoid", "GELU", "GELU_tanh",
            "Softplus", "Mish", "Sin" or "Identity" (``fastsde.models.activations.ACTIVATIONS``).
        classes: the number of classes, for a network that also takes a ``label``; 0 for none.
        condition: the length of a vector that the network also takes, as ``condition``; 0 for none.

    Raises:
        TypeError, ValueError: for sizes that are not positive ints, or an unknown activation; for a condition without
            hidden layers.
    """

    def __init__(
        self,
        shape: int | Sequence[int] = 2,
        hidden: Sequence[int] = (64, 64, 64),
        activation: str = "LogSigmoid",
        classes: int = 0,
        condition: int = 0,
    ) -> None:
        super().__init__()
        self.classes, self.condition = check_int("classes", classes, 0), check_int("condition", condition, 0)
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
        if (self.classes or self.condition) and not self.hidden:
            raise ValueError("hidden must have a layer for classes or condition to be added to, got none")
        self.labels = LabelEmbedding(self.classes, self.hidden[0]) if self.classes else None
        self.vectors = nn.Linear(self.condition, self.hidden[0], bias=False) if self.condition else None

    @property
    def config(self) -> dict[str, Any]:
        """The arguments from which `fastsde.models.from_config` builds this architecture."""
        return {
            "architecture": "MLP",
            "shape": list(self.shape),
            "hidden": list(self.hidden),
            "activation": self.activation,
            **{name: value for name in ("classes", "condition") if (value := getattr(self, name))},
        }

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Maps x ``[B, *shape]`` and t ``[B]`` to ``[B, *shape]``.

        Args:
            label: integers ``[B]`` in [0, classes]; None, like ``classes``, stands for no label.
            condition: vectors ``[B, condition]``; None, like zeros, stands for no condition.

        Raises:
            TypeError: for a label or condition that the network has no weights for.
        """
        check_conditions(self, label=(label, self.labels), condition=(condition, self.vectors))
        inputs = torch.cat((x[:, None].flatten(1), t[:, None].to(x.dtype)), dim=1)
        if self.labels is None and self.vectors is None:
            result: Tensor = self.net(inputs)
            return result.reshape(x.shape)
        h: Tensor = self.net[0](inputs)
        if self.labels is not None:
            h = h + self.labels(label, t)
        if self.vectors is not None and condition is not None:
            h = h + self.vectors(condition.to(h.dtype))
        for layer in self.net[1:]:
            h = layer(h)
        return h.reshape(x.shape)


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


def with_time(model: nn.Module) -> nn.Module:
    """Returns a bare ``nn.Sequential`` as a `ConcatTime` of it, and any other network as it is."""
    return ConcatTime(model) if is_sequential(model) else model


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
    if isinstance(model, MLP) and (model.labels is not None or model.vectors is not None):
        return None
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
