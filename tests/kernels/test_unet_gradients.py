"""The native U-Net's gradients with respect to x, compared with autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unet_cases import ARCHITECTURES, TUTORIAL, inputs_of, unet

from fastsde import checkpoints
from fastsde.engines.unet_gradients import FixedUNet, NativeUNet
from fastsde.models import UNet

pytestmark = pytest.mark.usefixtures("native", "poisoned")

SMALL = (1, (13, 12), (16, 32), 8, 3)  # with labels


def product(network: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
    """Returns e^T (df/dx) for an e that depends only on the shape."""
    x = x.detach().requires_grad_()
    f = network(x, *others)
    (found,) = torch.autograd.grad(f, x, _vector(f))
    return found


def exact(model: UNet, x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
    return product(copy.deepcopy(model).double(), x.double(), t.double(), *labels)


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    # Each element is a sum of thousands of products of a dozen layers, some of which cancel: the error is a few dozen
    # roundings (6e-8) of the largest element.
    assert float((found.double() - expected.double()).abs().max()) <= tolerance * float(expected.abs().max())


def _vector(f: Tensor) -> Tensor:
    return torch.linspace(-1, 1, f.numel(), dtype=torch.float64).mul(99).cos().reshape(f.shape).to(f.dtype)


CASES = [
    pytest.param(name, batch, id=f"{name}-{batch}", marks=[] if batch == 3 else pytest.mark.slow)
    for name in ARCHITECTURES
    for batch in (1, 3, 17, 63)
]


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_gradients_of_x_are_those_of_autograd(name: str, batch: int) -> None:
    model = unet(*ARCHITECTURES[name])
    inputs, trained = inputs_of(model, batch), NativeUNet(model)
    found = product(FixedUNet(model), *inputs)
    assert_near(found, exact(model, *inputs))
    # With those of the weights they have the same bits, and those of the weights the same as without x's.
    x, weights = inputs[0].detach().requires_grad_(), list(model.parameters())
    _, *alone = _all_gradients(trained, (inputs[0], *inputs[1:]), weights)
    first, *beside = _all_gradients(trained, (x, *inputs[1:]), weights)
    assert first is not None
    assert torch.equal(first, found)
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True) if a is not None and b is not None)


def _all_gradients(
    network: nn.Module, inputs: tuple[Tensor, ...], weights: list[nn.Parameter]
) -> tuple[Tensor | None, ...]:
    f = network(*inputs)
    if inputs[0].requires_grad:
        return torch.autograd.grad(f, [inputs[0], *weights], _vector(f), allow_unused=True)
    return None, *torch.autograd.grad(f, weights, _vector(f), allow_unused=True)


@pytest.mark.parametrize("batch", [4, pytest.param(17, marks=pytest.mark.slow)])
def test_so_they_are_of_the_shipped_network(batch: int) -> None:
    model = checkpoints.load("mnist").model
    x, t = torch.randn(batch, *model.shape, generator=torch.Generator().manual_seed(0)), torch.linspace(0.01, 1, batch)
    label = torch.arange(batch) % 11
    # In one of many windows two pixels may be so close that rounding decides which one the pool takes.
    assert_near(product(FixedUNet(model), x, t, label), exact(model, x, t, label), 1e-5 if batch == 4 else 1e-4)


@pytest.mark.slow
def test_in_bf16_they_are_as_near_as_pytorchs(native: torch.device) -> None:
    from fastsde.kernels.cpu import library

    if not library.call("unet_training_has_bf16"):
        pytest.skip("this build does not multiply bf16")
    model = unet(*TUTORIAL)
    inputs = inputs_of(model, 5)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = product(NativeUNet(model), *inputs), product(model, *inputs)
    expected = exact(model, *inputs)
    errors = [float((each - expected).norm() / expected.norm()) for each in (ours, theirs)]
    assert errors[0] <= 2 * errors[1] + 2**-8


@pytest.mark.parametrize("architecture", [SMALL, SMALL[:3]], ids=["labels", "plain"])
def test_products_of_one_output_are_independent(architecture: tuple[Any, ...]) -> None:
    model = unet(*architecture)
    fixed, (x, t, *label) = FixedUNet(model), inputs_of(model, 3)
    x.requires_grad_()
    f = fixed(x, t, *label)
    vectors = [_vector(f), torch.ones_like(f), torch.ones(()).expand(f.shape), _vector(f).mT.contiguous().mT]
    once = [torch.autograd.grad(fixed(x, t, *label), x, each)[0] for each in vectors]
    for vector, expected in zip(vectors, once, strict=True):
        (found,) = torch.autograd.grad(f, x, vector, retain_graph=True)
        assert torch.equal(found, expected)
    torch.autograd.grad(f, x, vectors[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(f, x, vectors[0])
    with pytest.raises(RuntimeError):  # a batched gradient has no memory
        torch.autograd.grad(fixed(x, t, *label), x, torch.stack(vectors), is_grads_batched=True)


@pytest.mark.parametrize("kind", [NativeUNet, FixedUNet])
def test_a_second_derivative_is_refused(kind: type[NativeUNet]) -> None:
    model = unet(*SMALL)
    x, t, label = inputs_of(model, 2)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(kind(model)(x, t, label).sum(), x, create_graph=True)


def test_threads_do_not_matter() -> None:
    model, threads = unet(*SMALL), torch.get_num_threads()
    fixed, inputs, found = FixedUNet(model), inputs_of(model, 41), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found.append(product(fixed, *inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, found[0]) for each in found)
    with ThreadPoolExecutor(4) as pool:  # several calls at once
        assert all(torch.equal(each, found[0]) for each in pool.map(lambda _: product(fixed, *inputs), range(8)))


def test_odd_inputs() -> None:
    model = unet(*SMALL)
    fixed, (x, t, label) = FixedUNet(model), inputs_of(model, 3)
    strided = x.mT.contiguous().mT
    assert not strided.is_contiguous()
    assert torch.equal(product(fixed, strided, t, label), product(fixed, x, t, label))
    assert product(fixed, x[:0], t[:0], label[:0]).shape == (0, *model.shape)
    x[1, 0, 4, 4] = torch.nan
    assert product(fixed, x, t, label).isfinite().flatten(1).all(1).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="x must"):
        fixed(x[:, :, 1:], t, label)
