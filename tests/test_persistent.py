"""Properties of the persistent backend: which networks and options it supports, and weights that change."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from tables import random_table
from torch import nn
from tqdm import tqdm

import fastsde
from fastsde import Sampler, StepTable, checkpoints, ops
from fastsde.models import MLP, ConcatTime, UNet
from fastsde.plan import unavailable_reason

CPU = torch.device("cpu")


class _Subclass(MLP):
    def forward(self, x, t):
        return -super().forward(x, t)


def _sequential(*layers: nn.Module) -> nn.Module:
    return ConcatTime(nn.Sequential(*layers))


def _hooked() -> nn.Module:
    model = MLP()
    model.net[0].register_forward_hook(lambda module, args, output: output + 1)
    return model


def test_without_kernels_the_reason_is_said_and_auto_takes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.dispatch, "has_native", lambda device: False)
    reason = unavailable_reason("persistent", CPU)
    assert reason is not None
    assert "needs Triton and a CUDA GPU, or the CPU and native kernels, got device cpu" in reason
    assert reason.endswith("use 'eager' or 'reference'")
    assert Sampler(MLP(), (2,)).backend == "eager"
    assert repr(Sampler(MLP(), (2,), steps=7)) == "Sampler(MLP, (2,), 7 rows, backend='eager', device='cpu')"


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled for the GPU here")
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    "model",
    [
        MLP(),
        MLP((2, 3), (20,), "GELU"),
        MLP(2, ()),
        _sequential(nn.Linear(3, 64), nn.LogSigmoid(), nn.Linear(64, 2, bias=False)),
        _sequential(nn.Linear(3, 64), nn.Linear(64, 16), nn.Softplus(2.0), nn.Identity(), nn.Linear(16, 2)),
        _sequential(nn.LogSigmoid(), nn.Linear(3, 2), nn.Tanh()),
        lambda x, t: -x,
        _Subclass(),
        _hooked(),
    ],
)
def test_auto_takes_it_for_a_small_network(model: nn.Module) -> None:
    shape = getattr(model, "shape", (2,))
    assert Sampler(model, shape).backend == "persistent"


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (UNet(), {}, "samples of up to 64 elements"),
        (_sequential(nn.Linear(3, 8), nn.Conv1d(1, 1, 1)), {}, r"Conv1d \(net.1\): a program has no such layer"),
        (
            _sequential(nn.Linear(3, 8), nn.Hardswish(), nn.Linear(8, 2)),
            {},
            "hardswish: a program has no such operation",
        ),
        (_sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 2)), {}, "draws random numbers"),
        (MLP(65), {}, "samples of up to 64 elements"),
        (MLP(2, (257,)), {}, "257 units side by side, more than 256"),
        (MLP(), {"dtype": torch.float16}, "in torch.float32 or torch.bfloat16, not in torch.float16"),
        (MLP(), {"dtype": torch.float64}, "keeps the state in fp32"),
        (MLP(), {"compile": True}, "does not support compile; use 'eager'"),
    ],
)
def test_what_it_cannot_run_is_refused_and_runs_elsewhere(model, options, reason) -> None:
    shape = (2,) if getattr(model, "shape", (2,)) == (2,) else model.shape
    with pytest.raises(ValueError, match=f"backend 'persistent'.*{reason}"):
        Sampler(model, shape, backend="persistent", **options)
    assert Sampler(model, shape, **options).backend in ("eager", "reference")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2), (2, 20), (2, 1)])
@pytest.mark.parametrize("model", [MLP(2, (8,)), _sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))])
def test_samples_of_another_shape_are_no_case_for_it(model: nn.Module, shape: tuple[int, ...]) -> None:
    if isinstance(model, ConcatTime):
        with pytest.raises(ValueError, match=r"a ConcatTime is called with .*, on samples of shape \[2\], got"):
            Sampler(model, shape, backend="persistent")
    elif shape != (2, 1):  # it flattens samples
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):  # the network's own
            Sampler(model, shape, steps=2, backend="persistent")(2)
        assert Sampler(model, shape).backend == "eager"  # the error is the network's own


@pytest.mark.usefixtures("interpreter")
def test_auto_leaves_it_out_where_it_does_not_pay() -> None:
    wide = MLP(2, (65,))
    assert Sampler(wide, (2,)).backend == "eager"
    assert Sampler(wide, (2,), dtype=torch.bfloat16).backend == "persistent"
    assert Sampler(wide, (2,), backend="persistent").backend == "persistent"
    deep = MLP(2, (256,) * 8)  # would take half a minute to compile
    assert Sampler(deep, (2,), dtype=torch.bfloat16).backend == "eager"


SWITCHES = [("tf32", None, "tf32"), ("ieee", None, "fp32"), (None, True, "tf32")]


@pytest.mark.slow
@pytest.mark.parametrize(("newer", "older", "expected"), SWITCHES)
def test_the_precision_follows_either_switch_of_pytorch(newer: str | None, older: bool | None, expected: str) -> None:
    code = "import torch; from fastsde.engines import persistent; from fastsde.engines.network import Network; "
    code += f"torch.backends.cuda.matmul.fp32_precision = {newer!r}; " if newer else ""
    code += f"torch.backends.cuda.matmul.allow_tf32 = {older}; " if older is not None else ""
    code += f"assert persistent._precision(Network(torch.nn.Linear(2, 2)), torch.device('cuda')) == {expected!r}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("option", ["noise", "callback"])
def test_options_of_a_call_that_it_has_not(option: str) -> None:
    value = {
        "noise": lambda row, x: torch.zeros_like(x),
        "callback": lambda row, time, x: None,
    }[option]
    with pytest.raises(ValueError, match=f"does not support {option}; use 'eager'"):
        fastsde.sample(MLP(), (2, 2), steps=2, backend="persistent", **{option: value})
    sampler = Sampler(MLP(), (2,), steps=2)
    assert sampler.backend == "persistent"
    assert sampler(2, **{option: value}).shape == (2, 2)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("change", ["in place", "through data", "replaced", "loaded", "activation", "transposed"])
def test_weights_that_change_are_seen(change: str) -> None:
    model, other = MLP(2, (16,)), MLP(2, (16,))
    sampler = Sampler(model, (2,), steps=3, backend="persistent")
    before = sampler(3)
    with torch.no_grad():
        if change == "in place":
            model.net[0].weight.mul_(0.5)
        elif change == "through data":
            model.net[2].bias.data.add_(1.0)
        elif change == "replaced":
            model.net[2].weight = nn.Parameter(torch.ones(2, 16))
        elif change == "activation":
            model.net[1] = nn.Tanh()
        elif change == "transposed":
            model.net[2].weight.data = model.net[2].weight.data.flip(0).T.contiguous().T
        else:
            model.load_state_dict(other.state_dict())
    after = sampler(3)
    assert not torch.allclose(before, after)
    expected = fastsde.sample(copy.deepcopy(model), (3, 2), steps=3, backend="reference")
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("n", [0, 1, 5, pytest.param(40, marks=pytest.mark.slow)])
def test_a_batch_may_be_split(n: int) -> None:
    checkpoint = checkpoints.load("swiss-roll")
    options = {"prediction": checkpoint.prediction, "steps": 6, "trajectory": 2, "seed": 3}
    whole = fastsde.sample(checkpoint.model, (n, 2), backend="persistent", **options)
    split = fastsde.sample(checkpoint.model, (n, 2), backend="persistent", max_batch=3, **options)
    expected = fastsde.sample(checkpoint.model, (n, 2), backend="reference", **options)
    for ours, halves, theirs in zip(whole, split, expected, strict=True):
        # A tile of another height may add the terms of a product in another order.
        torch.testing.assert_close(ours, halves, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.fixture(params=["interpreter", "native"])
def kernels(request: pytest.FixtureRequest) -> None:
    """Runs the test with each kernel that runs on a CPU."""
    if request.param == "interpreter":
        request.getfixturevalue("interpreter")
    elif not ops.has_native(CPU):
        pytest.skip("no native kernels")


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
def test_tables_of_every_number_of_slots(slots: int) -> None:
    generator = torch.Generator().manual_seed(slots)
    model, table = MLP(2, (16,), "Tanh"), random_table(slots, 6, clip=0.7)
    options = {"solver": table, "x_init": torch.randn(5, 2, generator=generator), "trajectory": 2, "seed": 3}
    ours = fastsde.sample(model, (5, 2), backend="persistent", max_batch=3, **options)
    theirs = fastsde.sample(model, (5, 2), backend="reference", **options)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the infinities that the test is about
@pytest.mark.usefixtures("kernels")
def test_another_slot_that_is_not_finite_is_reported_once_it_matters() -> None:
    # From row 1 on the network is called with slot 1, which row 0 makes infinite, and which a Tanh hides.
    columns = {name: torch.zeros(3, 2, dtype=torch.float64) for name in "npbed"}
    columns["n"][0, 0] = columns["n"][1:, 1] = 1.0
    keep = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1)
    keep[0, 1, 0] = 3e38
    table = StepTable(torch.linspace(1, 0.5, 3, dtype=torch.float64), A=keep, **columns)
    with pytest.raises(fastsde.NonFiniteError, match="NaN or infinity"):
        fastsde.sample(
            MLP(2, (16,), "Tanh"), (3, 2), solver=table, x_init=torch.full((3, 2), 2.0), backend="persistent"
        )


def test_the_bar_moves_while_rows_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ops.has_native(CPU):
        pytest.skip("no native kernels")
    kernel, updates = ops.dispatch.kernel("mlp_sampler", CPU), []
    monkeypatch.setattr(kernel, "piece", lambda rows, batch, products, threads: (4, 16))
    monkeypatch.setattr(tqdm, "update", lambda self, n: updates.append(n))
    fastsde.sample(MLP(), (40, 2), steps=10, backend="persistent", progress=True)
    assert updates == [4, 4, 2]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the infinities that the test is about
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("activation", "clip"), [("ReLU", None), ("LogSigmoid", 1.0), ("Softplus", 1.0)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_reported_with_row_and_time(activation: str, clip: float | None, value: float) -> None:
    # The time's weight breaks the last layer from the first row on; a clip or a ReLU must not hide it.
    model = MLP(2, (16,), activation)
    with torch.no_grad():
        model.net[2].bias[1] = value
    with pytest.raises(fastsde.NonFiniteError, match="the network returned NaN or infinity in row 0, at time 1"):
        fastsde.sample(model, (3, 2), steps=4, solver="ddim", clip=clip, backend="persistent")
