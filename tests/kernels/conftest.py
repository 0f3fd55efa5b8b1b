"""Kernels run interpreted on the CPU, or compiled on a GPU: Triton decides when it defines one (tests/conftest.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastsde


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernels run. `fastsde.ops` sends to them there."""
    pytest.importorskip("triton")
    if request.param == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled where there is a GPU, not interpreted")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return torch.device("cpu")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What torch.empty returns holds NaN, so that an element that no kernel wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def compiler_environment() -> dict[str, str]:
    """The environment of a process that compiles the kernels of this very package, whatever this one does."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = (str(Path(fastsde.__file__).parents[1]), environment.get("PYTHONPATH"))
    return environment | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
