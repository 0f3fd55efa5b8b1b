"""The native U-Net in fp32 and bf16 compared with the U-Net in float64, and its use in `UNetInference`."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastsde
from fastsde.engines.unet_inference import UNetInference
from fastsde.models import UNet

ARCHITECTURES = {
    "the tutorial's": (1, 28, (32, 64, 128, 256, 256)),
    "odd, three channels": (3, (9, 14), (16, 32, 48)),
    "one pixel": (1, 1, (16, 16)),
    "wide": (2, (5, 32), (32, 96, 80)),
    "narrow": (1, (17, 1), (16, 16, 32)),
    "large": (1, (40, 33), (16, 80)),
    "with labels": (3, (9, 14), (16, 96, 80), 24, 10),
    "with an embedding": (1, (40, 33), (16, 80), 8),
}


@pytest.fixture(autouse=True)
def native_kernel(native: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the calls of the kernel."""
    from fastsde.kernels.cpu import unet as kernel

    calls: list[int] = []
    run = kernel.unet
    monkeypatch.setattr(kernel, "unet", lambda *args: calls.append(1) or run(*args))
    threads = torch.get_num_threads()
    yield calls
    torch.set_num_threads(threads)


def _unet(name: str) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet(*ARCHITECTURES[name])
        for level in () if model.modulation is None else model.modulation.levels:  # which begin at zero
            torch.nn.init.normal_(level.weight, std=0.2)
            torch.nn.init.normal_(level.bias, std=0.2)
        return model


def _inputs(model: UNet, batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, *model.shape), torch.rand(batch)


def _label(model: UNet, batch: int) -> Tensor | None:
    """Returns labels, of which the last stands for none, or None for a network without classes."""
    return torch.randint(model.classes + 1, (batch,)) if model.classes else None


@torch.no_grad()
def _errors(model: UNet, batch: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """Returns the errors of the kernel and of PyTorch's U-Net in that dtype, and the largest value."""
    (x, t), label = _inputs(model, batch), _label(model, batch)
    exact = copy.deepcopy(model).double()(x.double(), t.double(), label)
    plain = copy.deepcopy(model).to(dtype)(x.to(dtype), t, label)
    ours = UNetInference(model, dtype)(x.to(dtype), t, label)
    assert ours.dtype == dtype
    assert ours.shape == x.shape
    assert ours.is_contiguous()
    errors = (float((each.double() - exact).abs().max()) for each in (ours, plain))
    return *errors, float(exact.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 13, 20])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_is_as_near_to_float64_as_pytorch(native_kernel: list[int], name: str, batch: int) -> None:
    ours, theirs, largest = _errors(_unet(name), batch, torch.float32)
    assert native_kernel
    assert ours <= 2 * theirs + 16 * 2**-24 * largest


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_so_it_is_in_bf16_where_the_cpu_multiplies_it(native_kernel: list[int], name: str) -> None:
    from fastsde.kernels.cpu import library

    ours, theirs, largest = _errors(_unet(name), 7, torch.bfloat16)
    assert bool(native_kernel) == bool(library.call("unet_has_bf16"))
    assert ours <= 2 * theirs + 2 * 2**-8 * largest


def test_neither_threads_nor_the_batch_matter() -> None:
    model = UNetInference(_unet("the tutorial's"))
    x, t = _inputs(_unet("the tutorial's"), 30)
    torch.set_num_threads(1)
    alone = model(x, t)
    for count in (2, 5):
        torch.set_num_threads(count)
        assert torch.equal(model(x, t), alone)
    for first, end in ((0, 1), (3, 16), (29, 30)):
        assert torch.equal(model(x[first:end], t[first:end]), alone[first:end])


def test_any_layout_is_taken() -> None:
    model = _unet("odd, three channels")
    x, t = _inputs(model, 4)
    fast = UNetInference(model)
    expected = fast(x, t)
    assert torch.equal(fast(x.contiguous(memory_format=torch.channels_last), torch.stack([t, t], 1)[:, 0]), expected)
    assert fast(x[:0], t[:0]).shape == (0, *model.shape)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    model = _unet("odd, three channels")
    x, t = _inputs(model, 3)
    x[1, 0, 4, 4] = value
    finite = UNetInference(model)(x, t).isfinite().flatten(1).all(1)
    assert finite.tolist() == [True, False, True]


def test_labels_are_those_of_the_network(native_kernel: list[int]) -> None:
    model = _unet("with labels")
    fast, label = UNetInference(model), torch.arange(11)
    x, t = (each[:1].expand(11, *each.shape[1:]) for each in _inputs(model, 1))
    found = fast(x, t, label)
    assert torch.pdist(found.flatten(1)).min() > 1e-3
    torch.testing.assert_close(fast(x, t), found[10:].expand(found.shape))  # the last stands for none
    assert len(native_kernel) == 2
    for level in (model.modulation.levels[0], model.modulation.first):
        with torch.no_grad():
            level.bias += 1
        fast.refresh(model)
        torch.testing.assert_close(fast(x, t, label), model(x, t, label), atol=1e-4, rtol=1e-4)
        assert (fast(x, t, label) - found).abs().max() > 1e-3
    before = fast(x, t, label)
    torch.testing.assert_close(fast.bfloat16().float()(x, t, label), before, atol=0.05, rtol=0)


def test_it_follows_the_weights() -> None:
    model = _unet("one pixel")
    x, t = _inputs(model, 3)
    fast = UNetInference(model)
    before = fast(x, t)
    with torch.no_grad():
        model.head[1].bias += 1
    fast.refresh(model)
    torch.testing.assert_close(fast(x, t), before + 1)
    with torch.no_grad():
        fast.head[1].bias += 1  # its own
    torch.testing.assert_close(fast(x, t), before + 2)
    fast.load_state_dict(UNetInference(model).state_dict())
    torch.testing.assert_close(fast(x, t), before + 1)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(again(x, t), fast(x, t))


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_where_more_is_done_than_to_compute_it_is_pytorchs(native_kernel: list[int]) -> None:
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    model = _unet("one pixel")
    fast, (x, t) = UNetInference(model), _inputs(model, 3)
    expected = fast(x, t)
    native_kernel.clear()
    with torch.no_grad():
        torch.testing.assert_close(make_fx(fast)(x, t)(x, t), expected)
        torch.testing.assert_close(torch.jit.trace(fast, (x, t), check_trace=False)(x, t), expected)
        derivative = torch.func.jvp(lambda x: fast(x, t), (x,), (torch.ones_like(x),))[1]
        torch.testing.assert_close(derivative, torch.func.jvp(lambda x: model(x, t), (x,), (torch.ones_like(x),))[1])
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert fast(torch.empty(2, 1, 1, 1), torch.empty(2)).shape == (2, 1, 1, 1)
    assert not native_kernel
    cast = UNetInference(model)
    cast.bfloat16()
    assert cast(x.bfloat16(), t.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_batch_in_several_calls_is_the_batch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    from fastsde.kernels.cpu import unet as kernel

    torch.set_num_threads(2)
    model = _unet("with labels")
    fast, label = UNetInference(model, dtype), _label(model, 70)
    x, t = (each.to(dtype) for each in _inputs(model, 70))
    if not fast.is_native:
        pytest.skip("this build does not multiply bf16")
    whole, calls, call = fast(x, t, label), [], kernel.call
    monkeypatch.setattr(kernel, "call", lambda *args: calls.append(args[1:2]) or call(*args))
    for images, expected in ((1, [1] * 70), (33, [33, 33, 4]), (24, [24, 24, 22])):
        monkeypatch.setattr(kernel, "images_each", lambda products, threads, images=images: images)
        calls.clear()
        assert torch.equal(fast(x, t, label), whole)
        assert [images for (images,) in filter(None, calls)] == expected  # without the question for bf16


def test_a_call_has_as_many_images_as_take_a_fraction_of_a_second() -> None:
    from fastsde.kernels.cpu import unet as kernel
    from fastsde.kernels.cpu.library import call_products

    model, most = UNet(), call_products()
    fast = UNetInference(model)
    fast(*_inputs(model, 1))
    packed = fast._packed[1]
    assert packed.products(28, 28) == 55_452_672  # 49 * 9 * 64 * 128 and so on
    for threads in (1, 2, 64):
        images = kernel.images_each(packed.products(28, 28), threads)
        assert images % (12 * threads) == 0
        assert 0.9 * most < images / threads * packed.products(28, 28) <= most
    assert kernel.images_each(int(1e11), 2) == 1


def test_equal_weights_are_not_packed_again(native_kernel: list[int]) -> None:
    model = _unet("one pixel")
    fast, (x, t) = UNetInference(model), _inputs(model, 1)
    fast(x, t)
    packed = fast._packed
    fast.refresh(model)
    assert fast._packed is packed
    with torch.no_grad():
        model.head[1].bias.data += 1
    fast.refresh(model)
    assert fast._packed is None


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_eager_engine_takes_it(native_kernel: list[int], dtype: torch.dtype | None) -> None:
    model = _unet("odd, three channels")
    options = {"steps": 4, "seed": 3, "dtype": dtype}
    ours = fastsde.sample(model, (5, *model.shape), **options)
    calls = len(native_kernel)
    theirs = fastsde.sample(model, (5, *model.shape), backend="reference", **options)
    assert len(native_kernel) == calls
    tolerance = 1e-4 if dtype is None else 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))
    if dtype is None:
        assert calls == 4
