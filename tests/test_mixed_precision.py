"""Training of master weights with a low-precision copy: the results of autocast, which casts weights one by one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from launches import Launches, watching
from torch import nn

from fastsde.engines.mixed_precision import LowPrecisionCopy
from fastsde.models import MLP, UNet


def run(network: nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f: torch.Tensor = network(x, t)
    f.float().square().mean().backward()
    return f


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("make", "shape"), [(MLP, (2,)), (lambda: UNet(channels=(4, 5, 6)), (1, 28, 28))], ids=["MLP", "U-Net"]
)
def test_outputs_and_gradients_are_those_of_autocast(make: Any, shape: tuple[int, ...], layout: Any) -> None:
    model = make().to(memory_format=layout)
    reference, made = copy.deepcopy(model), LowPrecisionCopy(model, torch.bfloat16)
    for scale in (1.0, 1.5):  # gradients must not carry over to the next step
        for network in (model, reference):
            torch._foreach_mul_([each.detach() for each in network.parameters()], scale)
        x, t = torch.randn(3, *shape), torch.rand(3)
        reference.zero_grad()
        expected = run(reference, x, t)
        made.refresh()
        found = run(made.network, x.bfloat16(), t)  # as written by the noising; autocast rounds it later
        made.hand_over()
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert ours.grad.dtype == torch.float32
            assert ours.grad.stride() == ours.stride()
            assert torch.equal(ours.grad, theirs.grad)


def test_all_weights_are_cast_at_once_and_all_gradients() -> None:
    model = MLP()
    made = LowPrecisionCopy(model, torch.bfloat16)
    x, t = torch.randn(3, 2).bfloat16(), torch.rand(3)
    with watching(Launches()) as launches:
        made.refresh()
        run(made.network, x, t)
        made.hand_over()
    assert launches.names.count("_foreach_copy_") == 2
    assert launches.names.count("_to_copy") == 3  # t, and the loss in fp32 and back
    LowPrecisionCopy(model, torch.bfloat16).hand_over()  # of a network that uses none of its parameters
    assert all(each.grad is None for each in model.parameters())
