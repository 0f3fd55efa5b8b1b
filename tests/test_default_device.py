"""PyTorch's default device is left to the user: tensors that the package creates are on the device that it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastsde
from fastsde import Sampler, checkpoints, solvers
from fastsde.training import Trainer, default_config

ON_CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_sampling_does_not_depend_on_it(solver: str, backend: str) -> None:
    checkpoint = checkpoints.load("swiss-roll")
    options = {"solver": solver, "steps": 7, "prediction": "eps", "t_end": 0.01, "backend": backend}
    expected = fastsde.sample(checkpoint.model, (5, 2), keys=[1, 2, 3, 4, 5], **options)
    with torch.device("meta"):  # it holds no data, so that tensors created there are noticed
        found = fastsde.sample(checkpoints.load("swiss-roll").model, (5, 2), keys=[1, 2, 3, 4, 5], **options)
    assert found.device == ON_CPU
    assert torch.equal(found, expected)


def test_training_does_not_depend_on_it(tmp_path: Path) -> None:
    config = replace(default_config("swiss-roll"), steps=5)
    Trainer(config, tmp_path / "cpu").train(progress=False)
    with torch.device("meta"):
        Trainer(config, tmp_path / "other", device="cpu").train(progress=False)
    ours, theirs = (checkpoints.load(tmp_path / name).model.state_dict() for name in ("cpu", "other"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_function_runs_on_it() -> None:
    assert Sampler(lambda x, t: -x, (2,)).device == ON_CPU
    with torch.device("meta"), pytest.raises(ValueError, match="device must hold data, got meta"):
        Sampler(lambda x, t: -x, (2,))
