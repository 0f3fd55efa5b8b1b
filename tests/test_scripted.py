"""Networks made by TorchScript, torch.export or torch.fx give the same samples as the original module."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsde
from fastsde import Sampler
from fastsde.engines.fingerprint import fingerprint
from fastsde.models import ConcatTime

# PyTorch 2.11's warning when a module of torch.export is copied.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")


class Net(nn.Module):
    """A small network with a buffer, nested layers, and attributes that are not tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.register_buffer("shift", torch.linspace(-0.5, 0.5, 3))
        self.scale = 0.5
        self.eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat((x, t[:, None]), dim=-1)) * self.scale + self.shift - x


@contextmanager
def deprecated() -> Iterator[None]:
    """Ignores the warning of newer versions that TorchScript is deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is (deprecated|not supported in Python)", Warning)
        yield


def made_of(kind: str, net: nn.Module) -> Any:
    example = torch.zeros(4, 3), torch.zeros(4)
    with deprecated():
        if kind == "scripted":
            return torch.jit.script(net)
        if kind == "traced":
            return torch.jit.trace(net, example)
        if kind == "frozen":
            return torch.jit.freeze(torch.jit.script(net))
    return torch.export.export(net, example).module() if kind == "exported" else torch.fx.symbolic_trace(net)


KINDS = ("scripted", "traced", "frozen", "exported", "fx")
OPTIONS: dict[str, Any] = {"steps": 5, "seed": 3}


class Holder(nn.Module):
    """A module that holds a network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x, t)


def reference(net: Any, **options: Any) -> Tensor:
    return fastsde.sample(net, (4, 3), backend="reference", **OPTIONS, **options)


def assert_close(ours: Tensor, theirs: Tensor, in_bf16: bool = False) -> None:
    # Normals differ by 4e-6, and the state rounds a few times per row; in bf16 the network's input rounds differently.
    atol = 5 * (10 * 2**-8 if in_bf16 else 8 * 10 * 2**-24 + 4e-6)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def assert_samples_of(model: Any, net: Any, **options: Any) -> None:
    for backend in ("auto", "eager"):
        ours = fastsde.sample(model, (4, 3), backend=backend, **OPTIONS, **options)
        assert_close(ours, reference(net, **options), in_bf16="dtype" in options)


def add_to_weights(value: float, *models: nn.Module) -> None:
    """Adds to the weights of all networks, once for shared weights."""
    with torch.no_grad():
        for weight in {weight.data_ptr(): weight for model in models for weight in model.parameters()}.values():
            weight.add_(value)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_the_module_and_follow_its_weights(kind: str) -> None:
    net = Net()
    model = made_of(kind, net)
    networks = (model, Holder(model), lambda x, t: model(x, t))
    for network in networks:
        assert_samples_of(network, net)
    if kind == "frozen":  # its weights are constants, which cannot be cast
        return
    for _ in range(2):
        for network in networks[:2]:
            assert_samples_of(network, net, dtype=torch.bfloat16)
        add_to_weights(0.25, model, net)
    assert_samples_of(model, net)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scripted", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_captures_follow_weights_and_modes(graphs: Any, kind: str) -> None:
    net = Net()
    model = made_of(kind, net)
    sampler = Sampler(model, (3,), steps=5, backend="graph")
    for _ in range(2):
        assert_close(sampler(4, seed=3), reference(net))
        assert len(graphs.recorded) == 1
        if kind != "frozen":
            add_to_weights(0.25, model, net)
    if kind in ("scripted", "traced"):
        model.train()
        assert_close(sampler(4, seed=3), reference(net))
        assert len(graphs.recorded) == 2
    assert_close(fastsde.sample(lambda x, t: model(x, t), (4, 3), backend="graph", **OPTIONS), reference(net))
    if kind != "frozen":
        ours = fastsde.sample(model, (4, 3), backend="graph", dtype=torch.bfloat16, **OPTIONS)
        assert_close(ours, reference(net, dtype=torch.bfloat16), in_bf16=True)


@pytest.mark.slow
def test_captures_and_copies_follow_attributes_of_a_script(graphs: Any) -> None:
    net = Net()
    model = made_of("scripted", net)
    sampler = Sampler(model, (3,), steps=5, backend="graph")
    for scale in (0.5, 2.0):
        net.scale = model.scale = scale
        assert_close(sampler(4, seed=3), reference(net))
        ours = fastsde.sample(model, (4, 3), backend="graph", dtype=torch.bfloat16, **OPTIONS)
        assert_close(ours, reference(net, dtype=torch.bfloat16), in_bf16=True)
    assert len(graphs.recorded) == 4


def test_what_a_bound_method_of_a_script_reads_is_not_known() -> None:
    model = made_of("scripted", Net())
    assert fingerprint(model).is_whole
    assert not fingerprint(model.forward).is_whole


@pytest.mark.parametrize("kind", ["scripted", "frozen"])
def test_a_network_of_x_and_t_in_one_may_be_a_script(kind: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    assert_samples_of(ConcatTime(made_of(kind, net)), ConcatTime(net))
