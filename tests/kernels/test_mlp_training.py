"""Native training steps of an MLP compared with `fastsde.reference.train_step` and PyTorch's Adam."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from native_steps import native_steps
from networks import Film, Residual
from torch import Tensor, nn

from fastsde import checkpoints, noise, ops, reference
from fastsde.models import MLP
from fastsde.models.activations import ACTIVATIONS, Activation
from fastsde.objective import Objective
from fastsde.training import TrainConfig, Trainer, default_config, native_mlp
from fastsde.training.native_mlp import NativeSteps

pytestmark = pytest.mark.usefixtures("native")

EPS = 2.0**-24
SCORE = Objective()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _native_gradients(
    model: nn.Module, data: Tensor, keys: Tensor, step: int, objective: Objective, **given: Any
) -> tuple[Tensor, list[Any]]:
    """Returns the loss and the gradients of a step, as ten times Adam's first moment after the first step."""
    table, rates = ops.step_coefficients(objective, keys, step), torch.zeros(1, 2)
    losses, average = native_steps(model, data.shape[1:], data, keys, table, first=step, rates=rates, **given)
    return losses[0], [10 * each for each in average]


def _assert_gradients(
    model: MLP,
    data: Tensor,
    batch: int,
    objective: Objective = SCORE,
    **given: Any,
) -> None:
    """Checks that gradients are as close to float64 as PyTorch's in fp32, apart from the error of the noise."""
    keys, step = noise.sample_keys(3, batch), 5
    draws = reference.training_draws(keys, step, len(data), data.shape[1:], objective)
    (t,) = ops.training_times(objective, keys, step)
    results = []
    for dtype in (torch.float64, torch.float32):
        network = copy.deepcopy(model).to(dtype)
        cast = reference.Draws(draws.data_index, objective.table(t, dtype), draws.z.to(dtype))
        sgd = torch.optim.SGD(network.parameters(), lr=0.0)
        loss = reference.train_step(network, sgd, data.to(dtype), None, step, objective, draws=cast, **given)
        results.append([loss, *(each.grad for each in network.parameters())])
    ours = _native_gradients(model, data, keys, step, objective, **given)
    for mine, exact, theirs in zip([ours[0], *ours[1]], *results, strict=True):
        scale = float(exact.abs().max())
        error = float((mine.double() - exact).abs().max())
        allowed = 4 * float((theirs.double() - exact).abs().max()) + (100 * EPS + 4e-6) * scale
        assert error <= allowed, f"{error / scale:.3g} of the largest, beyond {allowed / scale:.3g}"


@pytest.mark.parametrize(
    "objective",
    [
        Objective(prediction="x0", weighting="likelihood", t_min=0.01),
        Objective(prediction="v", weighting="target"),
        Objective(prediction="flow", weighting="target", t_max=0.7),
        Objective(prediction="x0", weighting="target", preconditioning="edm", times="lognormal"),
    ],
    ids=["x0", "v", "flow", "edm"],
)
def test_any_objective(objective: Objective) -> None:
    _assert_gradients(MLP(2, (20, 16)), torch.randn(50, 2), 77, objective)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(), (1,), (64, 64, 64), (33, 5)])
def test_every_activation_and_depth(activation: str, hidden: tuple[int, ...]) -> None:
    if activation == "ReLU":  # its derivative jumps: of new numbers, one in millions would round to the other side
        torch.manual_seed(0)
    _assert_gradients(MLP(3, hidden, activation), torch.randn(50, 3), 40)


@pytest.mark.parametrize("batch", [1, 2, 31, 32, 33, 63, 256, 1000])
@pytest.mark.parametrize("dim", [1, 2, 16, 65])
def test_every_batch_and_dimension(batch: int, dim: int) -> None:
    _assert_gradients(MLP(dim, (24,)), torch.randn(7, dim), batch)


def test_pixels_are_scaled() -> None:
    pixels = torch.randint(256, (9, 5)).byte()
    _assert_gradients(MLP(5, (16,)), pixels, 33, scale=1 / 127.5, shift=-1.0)


def test_layers_without_bias() -> None:
    model = MLP(2, (16,))
    model.net[0] = nn.Linear(3, 16, bias=False)
    _assert_gradients(model, torch.randn(9, 2), 33)


# Other networks -----------------------------------------------------------------------------------------------------


class Functions(nn.Module):
    """Every function that has a derivative, slices, repeats, and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 24), nn.Linear(12, 24, bias=False), nn.Linear(29, 2)
        self.norm, self.scale, self.group = nn.RMSNorm(24), nn.Parameter(torch.rand(24) + 0.5), nn.GroupNorm(3, 24)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(torch.cat((x, t[:, None]), 1))
        a, b = h.chunk(2, 1)
        h = self.second(a * torch.sigmoid(b) + (a - b).cos() / (1.5 + b.square())) * self.scale
        h = h + (0.3 * h).exp() - (h.square() + 1).rsqrt() + (h.abs() + 1).sqrt().reciprocal() * h.erf()
        h = self.group(h.clamp(-1.5, 1.5)) + self.norm(h) * x[:, :1]
        return self.last(torch.cat((h, x.mean(1, keepdim=True) - x, x.sum(1, keepdim=True), a[:, 3:5]), 1))


NETWORKS = {"residual": Residual, "film": Film, "functions": Functions}


@pytest.mark.parametrize("batch", [1, 33, 100])
@pytest.mark.parametrize("name", NETWORKS)
def test_any_network(name: str, batch: int) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    dim = 3 if name == "film" else 2
    if name == "film":
        del network.condition, network.label  # which have no gradients here
    _assert_gradients(network, torch.randn(50, dim), batch)


def test_a_weight_that_is_computed_or_used_twice_is_trained_eagerly() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.net(torch.tanh(self.net(x)))

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    dropped = nn.Sequential(nn.Linear(2, 4), nn.Dropout(), nn.Linear(4, 2))
    first = nn.Linear(2, 2)
    for network in (
        Twice(),
        lambda_module(lambda x, t: normed(x)),
        lambda_module(lambda x, t: dropped(x)),
        lambda_module(lambda x, t: first(x) * t[0]),
    ):
        assert native_mlp._native(network, (2,)) is None


def lambda_module(function: Any) -> nn.Module:
    network = nn.Module()
    network.forward = function
    return network


# Whole runs ---------------------------------------------------------------------------------------------------------

CONFIG = replace(
    default_config("swiss-roll"),
    model={"architecture": "MLP", "shape": [2], "hidden": [16, 16], "activation": "LogSigmoid"},
    data_size=500,
    steps=60,
    batch_size=70,
    checkpoint_every=25,
    log_every=10,
    lr_warmup=5,
    seed=3,
)
Weights = dict[str, Tensor]


def _trained(config: TrainConfig, directory: Path, natively: bool = True, **options: Any) -> Weights:
    taken: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        if not natively:
            patch.setattr("fastsde.training.trainer.can_run_natively", lambda *args: False)
        take = NativeSteps.take
        patch.setattr(NativeSteps, "take", lambda self, first, n: taken.append(n) or take(self, first, n))
        Trainer(config, directory, **options).train(progress=False)
    assert bool(taken) == natively
    return checkpoints.read(directory / "checkpoint.safetensors")[0]


@pytest.mark.parametrize("ema", [0.0, 0.99])
def test_a_run_comes_to_the_weights_of_eager_steps(tmp_path: Path, ema: float) -> None:
    config = replace(CONFIG, ema_decay=ema)
    ours, theirs = (_trained(config, tmp_path / str(natively), natively) for natively in (True, False))
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].shape == value.shape
        if name.startswith("adam.step"):
            assert torch.equal(ours[name], value)
        else:  # Adam moves a weight by about lr per step, of which rounding changes a thousandth
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=config.steps * config.lr * 1e-3)
    logs = [(tmp_path / str(natively) / "log.jsonl").read_text().splitlines() for natively in (True, False)]
    assert len(logs[0]) == len(logs[1])


def test_it_resumes_to_the_very_weights_and_threads_and_chunks_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _trained(CONFIG, tmp_path / "whole")
    monkeypatch.setattr("fastsde.training.native_mlp._NATIVE_STEPS", 3)
    torch.set_num_threads(1)
    assert _equal(_trained(CONFIG, tmp_path / "chunks"), whole)
    torch.set_num_threads(3)
    save, saves = Trainer._save, []

    def interrupted(trainer: Trainer) -> None:
        save(trainer)
        saves.append(trainer.step)
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastsde.training.run_folder.CHECKPOINT_SECONDS", 0.0)
        patch.setattr(Trainer, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Trainer(CONFIG, tmp_path / "cut").train(progress=False)
    assert saves == [0, 25]
    assert _equal(_trained(CONFIG, tmp_path / "cut", resume=True), whole)


def _equal(ours: Weights, theirs: Weights) -> bool:
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_it_does_not_take_is_trained_eagerly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeSteps, "take", lambda *args: pytest.fail("native steps"))
    monkeypatch.setitem(ACTIVATIONS, "Hardswish", Activation(nn.Hardswish))
    Trainer(replace(CONFIG, precision="bf16", steps=3), tmp_path / "bf16").train(progress=False)
    unknown = replace(CONFIG, model=CONFIG.model | {"activation": "Hardswish"}, steps=3)
    Trainer(unknown, tmp_path / "unknown").train(progress=False)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(reference.NonFiniteError, match="before step 10"):
        Trainer(replace(CONFIG, lr=1e30, lr_schedule="constant"), tmp_path).train(progress=False)
