"""The fingerprint of a network, which shows when things derived from it are out of date."""

from __future__ import annotations

import argparse
import collections
import functools
import gc
import pathlib
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
    """A callable object that holds a model."""

    def __init__(self, model: nn.Module) -> None:
        self.models, self.settings = [{"one": model}], types.SimpleNamespace(scale=1.0)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.models[0]["one"](x, t) * self.settings.scale

    def method(self, x: Tensor, t: Tensor) -> Tensor:
        return self(x, t)


def by_global(x: Tensor, t: Tensor) -> Tensor:
    return sum(MODEL(each, t) for each in (x,))


def callables(model: nn.Module) -> dict[str, Any]:
    """Returns a model in all the forms that a user may pass."""
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
    assert fingerprint(network).versions[0][1] is None  # such a tensor has no version counter of its own


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


class Raising:
    """Raises on every access."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    def __hash__(self) -> int:
        raise RuntimeError("no hash")

    def __bool__(self) -> bool:
        raise RuntimeError("no truth")


class Incomparable:
    """Cannot be compared, like an array, and has a property and a __getattr__ that raise."""

    def __init__(self) -> None:
        self.scale = 1.0

    def __eq__(self, other: object) -> Any:
        return np.ones(3) == 1

    __hash__ = None

    def __bool__(self) -> bool:
        raise RuntimeError("no truth")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")

    @property
    def table(self) -> Any:
        raise RuntimeError("no table")


class Slots:
    __slots__ = ("__weakref__", "empty", "scale")

    def __init__(self) -> None:
        self.scale = 1.0


class SlotsAlone:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Lying(list):
    """A list with an attribute, whose methods do not report its true entries."""

    scale = 0.0

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Any:
        raise RuntimeError("no entries")


class Number(int):
    """An int that cannot be compared."""

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")


def network_with(part: Any) -> nn.Module:
    network = nn.Identity()
    vars(network)["part"] = part  # not through the module, which would inspect it
    return network


def set_scale(part: Any) -> None:
    part.scale = 2.0


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "incomparable": (Incomparable, set_scale),
    "slots": (Slots, set_scale),
    "slots without weak references": (SlotsAlone, set_scale),
    "an attribute of a list": (Lying, set_scale),
    "a list of another length": (Lying, lambda part: part.append(1)),
    "a namespace": (lambda: argparse.Namespace(scale=1.0), set_scale),
    "an attribute of a function": (lambda: lambda x, t: x, set_scale),
    "a deque": (collections.deque, lambda part: part.append(1)),
    "a user's dict": (collections.UserDict, lambda part: part.update(scale=1)),
    "a small array": (lambda: np.ones(3), lambda part: part.fill(2)),
    "a bound method of a list": (lambda: [].append, lambda part: part(1)),
    "a signed zero": (lambda: [0.0], lambda part: part.__setitem__(0, -0.0)),
    "the keys of a dict": (lambda: {(1, 2): 0}, lambda part: part.update({(1, 3): part.pop((1, 2))})),
    "behind a weak reference": (lambda: weakref.ref(MODEL), lambda part: MODEL.train(not MODEL.training)),
    "a proxy": (lambda: weakref.proxy(MODEL), lambda part: MODEL.train(not MODEL.training)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_inside_of_odd_objects_are_seen(name: str) -> None:
    make, change = CHANGES[name]
    network = network_with(make())
    before = fingerprint(network)
    assert before.is_whole
    assert fingerprint(network).is_run_as(before)
    change(network.part)
    assert fingerprint(network).is_whole
    assert not fingerprint(network).is_run_as(before)
    assert not fingerprint(network).is_copied_as(before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Number(3),
        lambda: pathlib.Path("a/b"),
        lambda: slice(1, 2),
        lambda: np.float32(np.nan),
        lambda: np.zeros(3, dtype=[("a", "f4"), ("b", "i4", 2)]),
        lambda: torch.finfo(torch.float32),
        lambda: torch.Generator(),
        lambda: torch.Size([2]),
        lambda: torch.sum,
        lambda: object(),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.zeros(3).as_subclass(type("Own", (Tensor,), {})),
    ],
)
def test_odd_values_stay_what_they_are(make: Callable[[], Any]) -> None:
    network = network_with(make())
    before = fingerprint(network)
    assert before.is_whole
    assert fingerprint(network).is_run_as(before)
    assert fingerprint(network).is_copied_as(before)
    network.part = None
    assert not fingerprint(network).is_run_as(before)


def deep(levels: int) -> nn.Module:
    return functools.reduce(lambda inner, _: nn.Sequential(inner), range(levels), nn.Identity())


@pytest.mark.parametrize(
    "make",
    [
        lambda: network_with(Raising()),
        lambda: network_with(dict(enumerate([Raising()]))),
        lambda: network_with(torch.eye(3).to_sparse()),
        lambda: network_with(torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])),
        lambda: nn.LazyLinear(3),
        lambda: network_with(types.MappingProxyType({}).items()),
        lambda: deep(2000),
        lambda: half_way(),
        Raising,
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning", "ignore:Lazy modules:UserWarning")
def test_what_cannot_be_read_equals_nothing(make: Callable[[], Any]) -> None:
    network = make()
    before = fingerprint(network)
    assert not before.is_whole
    after = fingerprint(network)
    assert not after.is_run_as(before, after.differences(before))
    assert not after.is_copied_as(before)
    assert not before.is_run_as(before)


def half_way() -> nn.Module:
    """A module whose attributes are being removed."""
    network = nn.Linear(1, 1)
    del network._parameters
    return network


def test_an_object_that_is_gone_is_not_taken_for_one_in_its_place() -> None:
    network = network_with(SlotsAlone())
    before = fingerprint(network)
    for scale in (1.0, 2.0):
        del network.part
        network.part = SlotsAlone()  # likely at the same address
        network.part.scale = scale
    assert not fingerprint(network).is_run_as(before)
