"""Compiled networks: by ``torch.compile`` and by OpenVINO, which are chosen, follow changes, and may fail."""

from __future__ import annotations

import functools
import gc
import pickle
import random
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsde
from fastsde import MissingExtraError, Sampler, ops
from fastsde.engines import compilers, openvino
from fastsde.engines.network import Compiled, Network
from fastsde.models import MLP, ConcatTime, UNet

X, T = torch.randn(3, 1, 8, 8), torch.rand(3)
CPU = torch.device("cpu")


def small_unet() -> UNet:
    return UNet(1, 8, (2, 3))


def failing(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no compiler found\nand much more")


# torch.compile ------------------------------------------------------------------------------------------------------


def test_where_compiling_fails_the_network_runs_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda run, **options: failing)
    model = MLP()
    expected = fastsde.sample(model, (4, 2), steps=5, backend="eager")
    sampler = Sampler(model, (2,), steps=5, compile=True)
    with pytest.warns(RuntimeWarning, match="torch.compile failed, the network runs without it: no compiler found$"):
        assert torch.equal(sampler(4), expected)
    assert torch.equal(sampler(4), expected)  # a second warning would be an error here


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Records what is passed to torch.compile, which returns it unchanged."""
    given: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda run, **options: given.append(run) or run)
    return given


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_on_the_cpu_weights_are_constants_of_the_code_until_they_change(
    compiled: list[Any], dtype: torch.dtype | None
) -> None:
    model = MLP()
    sampler = Sampler(model, (2,), steps=2, compile=True, dtype=dtype)
    for _ in range(2):
        sampler(3)
    assert len(compiled) == 1
    with torch.no_grad():
        model.net[0].weight.data.mul_(2)  # not visible in a version counter
    changed = sampler(3)
    sampler(3)
    assert len(compiled) == 2
    assert compiled[0].__code__ is not compiled[1].__code__
    assert torch.equal(changed, fastsde.sample(model, (3, 2), steps=2, backend="eager", dtype=dtype))


@pytest.mark.slow
def test_a_frozen_network_follows_the_weights() -> None:
    model = MLP(2, (4,))
    sampler = Sampler(model, (2,), steps=2, compile=True)
    for _ in range(2):
        torch.testing.assert_close(sampler(3), fastsde.sample(model, (3, 2), steps=2, backend="eager"))
        with torch.no_grad():
            model.net[2].bias += 1
    torch._dynamo.reset()


class _Holding(nn.Module):
    """Computes with tensors that are not parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.scale = [nn.Linear(2, 2)], torch.tensor(2.0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = self.held[0](x) * self.scale
        return result


def test_what_holds_more_than_its_weights_is_not_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = []
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)
    monkeypatch.setattr(Compiled, "__init__", lambda self, run, compiler: frozen.append(run))
    held, counting = _Holding(), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    for model in (held, lambda x, t: held(x, t), functools.partial(held), held.forward, ConcatTime(counting)):
        Network(model, compiler="torch.compile")
    assert not frozen
    for model in (MLP(), ConcatTime(counting.eval()), small_unet()):
        Network(model, compiler="torch.compile")
    assert len(frozen) == 3


@pytest.mark.parametrize("error", [ValueError("its own"), torch.OutOfMemoryError("memory")])
def test_an_error_of_the_network_itself_is_its_own(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)

    def raises(x: Tensor, t: Tensor) -> Tensor:
        raise error

    with pytest.raises(type(error), match=str(error)):
        Network(raises, compiler="torch.compile")(X, T)


def test_on_a_gpu_no_convolution_is_a_template_and_no_graph_is_inductors(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda run, **options: given.update(options) or run)
    Network(lambda x, t: x, compiler="torch.compile", device=torch.device("cuda"))
    assert given["dynamic"] is False
    assert given["options"]["max_autotune"] is True
    assert given["options"]["max_autotune_conv_backends"] == "ATEN"
    assert not given["options"].get("triton.cudagraphs", False)


def test_the_uncompiled_network_is_the_same() -> None:
    network = Network(small_unet(), torch.bfloat16, compiler="torch.compile", optimize=True)
    assert torch.equal(network.again(None)(X, T), Network(network.model, torch.bfloat16, optimize=True)(X, T))


# compile="auto" -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Makes both compilers available, as PyTorch itself, and records which ones are measured."""
    found: list[str | None] = []
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)
    monkeypatch.setattr(openvino, "is_installed", lambda: True)
    monkeypatch.setattr(openvino, "_exported", lambda module, tensors: run_later(weakref.ref(module.run)))
    return found


def run_later(alive: weakref.ref[nn.Module]) -> Callable[[list[Tensor]], Tensor]:
    return lambda tensors: alive()(*tensors)


def measured(monkeypatch: pytest.MonkeyPatch, tried: list[str | None], seconds: dict[str | None, float]) -> None:
    """Replaces the measurement of a row."""

    def timed(network: Network, request: Any) -> Callable[[int], float]:
        tried.append(network.compiler)
        return lambda count: seconds[network.compiler]

    monkeypatch.setattr("fastsde.plan._timed", timed)


def chosen(sampler: Sampler, n: int = 5) -> str | None:
    """Returns the compiler of the network that runs."""
    request = sampler._request(n, 0, 0, None, None, None, None, None, None)
    return sampler._planner.plan(request, None, lambda network: None).network.compiler


@pytest.mark.parametrize(
    ("row", "best", "tries", "expected"),
    [
        (30.0, {"openvino": 20.0, "torch.compile": 25.0}, ["openvino", "torch.compile"], "openvino"),
        (30.0, {"openvino": 25.0, "torch.compile": 20.0}, ["openvino", "torch.compile"], "torch.compile"),
        (30.0, {"openvino": 31.0, "torch.compile": 30.0}, ["openvino", "torch.compile"], None),
        (10.0, {"openvino": 9.0, "torch.compile": 1.0}, ["openvino"], "openvino"),  # 30 s of work
        (1.0, {"openvino": 0.1, "torch.compile": 0.1}, [], None),
    ],
)
def test_auto_tries_what_the_work_repays_and_keeps_the_fastest(
    monkeypatch: pytest.MonkeyPatch,
    tried: list[str | None],
    row: float,
    best: dict[str | None, float],
    tries: list[str],
    expected: str | None,
) -> None:
    measured(monkeypatch, tried, {None: row, **best})
    model = MLP(2, (4,))
    sampler = Sampler(model, (2,), steps=3, compile="auto", backend="eager")
    for _ in range(2):
        assert chosen(sampler) == expected
        assert tried == [None, *tries]  # each once
    assert chosen(Sampler(model, (2,), steps=3, compile="auto", backend="eager")) == expected
    assert tried == [None, *tries]
    torch.testing.assert_close(sampler(5), fastsde.sample(model, (5, 2), steps=3, backend="eager"))
    alive = weakref.ref(model)
    del sampler, model
    gc.collect()
    assert alive() is None


def test_auto_does_not_try_what_cannot_compile_the_network(
    monkeypatch: pytest.MonkeyPatch, tried: list[str | None]
) -> None:
    measured(monkeypatch, tried, {None: 60.0, "openvino": 1.0, "torch.compile": 2.0})
    model = MLP(2, (4,))
    assert chosen(Sampler(lambda x, t: model(x, t), (2,), steps=3, compile="auto", backend="eager")) == "torch.compile"
    options = {"steps": 3, "compile": "auto", "backend": "eager", "dtype": torch.bfloat16}
    assert chosen(Sampler(model, (2,), **options)) == "torch.compile"
    monkeypatch.setattr(openvino, "is_installed", lambda: False)
    assert chosen(Sampler(model, (2,), steps=3, compile="auto", backend="eager")) == "torch.compile"
    assert "openvino" not in tried


def test_auto_compiles_nothing_that_a_native_kernel_runs(
    monkeypatch: pytest.MonkeyPatch, tried: list[str | None]
) -> None:
    if not ops.has_native(CPU):
        pytest.skip("no C++ compiler")
    measured(monkeypatch, tried, {None: 60.0, "openvino": 1.0, "torch.compile": 2.0})
    Sampler(MLP(), (2,), steps=3, compile="auto")(2)
    Sampler(UNet(1, 8, (16, 16)), (1, 8, 8), steps=3, compile="auto")(2)
    assert not tried
    assert chosen(Sampler(UNet(1, 8, (2, 3)), (1, 8, 8), steps=3, compile="auto"), 2) == "openvino"


# OpenVINO -----------------------------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """A small convolutional network with a label and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)
        self.norm, self.time, self.label = nn.GroupNorm(2, 8), nn.Linear(1, 8), nn.Embedding(10, 8)
        self.factor = 1.0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.first(x)
        shift = self.time(t[:, None].to(h.dtype)) + self.label(y)
        g = nn.functional.silu(self.norm(h) + shift[:, :, None, None])
        f: Tensor = self.factor * self.last(torch.cat((h, g), 1))
        return f


SMALL = {"steps": 4, "backend": "eager"}


def labels(n: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(n)
    drawn = torch.randint(10, (n,), generator=generator)
    return {"model_kwargs": {"y": drawn}, "uncond_kwargs": {"y": torch.zeros_like(drawn)}}


def agree(ours: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * scale)  # other sums of some 100 products, 4 rows


def needs_openvino() -> None:
    if not openvino.is_installed():
        pytest.skip("OpenVINO is not installed")


@pytest.mark.parametrize("value", ["yes", "", 1, None])
def test_another_compiler_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^compile must be True, False, 'auto' or 'openvino', got "):
        Sampler(MLP(), (2,), compile=value)
    with pytest.raises((TypeError, ValueError), match=r"^compile must be"):
        fastsde.accelerate(compile=value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.bfloat16}, "needs a network in float32, got torch.bfloat16; use compile=True"),
        ({"dtype": torch.float64}, "needs a network in float32, got torch.float64; leave compile out"),
        ({"backend": "reference"}, "backend 'reference' is plain PyTorch; for compile='openvino' use 'eager'"),
        ({"backend": "persistent"}, "does not support compile"),
        ({"model": lambda x, t: x}, "cannot run this model: it is not an nn.Module; or use compile=True"),
        (
            {"model": ConcatTime(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))},
            "in training mode changes in each call",
        ),
    ],
)
def test_what_openvino_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(openvino, "is_installed", lambda: True)
    options = {"model": MLP(), "sample_shape": (2,), **options}
    with pytest.raises(ValueError, match=message):
        Sampler(**options, compile="openvino")
    error = compilers.unavailable_error("openvino", MLP(), torch.float32, torch.device("cuda", 0))
    assert str(error) == "compile='openvino' needs the CPU, got device cuda:0; use compile=True"


def test_without_openvino_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "is_installed", lambda: False)
    message = r"^openvino is not installed; .*'fastsde\[openvino\]', or use compile=True$"
    with pytest.raises(MissingExtraError, match=message):
        Sampler(MLP(), (2,), compile="openvino")


@pytest.mark.slow
def test_openvino_gives_the_same_samples_in_any_batch_and_follows_changes() -> None:
    needs_openvino()
    model = Convolutions()
    with torch.no_grad():
        model.last.weight.mul_(0.1)  # so that the samples stay small
    options = {**SMALL, "guidance": 2.0}
    plain = Sampler(model, (1, 6, 5), **options)
    fast, split = (Sampler(model, (1, 6, 5), compile="openvino", max_batch=most, **options) for most in (None, 2))
    expected = plain(3, **labels(3))
    for sampler in fast, split, pickle.loads(pickle.dumps(fast)):
        agree(sampler(3, **labels(3)), expected)
    agree(fast(1, **labels(1)), plain(1, **labels(1)))
    assert fast(0, **labels(0)).shape == (0, 1, 6, 5)
    changes: list[Callable[[], object]] = [
        lambda: model.first.weight.data.mul_(1.5),
        lambda: setattr(model, "factor", 3.0),
        lambda: setattr(model, "norm", nn.GroupNorm(4, 8)),
    ]
    for change in changes:
        change()
        found, now = fast(3, **labels(3)), plain(3, **labels(3))
        agree(found, now)
        assert (found - expected).abs().max() > 1e-3
        expected = now
    with torch.autocast("cpu", dtype=torch.bfloat16):  # OpenVINO knows nothing of it
        assert torch.equal(fast(3, **labels(3)), plain(3, **labels(3)))


class Linear(nn.Module):
    """A network that does no harm; its subclasses do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.calls = 0
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("cache", None)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        f: Tensor = self.layer(x)
        return f


class Branching(Linear):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        f: Tensor = self.layer(x) if t[0] > 0.5 else -self.layer(x)
        return f


class Dropping(Linear):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x))


class Drawing(Linear):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        f: Tensor = self.layer(x) * random.random()
        return f


class Counting(Linear):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        f: Tensor = self.layer(x)
        return f


class CountingInABuffer(Linear):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.count += 1
        f: Tensor = self.layer(x) * self.count
        return f


class Overwriting(Linear):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x += 1
        f: Tensor = self.layer(x)
        return f


class Caching(Linear):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.arange(2.0)
        f: Tensor = self.layer(x) + self.cache
        return f


class IgnoringX(Linear):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return t[:, None].expand(-1, 2).contiguous()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Branching, "data-dependent"),
        (Dropping, "it draws random numbers"),
        (Drawing, "it draws random numbers"),
        (Counting, "a call of it changes what it holds"),
        (CountingInABuffer, "a call of it changes what it holds"),
        (Overwriting, "it writes to its arguments"),
        (MLP, "OpenVINO's output differs from PyTorch's by up to"),
    ],
)
def test_what_openvino_would_compute_otherwise_runs_without_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: type[nn.Module], reason: str
) -> None:
    needs_openvino()
    if kind is MLP:
        right = openvino._exported

        def wrong(*args: Any) -> Any:
            call = right(*args)
            return lambda tensors: 1.01 * call(tensors)

        monkeypatch.setattr(openvino, "_exported", wrong)
    tries = []
    monkeypatch.setattr(openvino, "_Checked", Recorded(openvino._Checked, tries))
    model = kind()
    drawn = []
    for draw in (
        lambda: Sampler(model, (2,), compile="openvino", **SMALL)(4),
        lambda: Sampler(model, (2,), compile="openvino", **SMALL)(4),
        lambda: fastsde.sample(model, (4, 2), **SMALL),
    ):
        torch.manual_seed(1), random.seed(1)
        if hasattr(model, "count"):
            model.count.zero_()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            drawn.append(draw())
        messages = [str(each.message) for each in told]
        assert len(messages) == (len(drawn) < 3)
        assert all(f"openvino failed, the network runs without it: {reason}" in each for each in messages) or (
            reason == "data-dependent"
        )
    assert len(tries) == 1 + (kind is Counting)  # another sampler does not try again, unless the network has changed
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[2])
    assert not capfd.readouterr().err


class Recorded:
    """Calls a function, and records the calls."""

    def __init__(self, function: Any, calls: list[Any]) -> None:
        self._function, self._calls = function, calls

    def __call__(self, *args: Any) -> Any:
        self._calls.append(args)
        return self._function(*args)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Linear, Caching, IgnoringX])
def test_a_network_that_fills_a_cache_or_ignores_an_argument_is_exported(kind: type[nn.Module]) -> None:
    needs_openvino()
    model = kind()
    sampler = Sampler(model, (2,), compile="openvino", **SMALL)
    for _ in range(2):
        found = sampler(4)
        assert sampler._network.is_compiled
        agree(found, fastsde.sample(model, (4, 2), **SMALL))  # and no symbol is left in the cache


FACTOR = torch.tensor(2.0)


class Global(Linear):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        f: Tensor = self.layer(x) * FACTOR
        return f


@pytest.mark.slow
def test_a_network_that_becomes_unsuitable_runs_without_openvino() -> None:
    needs_openvino()
    model = Linear()
    sampler = Sampler(model, (2,), compile="openvino", **SMALL)
    expected = fastsde.sample(model, (4, 2), **SMALL)
    agree(sampler(4), expected)
    model.extra = torch.ones(2)
    with pytest.warns(RuntimeWarning, match="the network runs uncompiled: .* it holds tensors besides"):
        assert torch.equal(sampler(4), expected)
    with pytest.raises(ValueError, match="it holds tensors besides parameters and buffers; or use compile=True"):
        Sampler(Global(), (2,), compile="openvino")


def test_a_label_out_of_range_is_an_error_in_a_later_call_too() -> None:
    needs_openvino()
    sampler = Sampler(Convolutions(), (1, 6, 5), compile="openvino", **SMALL)
    sampler(3, model_kwargs={"y": torch.tensor([1, 2, 3])})
    sampler(3, model_kwargs={"y": torch.tensor([0, 9, 3])})
    for wrong in (10, 10, -1, 2**32 + 1):
        with pytest.raises(IndexError, match="out of range"):
            sampler(3, model_kwargs={"y": torch.tensor([1, 2, wrong])})


@pytest.mark.slow
def test_weights_that_a_callback_changes_take_effect_in_the_next_call() -> None:
    needs_openvino()
    model = Linear()
    sampler = Sampler(model, (2,), compile="openvino", **SMALL)
    before = sampler(4)

    def changes(row: int, time: float, x: Tensor) -> None:
        if row == 0:
            model.layer.weight.data.mul_(-2)

    assert torch.equal(sampler(4, callback=changes), before)
    agree(sampler(4), fastsde.sample(model, (4, 2), **SMALL))


@pytest.mark.slow
def test_openvino_does_not_keep_a_network_alive() -> None:
    needs_openvino()
    models = [Linear(), Branching()]
    for model in models:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Sampler(model, (2,), compile="openvino", **SMALL)(4)
    alive = [weakref.ref(model) for model in models]
    del model, models
    gc.collect()
    assert [each() for each in alive] == [None, None]


@pytest.mark.slow
def test_a_loop_with_a_condition_a_row_runs_through_openvino() -> None:
    needs_openvino()
    network = Convolutions()

    def loop(network: Any, n: int) -> Tensor:
        x = 0.1 * torch.randn(n, 1, 6, 5)
        for row in range(3):
            f = network(x, torch.full((n,), 1 - row / 3), y=torch.full((n,), row))
            x = x - 0.1 * f + 0.1 * torch.randn_like(x)
        return x

    fast = fastsde.accelerate(loop, compile="openvino")
    for _ in range(2):
        agree(fast(network, 5), fastsde.accelerate(loop, backend="eager")(network, 5))


@pytest.mark.slow
def test_exporting_leaves_the_modes_of_modules_as_they_are() -> None:
    needs_openvino()
    model = ConcatTime(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.0)).train())
    model.training = False
    Sampler(model, (2,), compile="openvino", **SMALL)(4)
    assert [module.training for module in model.modules()] == [False, True, True, True]


@pytest.mark.slow
def test_openvino_is_imported_without_its_telemetry() -> None:
    needs_openvino()
    code = "import sys; from fastsde.engines import openvino; openvino.library()\n"
    code += "assert 'openvino' in sys.modules and 'openvino.tools.ovc.convert' in sys.modules\n"
    code += "assert not any(name.startswith('openvino_telemetry') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
