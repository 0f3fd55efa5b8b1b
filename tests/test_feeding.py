"""The arguments of a network: times that are never rounded, unchanged conditions, and what replaces them if refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastsde
from fastsde import Sampler, notices, ops, solvers
from fastsde.engines import network as network_module
from fastsde.engines.network import Network
from fastsde.models import MLP, ConcatTime, UNet
from fastsde.verify import verify

TIMES = [999, 937, 833, 625, 501]
LOW = torch.bfloat16


def integer_table(times: list[int] = TIMES) -> fastsde.StepTable:
    """Returns a table of DDIM with integer times, as in diffusers' schedulers."""
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = torch.tensor([*np.cumprod(1 - betas)[times], 1.0], dtype=torch.float64, device="cpu")
    return solvers.ddim(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), times)


class Embedded(nn.Module):
    """Looks up its times, which must be integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(1000, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = self.linear(x + self.embedding(t))
        return result


class Sinusoidal(nn.Module):
    """A handwritten time embedding that has the dtype of t and goes into a Linear without a cast.

    Args:
        rate: the angle by which the output turns from one time to the next.
    """

    def __init__(self, casts: bool, rate: float = 1.0) -> None:
        super().__init__()
        self.casts, self.rate = casts, rate
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        embedding = torch.stack((torch.sin(self.rate * t), torch.cos(self.rate * t)), -1)
        f: Tensor = self.linear(embedding.to(x.dtype) if self.casts else embedding)
        return f - 0.1 * x


def check_times(backend: str, as_weights: bool, casts: bool) -> None:
    model, low = Sinusoidal(casts), Sinusoidal(casts)
    low.load_state_dict(model.state_dict())
    low, options = (low.to(LOW), {}) if as_weights else (low, {"dtype": LOW})
    expected = fastsde.sample(model, (4, 2), solver=integer_table(), backend="reference")
    x = fastsde.sample(low, (4, 2), solver=integer_table(), backend=backend, **options)
    # Rounded to bf16 the first time is 1000, with a completely different sine: 0.83 instead of -0.03.
    assert float((x - expected).square().mean().sqrt()) < 0.02 * float(expected.square().mean().sqrt())


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("as_weights", [False, True], ids=["dtype", "weights"])
@pytest.mark.parametrize("casts", [True, False])
def test_times_reach_a_half_precision_network_as_they_are(backend: str, as_weights: bool, casts: bool) -> None:
    check_times(backend, as_weights, casts)


@pytest.mark.parametrize("as_weights", [False, True], ids=["dtype", "weights"])
@pytest.mark.parametrize("casts", [True, False])
def test_times_reach_a_captured_network_as_they_are(graphs: Any, as_weights: bool, casts: bool) -> None:
    check_times("graph", as_weights, casts)


def check_lookup(backend: str, dtype: torch.dtype | None) -> None:
    model = Embedded()
    by_hand = fastsde.sample(lambda x, t: model(x, t.long()), (4, 2), solver=integer_table(), backend="reference")
    x = fastsde.sample(model, (4, 2), solver=integer_table(), backend=backend, dtype=dtype)
    tolerance = 1e-5 if dtype is None else 0.05
    torch.testing.assert_close(x, by_hand, rtol=tolerance, atol=tolerance * float(by_hand.abs().max()))


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("dtype", [None, LOW], ids=str)
def test_a_network_that_looks_its_times_up_gets_integers(backend: str, dtype: torch.dtype | None) -> None:
    check_lookup(backend, dtype)


@pytest.mark.parametrize("dtype", [None, LOW], ids=str)
def test_a_captured_network_that_looks_its_times_up_gets_integers(graphs: Any, dtype: torch.dtype | None) -> None:
    check_lookup("graph", dtype)


def test_times_that_are_no_integers_are_not_made_some() -> None:
    with pytest.raises(RuntimeError, match="Long, Int"):
        fastsde.sample(Embedded(), (4, 2), steps=3)


class Conditional(nn.Module):
    """Records the dtype of its condition."""

    def __init__(self, casts: bool) -> None:
        super().__init__()
        self.casts, self.linear, self.seen = casts, nn.Linear(2, 2), []

    def forward(self, x: Tensor, t: Tensor, y: Tensor, weight: float = 1.0) -> Tensor:
        self.seen.append(y.dtype)
        f: Tensor = self.linear(y.to(x.dtype) if self.casts else y)
        return weight * f - x


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_conditions_keep_their_dtype_unless_the_network_refuses_it(backend: str) -> None:
    for casts, seen in ((True, [torch.float32] * 3), (False, [torch.float32, LOW, torch.float32, LOW, LOW])):
        model = Conditional(casts).to(LOW)
        options = {"steps": 3, "backend": backend, "model_kwargs": {"y": torch.randn(4, 2), "weight": 0.5}}
        x = fastsde.sample(model, (4, 2), **options)
        assert model.seen == seen
        model.casts = True
        assert torch.equal(x, fastsde.sample(model, (4, 2), **options))


def test_an_error_of_the_network_is_raised_as_it_is() -> None:
    calls = []

    def fails(x: Tensor, t: Tensor) -> Tensor:
        calls.append((x.dtype, t.dtype))
        raise RuntimeError(f"its own, call {len(calls)}")

    with pytest.raises(RuntimeError, match=r"^its own, call 1$"):
        Network(fails, LOW, integer_times=True)(torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"^its own, call \d+$"):  # with nothing else to try
        fastsde.sample(fails, (2, 2), steps=1)


def test_a_network_that_takes_times_in_its_dtype_alone_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_told", {})

    def strict(x: Tensor, t: Tensor) -> Tensor:
        if t.dtype != x.dtype:
            raise RuntimeError(f"expected {x.dtype}, got {t.dtype}")
        return -x

    with pytest.warns(RuntimeWarning, match=r"accepts times only in torch.bfloat16.*expected torch.bfloat16, got"):
        fastsde.sample(strict, (2, 2), steps=2, dtype=LOW)
    fastsde.sample(strict, (2, 2), steps=2, dtype=LOW)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (MLP(2, (8,)), (2,)),
        (ConcatTime(nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2))), (2,)),
        (nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2)), (2,)),
        (UNet(1, 8, (2, 3)), (1, 8, 8)),
        (UNet(1, 8, (16, 16)), (1, 8, 8)),
    ],
    ids=["MLP", "ConcatTime", "Sequential", "UNet", "native UNet"],
)
@pytest.mark.parametrize("optimize", [False, True])
def test_the_packages_networks_take_times_of_any_dtype(model: nn.Module, shape: Any, optimize: bool) -> None:
    model.requires_grad_(False)
    network = Network(model, LOW, optimize=optimize)
    x, t = torch.randn(3, *shape), torch.tensor([101.0, 301.0, 501.0])  # bf16 lacks the last two
    f = network(x, t)
    assert f.dtype == LOW
    exact = Network(model)(x, t)
    assert float((f - exact).abs().max()) < 0.15 * float(exact.abs().max())
    if optimize and isinstance(model, UNet) and network.is_native and ops.multiplies_bf16():
        assert not torch.equal(f, network(x, t.to(LOW).float()))  # the native kernel has the time in fp32


def test_verify_sees_times_that_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def verdicts() -> list[str]:
        results = verify(Sinusoidal(True), (2,), solver=integer_table(), n=16, device="cpu")
        return [r.verdict for r in results if r.backend == "eager"]

    assert verdicts() == ["pass", "pass"]
    rounded = lambda dtype, integer_times: [network_module.Feed(dtype, casts=True)]  # noqa: E731
    monkeypatch.setattr(network_module, "_feeds", rounded)
    assert verdicts() == ["pass", "fail"]


def test_what_a_network_takes_is_learned_before_it_is_captured(graphs: Any) -> None:
    sampler = Sampler(Embedded(), (2,), solver=integer_table(), backend="graph")
    assert torch.equal(sampler(3), sampler(3))
    assert len(graphs.recorded) == 1


def test_samples_of_integer_and_other_times_share_no_capture(graphs: Any) -> None:
    model = Embedded()
    fractional = replace(integer_table(), time=integer_table().time - 0.5)
    Sampler(model, (2,), solver=integer_table(), backend="graph")(3)
    with pytest.raises(RuntimeError, match="Long, Int"):
        Sampler(model, (2,), solver=fractional, backend="graph")(3)


@pytest.mark.filterwarnings("ignore:the network has BatchNorm1d in training mode")
def test_refusals_leave_no_trace_and_are_learned_once_for_all_samplers() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear, self.calls = nn.BatchNorm1d(2), nn.Linear(3, 2), []

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            x = self.norm(x)
            f: Tensor = self.linear(torch.cat((x, t[:, None]), 1))  # it promotes to fp32
            return f

    model = Counted().to(LOW)
    model.register_forward_pre_hook(lambda module, args: module.calls.append(args[1].dtype))
    for _ in range(2):
        fastsde.sample(model, (8, 2), steps=3, backend="eager")
    assert int(model.norm.num_batches_tracked) == 6
    assert len(model.calls) == 3 + 5  # two more in the first row, and one to confirm


def test_an_error_that_passes_is_no_refusal() -> None:
    times: list[torch.dtype] = []

    def flaky(x: Tensor, t: Tensor) -> Tensor:
        times.append(t.dtype)
        if len(times) == 1:
            raise RuntimeError("a lock timed out")
        return -x

    fastsde.sample(flaky, (2, 2), solver=integer_table(), backend="eager")
    assert times == [torch.float32, torch.int64] + [torch.float32] * len(TIMES)
    with pytest.raises(fastsde.NonFiniteError, match="in row 0"):
        fastsde.sample(lambda x, t: fastsde.sample(lambda x, t: x / 0, (2, 2), steps=1), (2, 2), solver=integer_table())


def test_verify_takes_a_closure_that_looks_integer_times_up() -> None:
    model, labels = Embedded(), torch.randn(8, 2)
    closure = lambda x, t: model(x + labels, t)  # noqa: E731
    results = verify(closure, (2,), solver=integer_table(), n=8, device="cpu", dtypes=[torch.float32])
    assert [r.verdict for r in results if r.backend == "eager"] == ["pass"]
