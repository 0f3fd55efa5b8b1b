"""Training times by importance: unbiased, and drawn as the loss says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastsde import checkpoints, noise
from fastsde.data import swiss_roll
from fastsde.models import MLP
from fastsde.objective import Objective
from fastsde.training import TrainConfig, Trainer
from fastsde.training.importance import ImportanceTimes

CPU = torch.device("cpu")
OBJECTIVE = Objective(prediction="eps", times="importance")
BINS = 64


def learned(loss_of: torch.Tensor, steps: int = 60) -> ImportanceTimes:
    """Returns times that have seen losses ``loss_of`` by bin, and none of any other size."""
    times, keys = ImportanceTimes(OBJECTIVE, CPU), noise.sample_keys(0, 512)
    for step in range(steps):
        times.coefficients(keys, step)
        losses = loss_of[times._place] * times._weight.float()  # as a step computes them
        for part in losses.split(200):
            times.add(part)
        times.move()
    return times


def test_probabilities_follow_the_root_of_the_mean_square() -> None:
    loss = torch.linspace(0.1, 3.0, BINS)
    times = learned(loss)
    torch.testing.assert_close(times.moments, loss.double().square(), rtol=1e-5, atol=0)
    p = times.probabilities()
    torch.testing.assert_close(p, (loss / loss.sum()).double() * 0.999 + 0.001 / BINS, rtol=1e-5, atol=0)
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    keys = noise.sample_keys(1, 200_000)
    t = times.coefficients(keys, 0)[:, 0]  # of eps, tau is t
    assert OBJECTIVE.t_min <= float(t.min())
    assert float(t.max()) <= 1
    place = ((t.double() - OBJECTIVE.t_min) / (1 - OBJECTIVE.t_min) * BINS).long().clamp(max=BINS - 1)
    counts = torch.bincount(place, minlength=BINS) / len(t)
    assert float((counts - p).abs().max()) < 5 * float((p.max() / len(t)) ** 0.5)


def test_the_expected_weighted_loss_is_that_of_uniform_times() -> None:
    times = learned(torch.logspace(-2, 1, BINS))
    keys = noise.sample_keys(2, 200_000)
    table = times.coefficients(keys, 3).double()
    uniform = OBJECTIVE.table(OBJECTIVE.draw(noise.uniform(keys, 3, (), noise.STREAM_TRAINING_TIME))).double()
    # A residual r(t) weighs w_z^2 r^2: any function of t must have the same mean.
    for function in (torch.ones_like, torch.square, lambda t: torch.exp(-5 * t), lambda t: (t < 0.1).double()):
        ours, theirs = ((k[:, 5] ** 2 * function(k[:, 0])) for k in (table, uniform))
        error = (ours.std() + theirs.std()) / len(keys) ** 0.5
        assert abs(float(ours.mean() - theirs.mean())) < 4 * float(error)
    assert float(table[:, 5].square().std()) > 0.5  # the weights do vary


def test_times_are_uniform_until_every_bin_was_visited() -> None:
    times, keys = ImportanceTimes(OBJECTIVE, CPU), noise.sample_keys(0, 64)
    expected = OBJECTIVE.table(OBJECTIVE.draw(noise.uniform(keys, 5, (), noise.STREAM_TRAINING_TIME)))
    torch.testing.assert_close(times.coefficients(keys, torch.tensor([5])), expected)
    times.add(torch.full((64,), 2.0))
    times.move()
    assert torch.equal(times.moments, torch.where(times.visits > 0, 4.0, 0.0).double())
    assert (times.visits <= 1).all()
    times.visits.fill_(10)
    times.moments.zero_()  # and if no loss is left
    assert torch.equal(times.probabilities(), torch.full((BINS,), 1 / BINS, dtype=torch.float64))


def test_a_moving_average_forgets() -> None:
    times, keys = learned(torch.ones(BINS)), noise.sample_keys(0, 4096)
    times.coefficients(keys, 100)
    times.add(torch.full((4096,), 2.0) * times._weight.float())
    times.move()
    torch.testing.assert_close(times.moments, torch.full((BINS,), 0.99 + 0.01 * 4, dtype=torch.float64))


def test_the_history_is_part_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsde.training.run_folder.CHECKPOINT_SECONDS", 0.0)
    config = TrainConfig(
        "own", MLP(2, (4,)).config, steps=30, batch_size=200, times="importance", lr_schedule="constant"
    )
    data = swiss_roll(50)
    Trainer(config, tmp_path / "whole", dataset=data).train(progress=False)
    for steps in (17, 30):
        trainer = Trainer(replace(config, steps=steps), tmp_path / "cut", dataset=data, resume=True)
        trainer.train(progress=False)
    ours, theirs = (checkpoints.read(tmp_path / name / "checkpoint.safetensors")[0] for name in ("cut", "whole"))
    assert "importance.moments" in ours
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert int(trainer.importance.visits.min()) >= 10  # type: ignore[union-attr]
    assert float(trainer.importance.probabilities().std()) > 0  # type: ignore[union-attr]
