"""The network as an engine calls it: what runs instead of the model, and what happens if compiling fails."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsde
from fastsde import Sampler
from fastsde.engines.network import Network
from fastsde.engines.unet_inference import UNetInference
from fastsde.models import MLP, UNet

X, T = torch.randn(3, 1, 8, 8), torch.rand(3)


class Convolution(nn.Module):
    """A convolution that records the layout of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 3, padding=1)
        self.layouts: list[bool] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.layouts.append(x.is_contiguous(memory_format=torch.channels_last))
        return self.layer(x)


def small_unet() -> UNet:
    return UNet(1, 8, (2, 3))


# What runs instead of the model -----------------------------------------------------------------------------------


def test_a_convolutional_copy_for_a_gpu_is_channels_last() -> None:
    model = Convolution()
    network = Network(model, torch.bfloat16, device=torch.device("cuda"))  # the layout is chosen by the device's name
    x = torch.randn(2, 2, 5, 5)
    f = network(x, T[:2])
    assert f.dtype == torch.bfloat16
    assert network._run.layouts == [True]
    assert not model.layouts
    torch.testing.assert_close(f.float(), model(x, T[:2]), rtol=2**-6, atol=2**-6)
    Network(model)(x, T[:2])
    assert model.layouts == [False, False]  # the user's own model is unchanged
    assert not Network(MLP(), torch.bfloat16, device=torch.device("cuda"))._channels_last


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_unet_is_run_in_its_inference_form_and_its_weights_are_seen(dtype: torch.dtype | None) -> None:
    model = small_unet()
    sampler = Sampler(model, (1, 8, 8), steps=4, dtype=dtype)
    assert isinstance(sampler._network._run, UNetInference)
    before = sampler(2)
    with torch.no_grad():
        model.head[1].weight.mul_(2)
    after = sampler(2)
    assert not torch.equal(before, after)
    expected = fastsde.sample(model, (2, 1, 8, 8), steps=4, dtype=dtype, backend="reference")
    tolerance = 1e-4 if dtype is None else 0.1
    torch.testing.assert_close(after, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def _follows_labels_guidance_and_weights(backend: str) -> None:
    torch.manual_seed(0)
    model = UNet(1, 4, (2, 3), embedding=8, classes=3)
    for level in model.modulation.levels:  # which begin at zero
        nn.init.normal_(level.weight)
    options: dict[str, Any] = {"steps": 2, "guidance": 1.5}
    sampler, found = Sampler(model, (1, 4, 4), backend=backend, **options), []
    assert isinstance(sampler._network._run, UNetInference)
    for label in (torch.tensor([0, 1, 2]), torch.tensor([3, 0, 1])):
        given = {"model_kwargs": {"label": label}, "uncond_kwargs": {"label": torch.full((3,), 3)}}
        found.append(sampler(3, seed=5, **given))
        expected = fastsde.sample(model, (3, 1, 4, 4), seed=5, backend="reference", **given, **options)
        torch.testing.assert_close(found[-1], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        with torch.no_grad():
            model.modulation.second.bias.add_(0.3)
    assert sampler.last_backend == backend
    assert (found[0] - found[1]).abs().amax((1, 2, 3)).min() > 1e-2


def test_a_unet_follows_labels_guidance_and_weights() -> None:
    _follows_labels_guidance_and_weights("eager")


@pytest.mark.slow
@pytest.mark.usefixtures("large_convolution_tiles")
def test_so_it_does_in_a_graph(graphs: Any) -> None:
    _follows_labels_guidance_and_weights("graph")
    assert len(graphs.recorded) == 1


def test_the_reference_and_fp64_run_the_model_itself() -> None:
    model = small_unet()
    assert Sampler(model, (1, 8, 8), backend="reference")._network._run is model
    assert isinstance(Sampler(model, (1, 8, 8), dtype=torch.float64)._network._run, UNet)


def test_a_unet_that_may_compute_anything_is_run_itself() -> None:
    hooked = small_unet()
    hooked.head[0].register_forward_hook(lambda module, args, output: 2 * output)
    replaced = small_unet()
    replaced.head[1] = nn.Sequential(replaced.head[1], nn.Tanh())
    circular = small_unet()
    circular.encoder[1].padding_mode = "circular"
    dilated = small_unet()
    dilated.head[0] = nn.Conv2d(4, 2, 3, padding=2, dilation=2)
    modulated = UNet(1, 8, (2, 3), embedding=4)
    modulated.modulation.first.register_forward_hook(lambda module, args, output: 2 * output)
    unbiased = small_unet()
    unbiased.head[1] = nn.Conv2d(2, 1, 3, padding=1, bias=False)
    subclass = type("Other", (UNet,), {"forward": lambda self, x, t: -x})(1, 8, (2, 3))
    for model in (hooked, replaced, circular, dilated, modulated, unbiased, subclass):
        assert Sampler(model, (1, 8, 8))._network._run is model


def test_copies_are_shared_by_samplers_and_made_anew_for_another_structure() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    wrapped = fastsde.models.ConcatTime(model)
    first, second = (Network(wrapped, torch.bfloat16) for _ in range(2))
    assert first._run is second._run
    model[0] = nn.Linear(3, 2)
    x, t = torch.randn(4, 2), torch.rand(4)
    first.refresh()
    expected = Network(fastsde.models.ConcatTime(nn.Sequential(model[0])), torch.bfloat16)(x, t)
    assert torch.equal(first(x, t), expected)


class Scaled(nn.Module):
    """A network with attributes that are not weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(2, 2), nn.SiLU()
        self.scale, self.shift, self.mean = 1.0, [0.0], torch.zeros(2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        f = self.activation(self.linear(x)) * self.scale + self.shift[0] - x
        return f + self.mean.to(x.dtype)


CHANGES = {
    "a number": lambda model: setattr(model, "scale", 5.0),
    "a number in a list": lambda model: model.shift.__setitem__(0, 1.0),
    "a layer": lambda model: setattr(model, "activation", nn.ReLU()),
    "a hook": lambda model: model.linear.register_forward_hook(lambda module, args, output: 2 * output),
    "a forward": lambda model: setattr(model, "forward", lambda x, t: -x),
    "a tensor": lambda model: setattr(model, "mean", torch.ones(2)),
    "a tensor in place": lambda model: model.mean.add_(1),
    "a weight": lambda model: model.linear.weight.data.mul_(3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_copy_is_made_again_where_the_model_has_changed(change: Callable[[nn.Module], object]) -> None:
    model = Scaled()
    sampler = Sampler(model, (2,), steps=4, dtype=torch.bfloat16)
    before, copied = sampler(3), sampler._network._run
    assert torch.equal(sampler(3), before)
    assert sampler._network._run is copied
    change(model)
    expected = fastsde.sample(copy.deepcopy(model), (3, 2), steps=4, dtype=torch.bfloat16)
    assert not torch.equal(expected, before)
    assert torch.equal(sampler(3), expected)
    assert torch.equal(fastsde.sample(model, (3, 2), steps=4, dtype=torch.bfloat16), expected)


def test_a_model_that_cannot_be_copied_is_refused_with_the_dtype() -> None:
    model = Scaled()
    model.kept = model.linear(torch.ones(2))  # it has gradient history
    with pytest.raises(
        ValueError, match=r"dtype is torch.bfloat16, which needs a copy of the model, but copying failed:"
    ):
        Sampler(model, (2,), dtype=torch.bfloat16)
    Sampler(model, (2,), steps=2)(1)


def test_a_unet_that_changes_is_run_as_what_it_has_become() -> None:
    model = small_unet()
    sampler = Sampler(model, (1, 8, 8), steps=3)
    before = sampler(2)
    handle = model.head[1].register_forward_hook(lambda module, args, output: 2 * output)
    hooked = sampler(2)
    assert sampler._network._run is model
    assert not torch.equal(hooked, before)
    handle.remove()
    assert torch.equal(sampler(2), before)
    model.head[1] = nn.Conv2d(2, 1, 3, padding=2, dilation=2)
    expected = fastsde.sample(model, (2, 1, 8, 8), steps=3, backend="reference")
    torch.testing.assert_close(sampler(2), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("make", [MLP, small_unet])
def test_what_is_made_in_inference_mode_can_be_used_outside(make: Any, dtype: torch.dtype | None) -> None:
    model = make()
    with torch.inference_mode():
        sampler = Sampler(model, model.shape, steps=3, dtype=dtype)
        inside = sampler(2)
    assert torch.equal(sampler(2), inside)
    assert torch.equal(fastsde.sample(model, (2, *model.shape), steps=3, dtype=dtype), inside)
