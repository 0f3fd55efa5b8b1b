"""Objectives other than the VP-SDE's with every way to take steps, and a process that is not in this package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsde
from fastsde import EDM, VPSDE, CosineVPSDE, RectifiedFlow, checkpoints, ops
from fastsde.distributed import Ranks
from fastsde.models import Preconditioned
from fastsde.objective import Objective
from fastsde.training import TrainConfig, Trainer, default_config
from fastsde.training.captured import CapturedSteps
from fastsde.training.native_mlp import NativeSteps, can_run_natively
from fastsde.training.steps import EagerSteps, Work

POINTS = replace(
    default_config("swiss-roll"),
    model={"architecture": "MLP", "shape": [2], "hidden": [16, 16], "activation": "SiLU"},
    data_size=100,
    steps=40,
    batch_size=21,
)
CONFIGS = {
    "edm": replace(
        POINTS,
        sde=EDM(),
        prediction="x0",
        weighting="target",
        preconditioning="edm",
        sigma_data=0.6,
        times="lognormal",
        time_mean=-1.5,
        time_std=0.8,
    ),
    "edm on the VP-SDE": replace(POINTS, prediction="x0", weighting="target", preconditioning="edm"),
    "flow": replace(POINTS, sde=RectifiedFlow(), prediction="flow", weighting="target"),
    "cosine": replace(POINTS, sde=CosineVPSDE(), prediction="v"),
    "likelihood": replace(POINTS, sde=CosineVPSDE(), weighting="likelihood", t_min=0.01, t_max=0.98),
}


def weights_and_losses(config: TrainConfig, make: Callable[[Work], Any], folder: Path) -> tuple[Tensor, Tensor]:
    trainer = Trainer(config, folder, device="cpu")
    steps = make(trainer.work())
    losses, first = [], 0
    for count in steps.chunks(12):
        losses.append(steps.take(first, count))
        first += count
    return torch.cat([each.detach().flatten() for each in trainer.model.parameters()]), torch.cat(losses)


def eagerly(work: Work) -> EagerSteps:
    return EagerSteps(work, Ranks())


@pytest.mark.parametrize("name", CONFIGS)
def test_native_steps_are_those_of_the_reference(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    if not ops.has_native(torch.device("cpu"), "mlp_training"):
        pytest.skip("no C++ compiler")
    trainer = Trainer(config, tmp_path)
    assert can_run_natively(trainer.work(), Ranks())
    _assert_same(weights_and_losses(config, NativeSteps, tmp_path), config, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("graphs", ["tape"], indirect=True)
@pytest.mark.parametrize(
    "name", [name if name == "edm" else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_captured_steps_are_those_of_the_reference(name: str, tmp_path: Path) -> None:
    _assert_same(weights_and_losses(CONFIGS[name], CapturedSteps, tmp_path), CONFIGS[name], tmp_path)


def _assert_same(found: tuple[Tensor, Tensor], config: TrainConfig, folder: Path) -> None:
    weights, losses = weights_and_losses(config, eagerly, folder)
    torch.testing.assert_close(found[0], weights, rtol=0, atol=12 * config.lr * 1e-3)
    torch.testing.assert_close(found[1], losses, rtol=1e-4, atol=0)


@dataclass(frozen=True)
class Mine(VPSDE):
    """A user's own process."""


def test_what_cannot_be_interpolated_is_trained_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsde.objective.interpolate", lambda *given: None)
    config = replace(POINTS, steps=12)
    assert config.objective.interpolation is None
    if ops.has_native(torch.device("cpu"), "mlp_training"):
        _assert_same(weights_and_losses(config, NativeSteps, tmp_path), config, tmp_path)


def test_a_process_that_no_checkpoint_can_name_is_refused_before_the_training() -> None:
    with pytest.raises(TypeError, match=r"sde must be one of VPSDE, .* to be saved, got Mine"):
        replace(POINTS, sde=Mine())


def test_a_run_with_edms_preconditioning_samples_and_resumes(tmp_path: Path) -> None:
    trainer = Trainer(CONFIGS["edm"], tmp_path)
    checkpoint = trainer.train(progress=False)
    assert isinstance(checkpoint.model, Preconditioned)
    loaded = checkpoints.load(tmp_path)
    assert (loaded.prediction, loaded.sigma_data) == ("x0", 0.6)
    x, t = torch.randn(5, 2), torch.rand(5)
    assert torch.equal(loaded.model(x, t), checkpoint.model(x, t))
    assert fastsde.sample(loaded, (4, 2), solver="ddim", steps=5, t_end=0.01).isfinite().all()
    assert Trainer(CONFIGS["edm"], tmp_path, resume=True).step == 40
    # Another run may start from its weights, unless they have another meaning there.
    init = replace(CONFIGS["edm"], init=str(tmp_path))
    weights = Trainer(init, tmp_path / "further").model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in loaded.network.state_dict().items())
    with pytest.raises(ValueError, match=r"init must have the sigma_data of the run, 0\.5, got 0\.6"):
        Trainer(replace(init, sigma_data=0.5), tmp_path / "other")


def test_the_objective_is_made_of_the_config() -> None:
    config = CONFIGS["edm"]
    assert config.objective == Objective(EDM(), "x0", "target", "edm", 0.6, "lognormal", time_mean=-1.5, time_std=0.8)
    assert config.objective is config.objective
    assert TrainConfig.from_dict({"data": "swiss-roll", "model": POINTS.model}).objective == Objective(prediction="eps")


def test_what_could_not_be_sampled_is_not_trained(tmp_path: Path) -> None:
    for prediction in ("score", "eps"):
        with pytest.raises(ValueError, match=rf"prediction must be 'flow', 'v' or 'x0' for Rect.*got '{prediction}'"):
            replace(POINTS, sde=RectifiedFlow(), prediction=prediction)
    with pytest.raises(ValueError, match=r"t_max must be in \(0, 1\], got 2"):
        replace(POINTS, t_max=2.0)
    Trainer(replace(POINTS, steps=2, sde=EDM()), tmp_path / "edm").train(progress=False)
    with pytest.raises(ValueError, match=r"init must have the sde of the run, VPSDE.*, got EDM"):
        Trainer(replace(POINTS, init=str(tmp_path / "edm")), tmp_path / "vp")
