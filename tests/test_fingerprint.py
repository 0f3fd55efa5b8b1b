"""What is seen of a network, so that what was derived from it is not used when it changes."""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastsde.engines.fingerprint import fingerprint
from fastsde.models import MLP, UNet

MODEL = MLP()


class Wrapper:
    """An object that is called, and holds a model."""

    def __init__(self, model: nn.Module) -> None:
        self.models, self.settings = [{"one": model}], types.SimpleNamespace(scale=1.0)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.models[0]["one"](x, t) * self.settings.scale

    def method(self, x: Tensor, t: Tensor) -> Tensor:
        return self(x, t)


def by_global(x: Tensor, t: Tensor) -> Tensor:
    return sum(MODEL(each, t) for each in (x,))


def callables(model: nn.Module) -> dict[str, Any]:
    """A model in all that a user may hand over."""
    held, wrapper = [model], Wrapper(model)
    inner = lambda x, t: model(x, t)  # noqa: E731
    return {
        "itself": model,
        "a closure": inner,
        "a closure in a closure": lambda x, t: inner(x, t),
        "a list in a closure": lambda x, t: held[0](x, t),
        "a default argument": lambda x, t, net=model: net(x, t),
        "a keyword's default": lambda x, t, *, net=model: net(x, t),
        "a partial": functools.partial(lambda net, x, t: net(x, t), model),
        "a method": model.forward,
        "an object": wrapper,
        "an object's method": wrapper.method,
        "a global": by_global,
        "compiled": torch.compile(model),
    }


@pytest.mark.parametrize("name", callables(MODEL))
def test_weights_are_found_wherever_a_callable_keeps_them(name: str) -> None:
    network = callables(MODEL)[name]
    before = fingerprint(network)
    assert fingerprint(network) == before
    assert before.is_run_as(before)
    assert {place[0] for place in before.places} == {parameter.data_ptr() for parameter in MODEL.parameters()}
    with torch.no_grad():
        for parameter in MODEL.parameters():
            parameter.add_(0.5)
    assert fingerprint(network) == before  # their values are read where they are
    weight = MODEL.net[0].weight
    MODEL.net[0].weight = nn.Parameter(weight.clone())
    assert not fingerprint(network).is_run_as(before)
    assert fingerprint(network).is_copied_as(before)
    MODEL.net[0].weight = weight
    MODEL.train(not MODEL.training)
    assert not fingerprint(network).is_run_as(before)
    MODEL.train(not MODEL.training)
    assert fingerprint(network) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda wrapper: setattr(wrapper.settings, "scale", 2.0),
        lambda wrapper: wrapper.models.append(MLP()),
        lambda wrapper: wrapper.models[0].update(two=1),
        lambda wrapper: setattr(wrapper, "other", np.zeros(3)),
        lambda wrapper: setattr(wrapper, "models", ({"one": MODEL},)),
        lambda wrapper: setattr(wrapper.settings, "scale", True),  # which equals 1.0
    ],
)
def test_attributes_of_plain_objects_are_seen(change: Callable[[Wrapper], object]) -> None:
    wrapper = Wrapper(MODEL)
    before = fingerprint(wrapper)
    change(wrapper)
    assert not fingerprint(wrapper).is_run_as(before)


def test_a_tensor_in_an_attribute_is_seen_to_move_and_for_a_copy_to_change() -> None:
    network = nn.Identity()
    network.table = torch.zeros(3)
    before = fingerprint(network)
    network.table.add_(1)
    assert fingerprint(network).is_run_as(before)
    assert not fingerprint(network).is_copied_as(before)
    network.table = network.table.clone()
    assert not fingerprint(network).is_run_as(before)
    with torch.inference_mode():
        network.table = torch.zeros(3)
    assert fingerprint(network).versions[0][1] is None  # such a tensor has no count of its own


def test_what_has_no_value_of_its_own_is_one_object() -> None:
    network = nn.Identity()
    network.nan, network.array, network.hook = float("nan"), np.ones(3), print
    before = fingerprint(network)
    assert fingerprint(network) == before
    network.array = np.ones(3)
    assert fingerprint(network) != before


def test_a_count_that_a_network_keeps_can_be_told_from_a_change() -> None:
    network = nn.Identity()
    network.calls, network.scale = 0, 1.0
    before = fingerprint(network)
    network.calls += 1
    after = fingerprint(network)
    counts = after.differences(before)
    assert len(counts) == 1
    network.calls += 5
    assert fingerprint(network).is_run_as(after, counts)
    network.scale = 2.0
    assert not fingerprint(network).is_run_as(after, counts)


def test_cycles_shared_parts_and_what_is_not_there_yet() -> None:
    network = MLP()
    network.itself, network.others = [network], {}
    network.others["cycle"] = network.others
    network.register_buffer("nothing", None)

    def early(x: Tensor, t: Tensor) -> Tensor:
        return later(x, t)

    assert fingerprint(early) == fingerprint(early)
    later = network
    tied = nn.Sequential(network, network)
    assert len(fingerprint(tied).places) == len(list(network.parameters()))
    assert fingerprint(tied) == fingerprint(tied)


def test_nothing_is_kept_alive() -> None:
    network = UNet(1, 8, (2, 3))
    network.register_forward_hook(lambda module, args, output: output)
    kept = fingerprint(network)
    parts = [weakref.ref(part) for part in (network, *network.modules(), *network.parameters())]
    del network
    gc.collect()
    assert all(part() is None for part in parts)
    assert kept == kept


def test_a_new_object_in_the_place_of_an_old_one_is_another() -> None:
    network = nn.Identity()
    network.part = Wrapper(MODEL)
    before = fingerprint(network)
    del network.part
    network.part = Wrapper(MODEL)  # likely at the same address
    assert fingerprint(network) != before


def test_a_long_list_is_one_object() -> None:
    network = nn.Identity()
    network.table = list(range(100_000))
    assert len(fingerprint(network).structure) < 20
