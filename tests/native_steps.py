"""Training steps by the native kernel, without the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsde.training import native_mlp

__all__ = ["native_steps"]


def native_steps(
    model: nn.Module, shape: Sequence[int], data: Tensor, keys: Tensor, table: Tensor, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Takes steps of a network on samples of a shape, in place, as the first ones of Adam.

    Returns:
        Their losses, and Adam's first moment of each parameter.
    """
    from fastsde.kernels.cpu.mlp_training import Parameters, mlp_training

    native = native_mlp._native(model, shape)
    assert native is not None
    average, square = ({id(each): torch.zeros_like(each) for each in model.parameters()} for _ in range(2))
    options = {"scale": 1.0, "shift": 0.0, "betas": (0.9, 0.999), "epsilon": 1e-8, "first": 0, "taken": 0} | options
    with torch.no_grad():
        parameters = Parameters(native.weights(), native.items(average), native.items(square), None)
        losses = mlp_training(parameters, native.packed, data, keys, table, **options)
    return losses, [average[id(each)] for each in model.parameters()]
