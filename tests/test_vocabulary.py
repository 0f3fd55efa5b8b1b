"""The words of the command line are those that the package knows."""

from __future__ import annotations

import torch

from fastsde import VPSDE, data, engines, solvers, vocabulary
from fastsde.kernels.cpu import dsm_loss


def test_every_word_has_its_meaning() -> None:
    for solver in vocabulary.SOLVERS:
        prediction = "score" if solver in ("euler_maruyama", "exponential_euler_maruyama", "heun") else "eps"
        assert len(solvers.build(solver, VPSDE(), 4, prediction=prediction)) == 4
    for backend in vocabulary.BACKENDS[1:]:
        assert callable(engines.get(backend))
    assert dsm_loss.PREDICTIONS == vocabulary.PREDICTIONS  # kernels import nothing of the package
    assert dsm_loss.WEIGHTINGS == vocabulary.WEIGHTINGS
    assert set(vocabulary.VERIFIED_DTYPES) | set(vocabulary.TRAINING_DTYPES) <= set(vocabulary.DTYPES)
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in vocabulary.DTYPES)
    for name in vocabulary.DATASETS[:2]:  # the third needs files
        assert data.load(name, size=3).name == name


def test_no_word_is_missing() -> None:
    assert (*solvers._SDE_SOLVERS, *solvers._SCHEDULE_SOLVERS) == vocabulary.SOLVERS
    assert ("auto", *engines._ENGINES) == vocabulary.BACKENDS
