"""The native U-Net in training, and its gradients, compared with autograd in float64; its use in training steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from unet_cases import ARCHITECTURES, TUTORIAL, inputs_of, unet

from fastsde import checkpoints, noise, reference
from fastsde.engines.unet_gradients import NativeUNet, has_native_gradients
from fastsde.models import UNet
from fastsde.training import Trainer, default_config
from fastsde.training.steps import EagerSteps

CONFIG = replace(
    default_config("digits"),
    model={"architecture": "UNet", "image_size": [28, 28], "channels": [16, 32], "embedding": 8, "classes": 10},
    data_size=50,
    steps=6,
    batch_size=5,
    checkpoint_every=3,
)


@pytest.fixture(autouse=True)
def calls(native: torch.device, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """Records the dtypes of the passes of the kernel."""
    from fastsde.kernels.cpu import unet_training as kernel

    dtypes: list[torch.dtype] = []
    run = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda network, *args: dtypes.append(network.dtype) or run(network, *args))
    threads = torch.get_num_threads()
    yield dtypes
    torch.set_num_threads(threads)


def _skip_without_bf16() -> None:
    from fastsde.kernels.cpu import library

    if not library.call("unet_training_has_bf16"):
        pytest.skip("this build does not multiply bf16")


def _gradients(network: Callable[..., Tensor], model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Returns the network's output and, by name, the gradients of a function of it, all as float64."""
    model.zero_grad()
    out = network(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).cos()
    (out.double() * weights).sum().backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"out": out.detach().double(), **{name: each.double() for name, each in named.items() if each is not None}}


def _exact(model: UNet, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    wide = copy.deepcopy(model).double()
    return _gradients(wide, wide, tuple(each.double() if each.is_floating_point() else each for each in inputs))


def _assert_near(ours: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        error, largest = float((ours[name] - value).abs().max()), float(value.abs().max())
        assert error <= tolerance * largest, (name, error / largest)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3, 33, 64])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_those_of_autograd(calls: list[torch.dtype], name: str, batch: int) -> None:
    model = unet(*ARCHITECTURES[name])
    inputs, fast = inputs_of(model, batch), NativeUNet(model)
    ours = _gradients(fast, model, inputs)
    _assert_near(ours, _exact(model, inputs), 1e-5)
    fast._free[0].fill_(torch.nan)  # memory that is used again may hold anything
    _assert_near(_gradients(fast, model, inputs), ours, 0)
    assert calls == [torch.float32] * 2
    assert len(fast._free) == 1


@pytest.mark.slow
@pytest.mark.parametrize("films", [(), (16, 10)])
def test_so_they_are_of_the_tutorials_network(films: tuple[int, ...]) -> None:
    model = unet(*TUTORIAL, *films)
    inputs = inputs_of(model, 20)
    # In one of many windows two pixels may be so close that rounding decides which one the pool takes.
    _assert_near(_gradients(NativeUNet(model), model, inputs), _exact(model, inputs), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_in_bf16_they_are_as_near_as_pytorchs(calls: list[torch.dtype], name: str) -> None:
    _skip_without_bf16()
    model = unet(*ARCHITECTURES[name])
    for batch in (1, 7, 34):
        inputs = inputs_of(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (_gradients(each, model, inputs) for each in (NativeUNet(model), model))
        for key, exact in _exact(model, inputs).items():
            errors = [float((each[key] - exact).norm()) for each in (ours, theirs)]
            size = float(exact.norm())
            # On an axis of one pixel PyTorch leaves some gradients unwritten.
            most = 2 * errors[1] + 2**-8 * size if errors[1] == errors[1] else 2**-6 * size
            assert errors[0] <= most, (key, batch)
    assert calls == [torch.bfloat16] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_matter(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16:
        _skip_without_bf16()
    model = unet(1, (13, 12), (32, 48, 64), 8, 3)
    inputs, results = inputs_of(model, 41), []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            results.append(_gradients(NativeUNet(model), model, inputs))
    for each in results[1:]:
        _assert_near(each, results[0], 0)


def test_the_first_of_equal_pixels_is_the_largest() -> None:
    model = unet(1, (7, 8), (16, 16))
    with torch.no_grad():
        model.encoder[0].weight.zero_()  # so that all pixels are equal
    inputs = inputs_of(model, 3)
    _assert_near(_gradients(NativeUNet(model), model, inputs), _exact(model, inputs), 1e-5)


def test_what_is_not_finite_shows() -> None:
    model = unet(*ARCHITECTURES["odd, three channels"])
    x, t = inputs_of(model, 3)
    x[1, 0, 4, 4] = torch.nan
    out = NativeUNet(model)(x, t)
    assert out.isfinite().flatten(1).all(1).tolist() == [True, False, True]
    out.sum().backward()
    finite = {name for name, each in model.named_parameters() if each.grad.isfinite().all()}
    assert finite == {"head.1.bias"}


def test_small_derivatives_are_as_exact_as_others() -> None:
    model = unet(1, 4, (16, 16))
    with torch.no_grad():
        model.encoder[0].bias.fill_(60.0)  # log sigmoid of it is -8.8e-27, and its derivative as small
    inputs = inputs_of(model, 3)
    ours, exact = _gradients(NativeUNet(model), model, inputs), _exact(model, inputs)
    assert 0 < float(exact["encoder.0.weight"].abs().max()) < 1e-20
    _assert_near(ours, exact, 1e-5)


def test_some_gradients_only() -> None:
    model = unet(*ARCHITECTURES["wide, with labels"])
    inputs = inputs_of(model, 2)
    whole = _gradients(NativeUNet(model), model, inputs)
    model.head.requires_grad_(False)
    model.decoder[0].weight.requires_grad_(False)
    part = _gradients(NativeUNet(model), model, inputs)
    assert len(part) == len(whole) - 5
    _assert_near(part, {name: whole[name] for name in part}, 0)
    with torch.no_grad():
        assert torch.equal(NativeUNet(model)(*inputs).double(), whole["out"])


def test_forward_passes_of_several_batches_do_not_share_memory() -> None:
    model = unet(*ARCHITECTURES["odd, three channels"])
    fast, batches = NativeUNet(model), [inputs_of(model, count) for count in (4, 4, 2)]
    alone = [_gradients(fast, model, each) for each in batches]
    model.zero_grad()
    outs = [fast(*each) for each in batches]
    for out in outs:
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).cos()
        (out.double() * weights).sum().backward()
    for name, parameter in model.named_parameters():
        expected = sum(each[name] for each in alone)
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_what_the_kernel_does_not_compute_the_network_does(calls: list[torch.dtype]) -> None:
    model = unet(*ARCHITECTURES["narrow"])
    fast, (x, t) = NativeUNet(model), inputs_of(model, 3)
    expected = model(x, t)
    t.requires_grad_()
    torch.testing.assert_close(fast(x, t), expected)
    assert torch.autograd.grad(fast(x, t).sum(), t)[0].shape == t.shape
    with torch.no_grad():
        tangent = torch.func.jvp(lambda x: fast(x, t), (x,), (torch.ones_like(x),))[1]
    assert tangent.shape == x.shape
    t = t.detach()
    assert fast(x[:0], t[:0]).shape == (0, *model.shape)
    with torch.autocast("cpu", torch.float16):
        assert fast(x, t).dtype == torch.float16
    handle = model.head[0].register_forward_hook(lambda module, args, out: out + 1)
    torch.testing.assert_close(fast(x, t), model(x, t))
    handle.remove()
    assert not calls
    torch.testing.assert_close(fast(x, t), expected)
    assert len(calls) == 1


def test_networks_that_it_does_not_take() -> None:
    class Other(UNet):
        pass

    assert has_native_gradients(unet(1, 4, (16, 32)))
    for model in (unet(1, 4, (16, 24)), Other(1, 4, (16, 16)), unet(1, 4, (16, 16)).double(), nn.Linear(2, 2)):
        assert not has_native_gradients(model)
    assert not has_native_gradients(unet(1, 4, (16, 32)).to(memory_format=torch.channels_last))


def test_bad_input_is_named() -> None:
    fast = NativeUNet(unet(*ARCHITECTURES["wide, with labels"]))
    x, t, label = inputs_of(fast.unet, 3)
    for wrong in (x[:2], x[:, :1], x[..., 1:]):
        with pytest.raises(ValueError, match="x must"):
            fast(wrong, t, label)
    without = NativeUNet(unet(*ARCHITECTURES["narrow"]))
    with pytest.raises(TypeError, match="label"):
        without(*inputs_of(without.unet, 3), label)


def _tensors(directory: Path) -> dict[str, Tensor]:
    return checkpoints.read(directory / "checkpoint.safetensors")[0]


@pytest.mark.usefixtures("every_checkpoint")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, calls: list[torch.dtype], precision: str) -> None:
    if precision == "bf16":
        _skip_without_bf16()
    config = replace(CONFIG, precision=precision, flip=True, clip_norm=1.0, accumulation=2, weight_decay=0.01)
    Trainer(config, tmp_path / "whole").train(progress=False)
    assert calls == [torch.bfloat16 if precision == "bf16" else torch.float32] * 12
    trainer = Trainer(config, tmp_path / "cut")
    save = trainer._save

    def save_then_die() -> None:
        if trainer.step == 3:
            save()
            raise KeyboardInterrupt
        save()

    trainer._save = save_then_die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train(progress=False)
    torch.set_num_threads(3)
    Trainer(config, tmp_path / "cut", resume=True).train(progress=False)
    whole, cut = _tensors(tmp_path / "whole"), _tensors(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_its_steps_are_those_of_the_reference(tmp_path: Path, calls: list[torch.dtype]) -> None:
    # Adam's steps are nearly the sign of a gradient, so that its rounding may move a weight by up to a few rates. With
    # this epsilon, far above the rounding and below the gradients, they are smooth.
    config = replace(CONFIG, ema_decay=0.0, lr_schedule="constant", lr_warmup=0)
    ours, theirs = (Trainer(config, tmp_path / name) for name in ("ours", "theirs"))
    for each in (ours, theirs):
        each.optimizer.param_groups[0]["eps"] = 1e-3
    work, taker = theirs.work(), EagerSteps(ours.work(), ours._here)
    losses = taker.take(0, config.steps)
    assert len(calls) == config.steps
    keys, data, expected = noise.sample_keys(config.seed, config.batch_size), work.data(), []
    for step in range(config.steps):
        options = {"conditions": data.conditions, "nulls": work.nulls, "dropout": work.dropout, **work.scaling}
        expected.append(
            reference.train_step(work.model, work.optimizer, data.x_0, keys, step, config.objective, **options)
        )
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-5, atol=0)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * config.steps * config.lr)


def test_without_a_compiler_the_network_is_pytorchs(
    tmp_path: Path, calls: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsde.kernels.cpu import build

    trainer = Trainer(CONFIG, tmp_path)
    assert isinstance(trainer.work().as_called(trainer.model), NativeUNet)
    assert trainer.work().as_called(nn.Identity()).__class__ is nn.Identity
    assert replace(trainer.work(), native=False).as_called(trainer.model) is trainer.model
    monkeypatch.setattr(build, "_outcomes", dict.fromkeys(("unet_training.cpp", build.MAIN), (None, "none")))
    assert trainer.work().as_called(trainer.model) is trainer.model
    trainer.train(progress=False)
    assert not calls
