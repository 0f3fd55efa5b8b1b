"""What computes with the native U-Net's gradients with respect to x, and the memory of their passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsde
from fastsde import checkpoints, noise, ops
from fastsde.engines import Network
from fastsde.engines.unet_gradients import FixedUNet, NativeUNet
from fastsde.inverse import DPS, Measurement, PiGDM
from fastsde.likelihood.divergence import Divergence
from fastsde.models import UNet
from fastsde.solvers import AdaptiveODE

pytestmark = pytest.mark.skipif(
    not ops.has_native(torch.device("cpu"), "unet_training_forward"), reason="the native kernels are not available"
)


def unet(channels: tuple[int, ...] = (16, 32)) -> UNet:
    """A network of images of 13 x 12 pixels with labels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet(1, (13, 12), channels, embedding=8, classes=3)
        for parameter in model.modulation.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = noise.normal(noise.sample_keys(0, batch), 0, (1, 13, 12))
    return x, torch.linspace(0.1, 1, batch), torch.arange(batch) % 4


def product(network: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
    """Returns e^T (df/dx) for an e that depends only on the shape."""
    x = x.detach().requires_grad_()
    f = network(x, *others)
    (found,) = torch.autograd.grad(f, x, _vector(f))
    return found


def assert_near(found: Tensor, expected: Tensor) -> None:
    # A few dozen roundings (6e-8) of the largest element.
    assert float((found.double() - expected.double()).abs().max()) <= 1e-5 * float(expected.abs().max())


def _vector(f: Tensor) -> Tensor:
    return torch.linspace(-1, 1, f.numel()).mul(99).cos().reshape(f.shape)


def test_memory_is_used_again_when_the_graph_is_gone() -> None:
    model = unet()
    fixed, (x, t, label) = FixedUNet(model), inputs()
    x.requires_grad_()
    expected = product(fixed, x, t, label)
    (memory,) = fixed._free
    held = [fixed(x, t, label) for _ in range(2)]
    assert not fixed._free
    for each in held:
        assert torch.equal(torch.autograd.grad(each, x, _vector(each))[0], expected)
    del each, held
    assert [len(each) for each in fixed._free] == [len(memory)] * 2
    assert any(each is memory for each in fixed._free)
    with torch.no_grad():
        fixed(x, t, label)
    product(fixed, x[:2], t[:2], label[:2])
    assert len(fixed._free) == 1  # no memory of another size is kept


def test_without_gradients_of_weights_a_pass_needs_less_memory() -> None:
    model = unet()
    given, fixed, trained = inputs(), FixedUNet(model), NativeUNet(model)
    product(fixed, *given), product(trained, *given)
    assert len(fixed._free[0]) < 0.7 * len(trained._free[0])


def test_the_copy_follows_its_network_only_when_told() -> None:
    model = unet()
    fixed, given = FixedUNet(model), inputs()
    before, x = product(fixed, *given), given[0].requires_grad_()
    old = fixed(*given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert torch.equal(product(fixed, *given), before)
    fixed.refresh(model)
    after = product(fixed, *given)
    assert torch.equal(after, product(FixedUNet(model), *given))
    assert not torch.equal(after, before)
    assert torch.equal(torch.autograd.grad(old, x, _vector(old))[0], before)
    del old
    assert torch.equal(product(fixed, *given), after)
    kept = fixed._free[0]
    fixed.refresh(model)
    assert fixed._free[0] is kept


def _is_native(model: nn.Module, **options: Any) -> bool:
    return isinstance(Network(model, **{"optimize": True, "gradients": True} | options)._run, FixedUNet)


def test_networks_that_run_so() -> None:
    model = unet()
    assert _is_native(model)
    assert _is_native(model, dtype=torch.float32)
    assert isinstance(Network(model, optimize=True).differentiable()._run, FixedUNet)
    assert Network(model).differentiable()._run is model
    assert not _is_native(model, optimize=False)
    assert not _is_native(model, dtype=torch.float64)
    assert not _is_native(unet((16, 24)))
    model.head[0].register_full_backward_hook(lambda module, d_in, d_out: None)
    assert not _is_native(model)


@pytest.mark.slow
def test_torch_compile_takes_the_network_itself() -> None:
    assert not _is_native(unet(), compiler="torch.compile")


def test_divergences_are_those_of_the_network() -> None:
    model = unet()
    (x, t, label), keys = inputs(), noise.sample_keys(0, 3)
    networks = Network(model, optimize=True, gradients=True), Network(model, torch.float64)
    for probes in (0, 1, 2):
        found, expected = (Divergence(each, keys, model.shape, probes)(x, t, {"label": label}) for each in networks)
        assert_near(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5 * 156)  # a sum of 156 products


def test_likelihoods_are_those_of_the_network() -> None:
    checkpoint = checkpoints.load("mnist")
    x = noise.normal(noise.sample_keys(0, 2), 0, checkpoint.shape).clamp(-1, 1)
    options: dict[str, Any] = {"model_kwargs": {"label": torch.tensor([3, 1])}, "steps": 4, "t_start": 0.3}
    found = fastsde.log_prob(checkpoint, x, **options)
    expected = fastsde.log_prob(checkpoint, x, dtype=torch.float64, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # of thousands of nats


@pytest.mark.slow
def test_adaptive_likelihoods_of_varying_batches() -> None:
    model, (x, _, label) = unet(), inputs(5)
    options: dict[str, Any] = {"prediction": "v", "solver": AdaptiveODE(1e-3, 1e-3), "t_start": 0.3}
    options["model_kwargs"] = {"label": label}
    found = fastsde.log_prob(model, x, **options)
    expected = fastsde.log_prob(model, x, dtype=torch.float64, **options)
    # Rounding changes the steps' lengths, and these the result, within the tolerance.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [DPS, pytest.param(PiGDM, marks=pytest.mark.slow)])
def test_corrections_are_those_of_the_reference(kind: type[Measurement]) -> None:
    model = unet()
    measurement = kind(lambda x: x[..., ::2, :], torch.zeros(1, 7, 12))
    options: dict[str, Any] = {"steps": 3, "prediction": "v", "guidance": 1.5}
    label, null = torch.tensor([0, 1]), torch.tensor([3, 3])
    call: dict[str, Any] = {"model_kwargs": {"label": label}, "uncond_kwargs": {"label": null}}
    sampler = fastsde.Sampler(model, model.shape, **options)
    reference = fastsde.Sampler(model, model.shape, backend="reference", **options)
    for _ in range(2):
        expected = reference(2, seed=1, measurement=measurement, **call)
        assert_near(sampler(2, seed=1, measurement=measurement, **call), expected)
        with torch.inference_mode():
            assert_near(sampler(2, seed=1, measurement=measurement, **call), expected)
        with torch.no_grad():
            model.head[1].weight.mul_(0.9)  # which the sampler must see
    assert all(parameter.grad is None for parameter in model.parameters())
