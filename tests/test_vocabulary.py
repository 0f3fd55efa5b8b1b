"""The command line accepts exactly the names that the package knows."""

from __future__ import annotations

import pytest
import torch

from fastsde import VPSDE, data, engines, solvers, vocabulary
from fastsde.models.activations import ACTIVATIONS
from fastsde.ops import has_native
from fastsde.training import recipes


def test_every_word_has_its_meaning() -> None:
    for solver in vocabulary.SOLVERS:
        for spacing in vocabulary.SPACINGS:
            assert len(solvers.build(solver, VPSDE(), 5, spacing=spacing)) == 5
    for backend in vocabulary.BACKENDS[1:]:
        assert callable(engines.get(backend))
    assert set(vocabulary.VERIFIED_DTYPES) | set(vocabulary.TRAINING_DTYPES) <= set(vocabulary.DTYPES)
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in vocabulary.DTYPES)
    for name in vocabulary.DATASETS[:2]:  # the third needs files
        assert data.load(name, size=3).name == name


@pytest.mark.skipif(not has_native(torch.device("cpu")), reason="no C++ compiler")
def test_the_native_kernels_know_the_words() -> None:
    from fastsde.kernels.cpu.library import has_code

    assert [word for word in (*ACTIVATIONS, "nothing") if not has_code("activation", word)] == ["nothing"]


def test_no_word_is_missing() -> None:
    assert sorted(solvers.REGISTRY) == sorted(vocabulary.SOLVERS)
    assert vocabulary.SOLVERS[0] == "euler_maruyama"
    assert ("auto", *engines._ENGINES) == vocabulary.BACKENDS
    assert tuple(recipes.RECIPES) == vocabulary.RECIPES
