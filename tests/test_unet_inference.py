"""The U-Net's inference form against the U-Net: layer by layer, as a whole, and after its weights change."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastsde import ops
from fastsde.benchmarks.suite.measure import fp32_products
from fastsde.engines.unet_inference import UNetInference, log_sigmoid_, supports
from fastsde.models import UNet

# Rounding of an operation's result. A convolution sums in fp32 or wider. Triton's interpreter truncates to bf16.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
DTYPES = list(ROUNDING)
WIDE = torch.float32, torch.float64
ARCHITECTURES = {
    "of one channel": (1, 14, (8, 12, 16, 20)),
    "of three channels": (3, (9, 14), (4, 6, 8)),
    "of two levels, half odd": (3, (7, 16), (4, 8)),
    "of one pixel": (2, (1, 1), (3, 4, 5)),
    "narrow": (1, (17, 1), (1, 2, 3)),
    "of five channels": (5, (3, 4), (4, 6)),
    "wide": (1, (2, 3), (70, 3)),
    "with labels": (2, (7, 4), (3, 6, 5), 8, 3),
}
UNFUSED = ("of five channels", "wide")  # whose last layer is not a kernel


# In the interpreter a network takes a third of a second.
NETWORKS = [
    pytest.param(name, dtype, marks=() if dtype in WIDE or name == "of three channels" else pytest.mark.slow)
    for name, dtype in product(ARCHITECTURES, DTYPES)
]


@pytest.fixture(params=["plain", "kernel"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The code that runs: plain PyTorch, or the Triton kernels in the interpreter."""
    if request.param == "kernel":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the kernels are compiled where there is a GPU, not interpreted")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        request.getfixturevalue("large_convolution_tiles")
    assert ops.has_triton(torch.device("cpu")) == (request.param == "kernel")
    return str(request.param)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Makes torch.empty return NaN, so that elements which no kernel writes are noticed."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def build(name: str, dtype: torch.dtype = torch.float32) -> UNet:
    torch.manual_seed(0)
    unet = UNet(*ARCHITECTURES[name])
    if unet.modulation is not None:
        for level in unet.modulation.levels:  # which begin at zero
            nn.init.normal_(level.weight, std=0.3)
            nn.init.normal_(level.bias, std=0.3)
    return unet.to(dtype)


def inputs(model: Any, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(batch, *model.shape, generator=generator), torch.rand(batch, generator=generator)
    return x.to(dtype), t.to(dtype)


# Layer by layer -----------------------------------------------------------------------------------------------------


class _Convolutions(TorchFunctionMode):
    """Records what each convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.conv2d, torch.conv_transpose2d, F.conv2d, F.conv_transpose2d):
            self.read.append(args[0].clone())
        return function(*args, **(kwargs or {}))

    def listen_to_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also records convolutions that are kernels."""
        for name in ("stem_convolution", "pooled_convolution", "convolution"):
            module = importlib.import_module(f"fastsde.kernels.{name}")
            monkeypatch.setattr(module, name, self._recording(getattr(module, name)))

    def _recording(self, launch: Callable[..., None]) -> Callable[..., None]:
        def recorded(x: Tensor, *args: Any, **kwargs: Any) -> None:
            self.read.append(x.clone())
            launch(x, *args, **kwargs)

        return recorded


def _layer(
    layer: nn.Module,
    signal: Tensor,
    dtype: torch.dtype,
    activate: bool = True,
    time: Tensor | float = 0.0,
    film: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns a layer of a float64 U-Net, and the error allowed in ``dtype``; ``time`` is the time's part, absolute."""
    u = ROUNDING[dtype]
    sums = min(u, 2.0**-24)
    absolute = copy.deepcopy(layer)
    for parameter in absolute.parameters():
        parameter.abs_()
    # A sum of n products has n roundings of at most its absolute terms, whose error grows like sqrt(n); 9 more come
    # from the folded time. The result is rounded, before bias and time are added to it.
    terms = 9 * layer.weight.shape[0 if isinstance(layer, nn.ConvTranspose2d) else 1]
    v, size = layer(signal), absolute(signal.abs())
    bound = sums * (terms**0.5 + 9) * size + u * (v.abs() + layer.bias.abs()[:, None, None] + time)
    if dtype == torch.float16 and isinstance(layer, nn.ConvTranspose2d):
        bound += 4 * u * size  # on a CPU, fp16 taps are added to each other and to the bias in fp16
    if film is not None:  # it is rounded, as are scale, product and sum
        scale, shift = film.double()[:, :, None, None].chunk(2, dim=1)
        bound = (1 + scale).abs() * bound + 4 * u * ((scale.abs() + 1) * (v.abs() + bound) + shift.abs())
        v = (1 + scale) * v + shift
    if not activate:
        return v, bound
    # The log sigmoid has a slope of at most 1. Its own error is absolute where 1 + u is rounded, and it is rounded too.
    a = F.logsigmoid(v)
    return a, bound + sums * (4 + v.abs()) + u * (a.abs() + bound)


def _pool(a: Tensor) -> Tensor:
    height, width = a.shape[2:]
    return F.max_pool2d(a, 2, padding=(height % 2, width % 2))


def _expected(
    unet: UNet, x: Tensor, t: Tensor, films: Iterator[Tensor], read: list[Tensor], dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Returns what each convolution after the first should read, and the result, from the inputs of earlier ones.

    Each comes with the error allowed for it.
    """
    read = [signal.double() for signal in read]
    plane = t.double()[:, None, None, None].expand(-1, 1, *x.shape[2:])
    read[0] = torch.cat((x.double(), plane), dim=1)
    remaining, results, skips = iter(read), [], []
    for level, layer in enumerate(unet.encoder):
        time = 0.0 if level else F.conv2d(plane, layer.weight[:, -1:], padding=1).abs()
        a, bound = _layer(layer, next(remaining), dtype, time=time, film=next(films, None))
        skips.append((a, bound))
        results.append((_pool(a), _pool(bound)))
    results[-1] = skips.pop()  # the lowest level is not pooled
    for layer in unet.decoder:
        pair = zip(_layer(layer, next(remaining), dtype, film=next(films, None)), skips.pop(), strict=True)
        results.append(tuple(torch.cat(both, dim=1) for both in pair))
    a, bound = _layer(unet.head[0], next(remaining), dtype, film=next(films, None))
    last, between = unet.head[1], next(remaining, None)
    if between is None:  # one kernel multiplies by the weights of both
        result, error = _layer(last, a, dtype, activate=False)
        results.append((result, error + F.conv2d(bound, last.weight.abs(), padding=1)))
    else:
        results += [(a, bound), _layer(last, between, dtype, activate=False)]
    assert next(remaining, None) is None
    return results


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("name", "dtype"), NETWORKS)
def test_each_layer_is_the_unets(path: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = build(name, dtype)
    x, t = inputs(unet, dtype=dtype)
    convolutions = _Convolutions()
    if path == "kernel":
        convolutions.listen_to_kernels(monkeypatch)
    form = UNetInference(unet)
    with torch.no_grad(), convolutions:
        result = form(x, t)
    with torch.no_grad():
        films = form._of_each_layer(form.films(t, None))
        expected = _expected(unet.double(), x, t, films, convolutions.read, dtype)
        assert next(films, None) is None
    ours = [*convolutions.read[1:], result]
    fused = path == "kernel" and dtype != torch.float64 and name not in UNFUSED  # the last two layers
    assert len(ours) == len(expected) == 2 * len(unet.channels) + (not fused)
    for number, (value, (exact, bound)) in enumerate(zip(ours, expected, strict=True)):
        assert value.dtype == dtype
        assert value.shape == exact.shape
        excess = (value.double() - exact).abs() - bound
        assert (excess <= 0).all(), f"layer {number}: {excess.max():.3g} beyond a bound of {bound.max():.3g}"


@pytest.mark.slow
@pytest.mark.parametrize("path", ["kernel"], indirect=True)
def test_in_tf32_weights_and_activations_are_rounded(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsde.tf32.may_multiply", lambda **_: True)
    unet = build("of three channels")
    form = UNetInference(unet)
    buffers = [buffer for name, buffer in form.named_buffers() if name.startswith("tf32_taps")]
    layers = [*((each, (0, 2, 3, 1)) for each in unet.encoder[1:]), *((each, (1, 2, 3, 0)) for each in unet.decoder)]
    layers += [(each, (0, 2, 3, 1)) for each in unet.head]
    for buffer, (layer, order) in zip(buffers, layers, strict=True):
        exact = layer.weight.detach().permute(order)
        assert ((buffer - exact).abs() <= 2.0**-11 * exact.abs()).all()
        assert not (buffer.contiguous().view(torch.int32) & 0x1FFF).any()
    x, t = inputs(unet)
    with torch.no_grad():
        result, expected = form(x, t), unet(x, t)
        for parameter in unet.parameters():
            parameter.mul_(1.1)
        form.refresh(unet)
        assert (form(x, t) - unet(x, t)).abs().max() < 7 * 2.0**-10
    difference = (result - expected).abs().max()
    assert 1e-5 < difference < 7 * 2.0**-10  # a rounding of weights and one of activations in each layer


# The whole network --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("name", "dtype"), NETWORKS)
def test_the_whole_is_as_near_to_the_exact_result_as_the_unet(path: str, name: str, dtype: torch.dtype) -> None:
    unet = build(name, dtype)
    x, t = inputs(unet, dtype=dtype)
    with torch.no_grad():
        ours, theirs = UNetInference(unet)(x, t).double(), unet(x, t).double()
        exact = unet.double()(x.double(), t.double())
    assert ours.shape == x.shape
    assert exact.std() > 1e-3 or exact.numel() < 5  # there is something to compare
    _assert_about_as_near(unet, ours, theirs, exact, dtype)


def _assert_about_as_near(unet: UNet, ours: Tensor, theirs: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Checks that errors are within twice PyTorch's own, plus a rounding and, as in test_models, 68 more per layer."""
    per_layer = max(ROUNDING[dtype], 68 * min(ROUNDING[dtype], 2.0**-24))
    excess = (ours - exact).abs().max() - 2 * (theirs - exact).abs().max()
    assert excess <= (2 * len(unet.channels) + 1) * per_layer


def _labels(unet: UNet, batch: int) -> Tensor:
    """Returns the labels in turn, the last of which stands for none."""
    return torch.arange(batch) % (unet.classes + 1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_labels_are_those_of_the_unet(path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = build("with labels", dtype)
    form, (x, t), label = UNetInference(unet), inputs(unet, 4, dtype), torch.arange(4, dtype=torch.uint8)
    x, t = x[:1].expand(x.shape), t[:1].float().expand(t.shape)  # t is never narrower
    if path == "kernel":
        monkeypatch.setattr(form, "_plain", None)
    with torch.no_grad():
        ours, theirs, unlabelled = form(x, t, label), unet(x, t, label), form(x, t)
        _assert_about_as_near(unet, ours.double(), theirs.double(), unet.double()(x.double(), t, label), dtype)
    assert torch.pdist(ours.double().flatten(1)).min() > 1e-3
    torch.testing.assert_close(unlabelled, ours[3:].expand(ours.shape), atol=1e-5, rtol=0)  # the last stands for none


def test_labels_that_do_not_exist_are_refused(path: str) -> None:
    unet = build("with labels")
    form, (x, t) = UNetInference(unet), inputs(unet)
    for bad in (-1, 4):
        with torch.no_grad(), pytest.raises(IndexError):
            form(x, t, torch.tensor([0, bad]))
    with torch.no_grad(), pytest.raises(ValueError, match=r"label must have shape \[2\], got \[3\]"):
        form(x, t, torch.zeros(3, dtype=torch.int64))
    form = UNetInference(build("of three channels"))
    with torch.no_grad(), pytest.raises(TypeError, match="label must be None for a UNetInference"):
        form(*inputs(form), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_and_shifts_are_those_of_fp32_or_wider(dtype: torch.dtype) -> None:
    unet = build("with labels", dtype)
    form, t = UNetInference(unet), torch.rand(5).to(dtype)
    with torch.no_grad():
        ours = form.films(t, _labels(unet, 5))
        exact = torch.cat(copy.deepcopy(unet).double().modulation(t.double(), _labels(unet, 5)), dim=1)
        assert ours.dtype == torch.promote_types(dtype, torch.float32)
        # Angles are up to 100; their frequencies are fp32 in any case.
        torch.testing.assert_close(ours.double(), exact, atol=1e-5 if dtype != torch.float64 else 1e-12, rtol=0)
        narrow = form.bfloat16().films(t, None)
    assert narrow.dtype == torch.float32  # as the kernels take it


@pytest.mark.slow
def test_the_tutorials_unet(path: str) -> None:
    torch.manual_seed(0)
    unet = UNet()
    x, t = inputs(unet, 1)
    with torch.no_grad():
        # Both are within 11 layers' rounding of the exact result, as in test_models.
        torch.testing.assert_close(UNetInference(unet)(x, t), unet(x, t), atol=2 * 11 * 68 * 2.0**-24, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["of one channel", "of three channels", "narrow"])
def test_any_layout_of_x_and_t_is_taken_and_left_alone(path: str, name: str) -> None:
    unet = build(name)
    form = UNetInference(unet)
    x, t = inputs(unet, 3)
    layouts = {
        "channels last": (x.to(memory_format=torch.channels_last), t),
        "strided": (torch.stack((x, x), dim=-1)[..., 0], torch.stack((t, t), dim=-1)[:, 0]),
        "transposed": (x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0), t),
        "one time": (x, t[:1].expand(3)),
    }
    for layout, (x_given, t_given) in layouts.items():
        before = x_given.clone(), t_given.clone()
        with torch.no_grad():
            result = form(x_given, t_given)
            torch.testing.assert_close(result, unet(x_given, t_given), atol=1e-5, rtol=0, msg=layout)
        assert result.is_contiguous()
        assert torch.equal(x_given, before[0])
        assert torch.equal(t_given, before[1])


@pytest.mark.slow
def test_an_empty_batch_and_samples_apart(path: str) -> None:
    unet = build("of three channels")
    form = UNetInference(unet)
    x, t = inputs(unet, 4)
    with torch.no_grad():
        whole = form(x, t)
        assert form(x[:0], t[:0]).shape == (0, *unet.shape)
        # 1e-5: a convolution may sum in another order for another batch.
        torch.testing.assert_close(form(x[2:3], t[2:3]), whole[2:3], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["kernel"], indirect=True)
def test_a_batch_with_too_many_pixels_is_cut(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = build("with labels")
    form = UNetInference(unet)
    (x, t), label = inputs(unet, 5), _labels(unet, 5)
    with torch.no_grad():
        whole = form(x, t, label)
        monkeypatch.setattr("fastsde.engines.unet_inference._MAX_PIXELS", 2 * 7 * 4 + 1)
        convolutions = _Convolutions()
        convolutions.listen_to_kernels(monkeypatch)
        torch.testing.assert_close(form(x, t, label), whole, atol=1e-5, rtol=0)
    layers = 2 * len(unet.channels)
    assert [len(each) for each in convolutions.read[::layers]] == [2, 2, 1]


@pytest.mark.parametrize("path", ["kernel"], indirect=True)
def test_an_image_with_too_many_pixels_runs_in_plain_pytorch(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = build("of three channels")
    form = UNetInference(unet)
    monkeypatch.setattr("fastsde.engines.unet_inference._MAX_PIXELS", 9 * 14 - 1)
    monkeypatch.setattr(form, "_fused", None)
    with torch.no_grad():
        torch.testing.assert_close(form(*inputs(unet)), unet(*inputs(unet)), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["kernel"], indirect=True)
@pytest.mark.parametrize(
    "changed",
    [
        lambda form: form.to(memory_format=torch.channels_last),
        lambda form: form.to(memory_format=torch.contiguous_format),
        lambda form: form.load_state_dict({k: v.contiguous() for k, v in form.state_dict().items()}, assign=True),
    ],
    ids=["channels last", "contiguous", "assigned"],
)
def test_the_layout_of_its_weights_does_not_matter(path: str, changed: Callable[[UNetInference], Any]) -> None:
    unet = build("of three channels")
    form = UNetInference(unet)
    changed(form)
    with torch.no_grad():
        torch.testing.assert_close(form(*inputs(unet)), unet(*inputs(unet)), atol=1e-5, rtol=0)
        for parameter in unet.parameters():
            parameter.mul_(1.1)
        form.refresh(unet)
        torch.testing.assert_close(form(*inputs(unet)), unet(*inputs(unet)), atol=1e-5, rtol=0)


def test_its_dtype_may_change(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = build("of three channels")
    form = UNetInference(unet, torch.bfloat16).float()
    monkeypatch.setattr("fastsde.tf32.may_multiply", lambda **_: True)  # for which it has no weights
    with torch.no_grad():
        form.refresh(unet)
        torch.testing.assert_close(form(*inputs(unet)), unet(*inputs(unet)), atol=1e-5, rtol=0)


def test_autocast_is_that_of_pytorch(path: str) -> None:
    for name in ("of three channels", "with labels"):
        unet = build(name)
        form = UNetInference(unet)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            ours, theirs = form(*inputs(unet)), unet(*inputs(unet))
        assert ours.dtype == theirs.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64], ids=str)
def test_times_may_have_another_dtype(path: str, dtype: torch.dtype) -> None:
    unet = build("of three channels")
    x, t = inputs(unet)
    t = (10 * t).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(UNetInference(unet)(x, t), unet(x, t), atol=2e-5, rtol=0)


def test_inputs_on_another_device_are_refused() -> None:
    form = UNetInference(build("of three channels"))
    x, t = inputs(form)
    with torch.no_grad(), pytest.raises(ValueError, match="x must be on cpu, got meta"):
        form(x.to("meta"), t)
    with torch.no_grad(), pytest.raises(ValueError, match="t must be on cpu, got meta"):
        form(x, t.to("meta"))


@pytest.mark.slow
def test_calls_share_no_memory(path: str) -> None:
    unet = build("of three channels")
    form = UNetInference(unet)
    x, t = inputs(unet)
    with torch.no_grad():
        first = form(x, t)
        kept = first.clone()
        form(x + 1, t)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by NumPy, in the interpreter
def test_what_is_not_finite_shows(path: str, value: float) -> None:
    unet = build("of two levels, half odd")
    x, t = inputs(unet)
    x[0, 0, 3, 3] = value
    with torch.no_grad():
        result = UNetInference(unet)(x, t)
        assert not result[0].isfinite().all()
        assert result[1].isfinite().all()


# The time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_time_is_folded_to_the_border(name: str) -> None:
    unet = build(name)
    form, weight = UNetInference(unet), unet.encoder[0].weight.detach().double()
    ones = torch.ones(1, 1, *unet.image_size, dtype=torch.float64)
    expected = F.conv2d(ones, weight[:, -1:], padding=1)[0].permute(1, 2, 0)
    # Nine terms: eight roundings of at most the sum of their absolute values.
    bound = 8 * 2.0**-24 * weight[:, -1].abs().sum((1, 2))
    assert ((form.plane.double() - expected).abs() <= bound).all()
    assert torch.equal(form.image_weight, unet.encoder[0].weight[:, :-1])
    assert form.image_weight.is_contiguous(memory_format=torch.channels_last)


def test_the_time_of_a_narrower_network_is_folded_in_fp32() -> None:
    unet = build("of three channels")
    form, wide = UNetInference(unet, torch.bfloat16), UNetInference(unet.to(torch.bfloat16).float())
    assert form.plane.dtype == torch.float32
    assert torch.equal(form.plane, wide.plane)


# The weights --------------------------------------------------------------------------------------------------------


def test_the_weights_are_copies_without_gradients_and_all_listed() -> None:
    unet = build("of three channels")
    form = UNetInference(unet)
    assert isinstance(form, UNetInference)
    assert not any(parameter.requires_grad for parameter in form.parameters())
    assert all(parameter.requires_grad for parameter in unet.parameters())
    ours, theirs = list(form.parameters()), list(unet.parameters())
    assert not {p.data_ptr() for p in ours} & {p.data_ptr() for p in theirs}
    for copied, original in zip(ours, theirs, strict=True):
        assert torch.equal(copied, original)
        assert copied.ndim != 4 or copied.is_contiguous(memory_format=torch.channels_last)
    assert dict(form.named_buffers()).keys() == {"image_weight", "plane"}
    tensors = [value for module in form.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    assert not tensors


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("with labels", torch.float32),
        pytest.param("of three channels", torch.float32, marks=pytest.mark.slow),
        pytest.param("of three channels", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("with labels", torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_refresh_follows_the_weights_in_place(path: str, name: str, dtype: torch.dtype) -> None:
    unet = build(name)
    form = UNetInference(unet, dtype)
    x, t = inputs(unet, dtype=dtype)
    tensors = [*form.parameters(), *form.buffers()]
    before = [(tensor, tensor.data_ptr(), tensor.stride(), tensor.clone()) for tensor in tensors]
    with torch.no_grad():
        old = form(x, t)
        for parameter in unet.parameters():
            parameter.mul_(1.5).add_(0.01)
        assert torch.equal(form(x, t), old)
        form.refresh(unet)
        new = form(x, t)
        assert torch.equal(new, UNetInference(unet, dtype)(x, t))
    assert (new - old).abs().max() > 1e-2
    after = [*form.parameters(), *form.buffers()]
    for (tensor, address, stride, value), now in zip(before, after, strict=True):
        assert now is tensor
        assert (now.data_ptr(), now.stride()) == (address, stride)
        assert not torch.equal(now, value)


def test_a_dtype_is_that_of_the_weights_alone() -> None:
    unet = build("of three channels")
    form = UNetInference(unet, torch.bfloat16)
    assert {parameter.dtype for parameter in form.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    x, t = inputs(unet, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(form(x, t), UNetInference(unet.to(torch.bfloat16))(x, t))


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=pytest.mark.slow) for how in ("deepcopy", "pickle", "torch.save")]
)
def test_it_can_be_copied_and_kept(path: str, how: str) -> None:
    unet = build("of three channels")
    form = UNetInference(unet)
    x, t = inputs(unet)
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(form, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(form) if how == "deepcopy" else pickle.loads(pickle.dumps(form))
    with torch.no_grad():
        expected = form(x, t)
        assert torch.equal(twin(x, t), expected)
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
        assert torch.equal(form(x, t), expected)
        twin.refresh(unet)
        assert torch.equal(twin(x, t), expected)


# torch.compile and gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["of two levels, half odd", pytest.param("with labels", marks=pytest.mark.slow)])
def test_torch_compile_takes_it_whole(path: str, name: str) -> None:
    unet = build(name)
    form = torch.compile(UNetInference(unet), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3):
            x, t = inputs(unet, batch)
            torch.testing.assert_close(form(x, t), unet(x, t), atol=1e-5, rtol=0)


def test_a_gradient_is_refused() -> None:
    unet = build("of two levels, half odd")
    form = UNetInference(unet)
    x, t = inputs(unet)
    assert not form(x, t).requires_grad
    for wants in (x, t):
        wants.requires_grad_(True)
        with pytest.raises(RuntimeError, match="UNetInference has no gradients: use the UNet"):
            form(x, t)
        with torch.no_grad():
            assert not form(x, t).requires_grad
        wants.requires_grad_(False)


# The activation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_log_sigmoid_is_accurate_everywhere(dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 500.0, -500.0, 6e4, -6e4, float("inf"), -float("inf")])
    v = torch.cat((torch.linspace(-30, 30, 4001), ends)).to(dtype)
    exact, narrow = F.logsigmoid(v.double()), dtype in (torch.float16, torch.bfloat16)
    ours = log_sigmoid_(v.clone())
    finite = v.isfinite()
    assert torch.equal(ours[~finite].double(), exact[~finite])
    # In u = exp(-|v|) the factor log2(e), their product and exp2 are off by (2 |v| + 1) roundings, and log1p and the
    # difference round once; fp16 and bf16 also round the result.
    u = 2.0**-24 if narrow else ROUNDING[dtype]
    bound = u * ((2 * v.double().abs() + 3) * torch.exp(-v.double().abs()) + exact.abs())
    bound += narrow * (exact.abs() * ROUNDING[dtype] + 2.0**-25) + 2.0**-126  # values that may be flushed to 0
    assert ((ours.double() - exact).abs()[finite] <= bound[finite]).all()
    assert log_sigmoid_(torch.tensor([float("nan")], dtype=dtype)).isnan().all()


# Wrong arguments ----------------------------------------------------------------------------------------------------


class _Subclass(UNet):
    pass


def _with_a_hook() -> UNet:
    unet = build("narrow")
    unet.encoder[1].register_forward_hook(lambda *_: None)
    return unet


def _with_another_layer() -> UNet:
    unet = build("narrow")
    unet.head[0] = nn.Sequential(unet.head[0], nn.Identity())
    return unet


def _with_another_modulation(change: Callable[[Any], object]) -> Callable[[], UNet]:
    def make() -> UNet:
        unet = build("with labels")
        assert supports(unet)
        change(unet.modulation)
        return unet

    return make


MODULATIONS: list[Callable[[Any], object]] = [
    lambda modulation: modulation.second.register_forward_hook(lambda *_: None),
    lambda modulation: setattr(modulation, "first", nn.Sequential(modulation.first, nn.SiLU())),
    lambda modulation: setattr(modulation, "labels", nn.Embedding(4, 8)),
    lambda modulation: setattr(modulation.labels, "max_norm", 1.0),
    lambda modulation: setattr(modulation.time, "scale", 10.0),
    lambda modulation: setattr(modulation, "levels", modulation.levels[:-1]),
    lambda modulation: modulation.levels.__setitem__(1, nn.Linear(8, 12, bias=False)),
]


@pytest.mark.parametrize(
    "make",
    [
        lambda: _Subclass(1, 4, (2, 3)),
        _with_a_hook,
        _with_another_layer,
        *(_with_another_modulation(change) for change in MODULATIONS),
    ],
)
def test_only_the_unet_itself_has_this_form(make: Any) -> None:
    unet = make()
    assert not supports(unet)
    with pytest.raises(TypeError, match="unet must be an unmodified UNet"):
        UNetInference(unet)
    form = UNetInference(build("narrow"))
    with pytest.raises(ValueError, match="unet must be a UNet of"):
        form.refresh(unet)


def test_what_is_supported() -> None:
    assert supports(build("narrow"))
    assert not supports(UNetInference(build("narrow")))
    assert not supports(None)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda unet: UNetInference(unet, "bf16"), TypeError, "dtype must be a floating-point dtype, got 'bf16'"),
        (
            lambda unet: UNetInference(unet, torch.int64),
            TypeError,
            "dtype must be a floating-point dtype, got torch.int64",
        ),
        (
            lambda unet: UNetInference(unet).refresh(build("narrow")),
            ValueError,
            r"unet must be .*7, 16.*, got .*17, 1",
        ),
        (
            lambda unet: UNetInference(unet)(torch.zeros(2, 3, 16, 7), torch.zeros(2)),
            ValueError,
            r"x must have shape \[2, 3, 7, 16\], got \[2, 3, 16, 7\]",
        ),
        (
            lambda unet: UNetInference(unet)(torch.zeros(2, 3, 7, 16), torch.zeros(2, 1)),
            ValueError,
            r"t must have shape \[2\], got \[2, 1\]",
        ),
    ],
)
def test_wrong_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(build("of two levels, half odd"))


# On a GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    unet = build(name, dtype).cuda()
    assert ops.has_triton(torch.device("cuda"))
    x, t = (value.cuda() for value in inputs(unet, 5, dtype))
    with torch.no_grad(), fp32_products(torch.backends.cudnn, "ieee"):
        form = UNetInference(unet)
        ours, theirs = form(x, t).double(), unet(x, t).double()
        exact = unet.double()(x.double(), t.double())
    _assert_about_as_near(unet, ours, theirs, exact, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["of three channels", "with labels"])
def test_a_cuda_graph_follows_the_refreshed_weights(name: str) -> None:
    unet = build(name).cuda()
    form = UNetInference(unet)
    x, t = (value.cuda() for value in inputs(unet, 5))
    label = _labels(unet, 5).cuda() if unet.classes else None
    with torch.no_grad():
        form(x, t, label)  # compiles the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = form(x, t, label)
        for parameter in unet.parameters():
            parameter.mul_(1.5)
        form.refresh(unet)
        graph.replay()
        torch.testing.assert_close(result, form(x, t, label))
        if label is not None:
            label.fill_(1)
            graph.replay()
            torch.testing.assert_close(result, form(x, t, label))
