"""Training steps captured as CUDA graphs (on the CPU by the tape of tests/cuda_graphs.py), compared with eager ones."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsde import checkpoints
from fastsde.data import Dataset
from fastsde.engines.chunks import FIXED_LENGTHS
from fastsde.models import MLP
from fastsde.training import TrainConfig, Trainer, default_config
from fastsde.training.captured import _WARM_UPS, CapturedSteps
from fastsde.training.steps import rates_of

pytestmark = pytest.mark.usefixtures("every_checkpoint")

POINTS = replace(
    default_config("swiss-roll"),
    model={"architecture": "MLP", "shape": [2], "hidden": [8], "activation": "LogSigmoid"},
    data_size=50,
    steps=33,
    batch_size=16,
    checkpoint_every=20,
    log_every=10,
    seed=3,
)
IMAGES = replace(
    default_config("digits"),
    model={"architecture": "UNet", "image_channels": 1, "image_size": [28, 28], "channels": [2, 3]},
    data_size=20,
    steps=8,
    batch_size=3,
    checkpoint_every=8,
    log_every=4,
    lr_warmup=3,
)


Weights = dict[str, torch.Tensor]


def trained(config: TrainConfig, directory: Path, eagerly: bool, **options: Any) -> Weights:
    with pytest.MonkeyPatch.context() as patch:
        if eagerly:
            patch.setattr("fastsde.training.trainer.can_capture", lambda *args: False)
        Trainer(config, directory, device=torch.get_default_device(), **options).train(progress=False)
    return checkpoints.read(directory / "checkpoint.safetensors")[0]


def losses(directory: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def assert_same(ours: Weights, theirs: Weights, config: TrainConfig, share: float) -> None:
    """Compares states. Adam moves a weight by at most about lr per step, of which rounding changes a ``share``."""
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        if name.startswith(("model.", "weights.")):
            torch.testing.assert_close(ours[name], value, rtol=0, atol=config.steps * config.lr * share)
        elif name.startswith("adam.step"):
            assert torch.equal(ours[name], value)


@pytest.mark.parametrize(
    ("config", "share"),
    [
        pytest.param(POINTS, 1e-3, marks=pytest.mark.slow),
        pytest.param(
            replace(POINTS, ema_decay=0.0, lr_schedule="constant", prediction="score"), 1e-3, marks=pytest.mark.slow
        ),
        pytest.param(
            replace(POINTS, prediction="x0", weighting="likelihood", batch_size=1), 1e-3, marks=pytest.mark.slow
        ),
        # The loss is computed from the network's output before it is converted to fp32.
        pytest.param(replace(POINTS, precision="bf16"), 0.2, marks=pytest.mark.slow),
        pytest.param(IMAGES, 1e-2, marks=pytest.mark.slow),
    ],
    ids=["swiss roll", "score, no average", "x0, one sample", "bf16", "images"],
)
def test_the_weights_are_those_of_the_eager_trainer(
    graphs: Any, tmp_path: Path, config: TrainConfig, share: float
) -> None:
    captured = trained(config, tmp_path / "captured", eagerly=False)
    assert graphs.recorded
    assert_same(captured, trained(config, tmp_path / "eager", eagerly=True), config, share)
    logs = [losses(tmp_path / name) for name in ("captured", "eager")]
    assert [step for step, _ in logs[0]] == [step for step, _ in logs[1]]
    tolerance = 0.01 if config.precision == "bf16" else 1e-4
    assert [loss for _, loss in logs[0]] == pytest.approx([loss for _, loss in logs[1]], rel=tolerance)


@pytest.mark.slow
def test_a_run_that_is_cut_comes_to_the_same_weights(graphs: Any, tmp_path: Path) -> None:
    whole = trained(POINTS, tmp_path / "whole", eagerly=False)
    with pytest.MonkeyPatch.context() as patch:
        take, taken = CapturedSteps.take, []

        def cut(self: Any, first: int, count: int) -> torch.Tensor:
            if first > 24:
                raise KeyboardInterrupt
            taken.append(count)
            return take(self, first, count)

        patch.setattr(CapturedSteps, "take", cut)
        with pytest.raises(KeyboardInterrupt):
            trained(POINTS, tmp_path / "cut", eagerly=False)
    assert taken == [1, 1, 1, 5, 1, 1, 5, 5, 5]
    resumed = trained(POINTS, tmp_path / "cut", eagerly=False, resume=True)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    # And by the other kind of steps, in both directions.
    eager = trained(replace(POINTS, steps=33), tmp_path / "eager", eagerly=True)
    assert_same(resumed, eager, POINTS, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_train_in_channels_last(
    graphs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    kinds = ("exp_avg", "exp_avg_sq")
    config = replace(IMAGES, steps=6, lr_schedule="constant", checkpoint_every=4, precision=precision)
    contiguous, share = {}, 0.2 if precision == "bf16" else 1e-2
    for steps_done in (4, 6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastsde.training.trainer.prefers_channels_last", lambda model, device: False)
            contiguous = trained(
                replace(config, steps=steps_done), tmp_path / f"contiguous {steps_done}", eagerly=False
            )
    monkeypatch.setattr("fastsde.training.trainer.prefers_channels_last", lambda model, device: True)  # as on a GPU
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    device = torch.get_default_device()
    trainer = Trainer(config, tmp_path / "whole", device=device)
    trainer.train(progress=False)
    for parameter, average in zip(trainer.model.parameters(), trainer.ema.parameters(), strict=True):
        state = trainer.optimizer.state[parameter]
        for each in (parameter, average, parameter.grad, *(state[kind] for kind in kinds)):
            assert each.stride() == parameter.stride()
            assert each.ndim != 4 or each.is_contiguous(memory_format=torch.channels_last)
    whole = checkpoints.read(tmp_path / "whole" / "checkpoint.safetensors")[0]
    assert all(each.is_contiguous() for each in whole.values())
    assert_same(whole, contiguous, config, share)
    # An interrupted run has the same result, and one that starts in another layout continues from the same weights.
    trained(replace(config, steps=4), tmp_path / "cut", eagerly=False)
    resumed = trained(config, tmp_path / "cut", eagerly=False, resume=True)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    trainer = Trainer(config, tmp_path / "contiguous 4", device=device, resume=True)
    saved = checkpoints.read(tmp_path / "contiguous 4" / "checkpoint.safetensors")[0]
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, saved[f"weights.{name}"].to(device))
        for kind in kinds:
            assert torch.equal(trainer.optimizer.state[parameter][kind], saved[f"adam.{kind}.{name}"].to(device))
            assert trainer.optimizer.state[parameter][kind].stride() == parameter.stride()
    trainer.train(progress=False)
    assert_same(checkpoints.read(tmp_path / "contiguous 4" / "checkpoint.safetensors")[0], whole, config, share)


@pytest.mark.slow
def test_few_lengths_are_captured_and_each_once(graphs: Any, tmp_path: Path) -> None:
    trained(replace(POINTS, steps=63, log_every=20, checkpoint_every=20), tmp_path / "run", eagerly=False)
    assert len(graphs.recorded) == 3  # 20, 5 and 1
    assert len(graphs.made) == 1
    # 17 after the three that warm up: 5, 5, 5, 1, 1. One launch draws the data order of all five, and so on.
    launches = graphs.recorded[0]  # none of them is on a GPU
    once = ("data_order_kernel", "uniform_kernel", "coefficients_kernel")
    assert not launches or [launches.count(name) for name in (*once, "perturb_kernel")] == [1, 1, 1, 5]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 23, 99, 100, 1000])
def test_any_number_of_steps_is_made_of_few_lengths(graphs: Any, tmp_path: Path, count: int) -> None:
    trainer = Trainer(POINTS, tmp_path / "run", device=torch.get_default_device())
    work = trainer.work()
    lengths = CapturedSteps(work).chunks(count)
    assert sum(lengths) == count
    assert lengths[:_WARM_UPS] == [1] * min(count, _WARM_UPS)
    assert set(lengths) <= set(FIXED_LENGTHS)
    assert len(lengths) <= _WARM_UPS + count // 50 + 9


@pytest.mark.slow
def test_recording_takes_no_step(graphs: Any, tmp_path: Path) -> None:
    trainer = Trainer(POINTS, tmp_path / "run", device=torch.get_default_device())
    work = trainer.work()
    captured = CapturedSteps(work)
    for step in range(3):
        captured.take(step, 1)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    captured._graphs[2] = captured._recording.record(lambda: captured._steps(2))
    assert all(torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))
    result = captured.take(3, 2)
    assert result.shape == (2,)
    kept = result.clone()
    captured.take(5, 2)
    assert torch.equal(result, kept)
    assert not any(torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.slow
def test_graphs_that_a_caller_holds_are_not_in_the_way(graphs: Any, tmp_path: Path) -> None:
    """On a GPU, a recording with a node made on another stream fails."""
    trainer = Trainer(POINTS, tmp_path / "run", device=torch.get_default_device())
    work = trainer.work()
    captured, parameters = CapturedSteps(work), list(trainer.model.parameters())

    def nodes() -> list[Any]:
        return [parameter.view_as(parameter).grad_fn.next_functions[0][0] for parameter in parameters]  # type: ignore[union-attr]

    held = [parameter.sum() for parameter in parameters]  # whose graphs hold the nodes
    for step in range(_WARM_UPS + 1):
        kept, places = nodes(), [(each.data_ptr(), each.stride(), each.dtype) for each in parameters]
        assert kept == nodes()
        captured.take(step, 1)
        assert not set(kept) & set(nodes())
        assert places == [(each.data_ptr(), each.stride(), each.dtype) for each in parameters]
    assert len(graphs.recorded) == 1
    for parameter, value in zip(parameters, held, strict=True):
        parameter.grad = None
        value.backward()
        assert torch.equal(parameter.grad, torch.ones_like(parameter))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_step_of_another_thread_warms_it_up(graphs: Any, tmp_path: Path) -> None:
    config = replace(POINTS, steps=6)
    trainer = Trainer(config, tmp_path / "run", device=torch.get_default_device())
    work = trainer.work()
    captured, errors = CapturedSteps(work), []

    def take(firsts: range) -> None:
        try:
            for first in firsts:
                captured.take(first, 1)
        except Exception as error:
            errors.append(error)

    take(range(3))
    for firsts in (range(3, 5), range(5, 6)):  # a warm-up and a recording; a replay needs neither
        thread = threading.Thread(target=take, args=(firsts,))
        thread.start()
        thread.join()
        assert errors == []
        assert len(graphs.recorded) == 1
    expected = trained(config, tmp_path / "eager", eagerly=True)
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(
            value, expected[f"weights.{name}"].to(value.device), rtol=0, atol=1e-3 * 6 * config.lr
        )


class _Operations(TorchDispatchMode):
    """Counts the operations of PyTorch."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("graphs")
def test_a_replay_takes_a_handful_of_operations_beside_its_graph(tmp_path: Path) -> None:
    trainer = Trainer(POINTS, tmp_path / "run", device=torch.get_default_device())
    work = trainer.work()
    captured = CapturedSteps(work)
    captured._warm_ups = _WARM_UPS
    captured._graphs[50] = lambda: None
    with _Operations() as operations:
        captured.take(100, 50)
    assert 3 <= operations.count <= 10  # the step number, the rates and the losses, with views and host memory
    assert captured._first.item() == 100
    torch.testing.assert_close(captured._rates, rates_of(POINTS, 100, 50).to(trainer.device), rtol=0, atol=0)


@pytest.mark.usefixtures("graphs")
def test_a_network_that_cannot_be_captured_is_trained_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = MLP.forward

    def waits(self: MLP, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return forward(self, x, t) if float(t[0]) >= 0 else x

    monkeypatch.setattr(MLP, "forward", waits)
    with pytest.warns(RuntimeWarning, match="the steps are taken one by one: it cannot be captured"):
        captured = trained(POINTS, tmp_path / "captured", eagerly=False)
    eager = trained(POINTS, tmp_path / "eager", eagerly=True)
    assert_same(captured, eager, POINTS, 1e-3)
    assert [step for step, _ in losses(tmp_path / "captured")] == [10, 20, 30, 33]


@pytest.mark.slow
def test_neither_the_default_dtype_nor_that_of_the_data_enters(graphs: Any, tmp_path: Path) -> None:
    config = replace(POINTS, steps=5, log_every=5)
    x = torch.randn(20, 2).bfloat16().float()  # exact in the other dtypes
    expected = trained(config, tmp_path / "fp32", eagerly=False, dataset=Dataset("own", x))
    dtypes, before = (torch.bfloat16, torch.float16, torch.float64), torch.get_default_dtype()
    for dtype in dtypes:
        torch.set_default_dtype(dtype)
        try:
            found = trained(config, tmp_path / str(dtype), eagerly=False, dataset=Dataset("own", x.to(dtype)))
        finally:
            torch.set_default_dtype(before)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), dtype
    assert len(graphs.made) == 1 + len(dtypes)
