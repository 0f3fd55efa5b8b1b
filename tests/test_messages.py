"""Messages for users: errors that name the argument to fix, and warnings that are shown once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsde
from fastsde import Sampler, notices, ops
from fastsde.models import MLP
from fastsde.verify import verify


class Labelled(nn.Module):
    """A network with ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.labels, self.linear = nn.Embedding(10, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        f: Tensor = self.linear(x + self.labels(y)) - x
        return f


BACKENDS = ["reference", "eager"]
MODEL, LABELS = Labelled(), torch.arange(4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_conditions_point_at_their_argument(backend: str) -> None:
    options: dict[str, Any] = {"steps": 2, "backend": backend}
    with pytest.raises(TypeError, match=r"model\(x, t, \*\*model_kwargs\).*missing a required argument: 'y'"):
        fastsde.sample(MODEL, (4, 2), **options)
    with pytest.raises(TypeError, match=r"\*\*uncond_kwargs\).*uncond_kwargs with 'label'.*missing a required"):
        fastsde.sample(
            MODEL, (4, 2), guidance=2.0, model_kwargs={"y": LABELS}, uncond_kwargs={"label": LABELS}, **options
        )
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'z'"):
        fastsde.sample(MODEL, (4, 2), model_kwargs={"y": LABELS, "z": 1.0}, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "y"), [("model_kwargs", (0, 10)), ("uncond_kwargs", (10, 0))])
def test_labels_out_of_range_are_named_with_their_argument(backend: str, name: str, y: tuple[int, int]) -> None:
    given = {"model_kwargs": {"y": LABELS + y[1]}, "uncond_kwargs": {"y": LABELS + y[0]}}
    with pytest.raises(
        IndexError, match=rf"the network failed at time 1 with {name} 'y' of 10 \.\. 13: index out of range"
    ):
        fastsde.sample(MODEL, (4, 2), steps=2, backend=backend, guidance=1.5, **given)


def test_verify_takes_conditions_and_guidance() -> None:
    options: dict[str, Any] = {"model_kwargs": {"y": LABELS}, "steps": 5, "device": "cpu"}
    guided = {**options, "guidance": 2.0, "uncond_kwargs": {"y": 0 * LABELS}, "solver": "ddim", "clip": 3.0}
    torch.manual_seed(0)  # one in 200 other networks amplifies a rounding error by more than verify allows
    model = Labelled()
    for given in (options, guided):
        results = verify(model, (2,), prediction="eps", **given)
        assert [r.verdict for r in results if r.backend == "eager"] == ["pass", "pass"]
    persistent = next(r for r in results if r.backend == "persistent")
    assert persistent.verdict == ("pass" if ops.has_native(torch.device("cpu")) else "unavailable")


def test_verify_takes_a_function_that_holds_weights_and_labels_of_its_own() -> None:
    net, labels = nn.Linear(4, 2), torch.randn(8, 2)
    closure = lambda x, t: net(torch.cat((x, labels), -1)) - x  # noqa: E731
    results = verify(closure, (2,), n=8, steps=5, device="cpu", dtypes=[torch.float32])
    assert [r.verdict for r in results if r.backend in ("reference", "eager")] == ["truth", "yardstick", "pass"]


def test_emulated_bf16_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_told", {})
    monkeypatch.setattr(ops, "multiplies_bf16", lambda: False)
    with pytest.warns(RuntimeWarning, match="this CPU has no bf16 arithmetic"):
        Sampler(MLP(), (2,), dtype=torch.bfloat16)
    Sampler(MLP().bfloat16(), (2,))
    monkeypatch.setattr(notices, "_told", {})
    Sampler(MLP(), (2,))


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu avx512f\n", False),
        ("Features\t: fp asimd bf16\n", True),
        ("", True),
    ],
)
def test_bf16_is_read_from_what_the_cpu_says(monkeypatch: pytest.MonkeyPatch, cpuinfo: str, expected: bool) -> None:
    monkeypatch.setattr("fastsde.ops.dispatch.Path.read_text", lambda self: cpuinfo)
    assert ops.multiplies_bf16.__wrapped__() is expected


def test_compiling_is_told_of_where_there_is_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)
    sampler = Sampler(MLP(), (2,), steps=2, compile=True)
    sampler(2, progress=True)
    assert capsys.readouterr().err.count("torch.compile compiles the network first") == 1
    sampler(2, progress=True)
    Sampler(MLP(), (2,), steps=2, compile=True)(2)
    assert "torch.compile" not in capsys.readouterr().err
