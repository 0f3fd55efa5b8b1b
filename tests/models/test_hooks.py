"""Hooks of one module and of all modules: a network with hooks must not be run by other code."""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules import module

import fastsde
from fastsde.models import MLP, UNet
from fastsde.models.hooks import has_gradient_hooks, is_hooked


@pytest.mark.parametrize("register", [module.register_module_forward_hook, module.register_module_forward_pre_hook])
def test_hooks_of_all_modules_are_seen(register: object) -> None:
    assert not is_hooked(MLP(2))
    handle = register(lambda *args: None)
    try:
        assert is_hooked(MLP(2))
        assert is_hooked(UNet(channels=(16, 16)))
    finally:
        handle.remove()
    assert not is_hooked(MLP(2))


def test_a_sampler_runs_hooks_that_come_and_go() -> None:
    sampler = fastsde.Sampler(MLP(2, hidden=(4,)), (2,), steps=3)
    before = sampler(5)
    handle = module.register_module_forward_hook(lambda layer, args, out: 0 * out if type(layer) is MLP else None)
    try:
        assert torch.equal(sampler(5), fastsde.sample(lambda x, t: 0 * x, (5, 2), steps=3))
    finally:
        handle.remove()
    assert torch.equal(sampler(5), before)


def test_hooks_on_gradients_are_seen() -> None:
    model = MLP(2, hidden=(4,))
    layer = model.net[0]
    for register in (
        lambda: layer.weight.register_hook(lambda gradient: None),
        lambda: layer.weight.register_post_accumulate_grad_hook(lambda weight: None),
        lambda: layer.register_full_backward_hook(lambda *given: None),
        lambda: layer.register_full_backward_pre_hook(lambda *given: None),
        lambda: module.register_module_full_backward_hook(lambda *given: None),
        lambda: module.register_module_full_backward_pre_hook(lambda *given: None),
    ):
        assert not has_gradient_hooks(model)
        handle = register()
        assert has_gradient_hooks(model)
        assert not is_hooked(model)
        handle.remove()
    assert not has_gradient_hooks(model)
