"""Where kernels run: Triton kernels interpreted on the CPU or compiled on a GPU, and native ones in three builds.

Triton decides when it defines a kernel whether it is interpreted (tests/conftest.py).
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from convolution_cases import TILES, use_tile

import fastsde

_TRITON = ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]
# The native build for the machine's own CPU.
_NATIVE = {"native": "", "avx2": "-march=x86-64-v3", "baseline": "-march=x86-64"}
_BUILDS = ["native", *(pytest.param(name, marks=pytest.mark.slow) for name in ("avx2", "baseline"))]
_taken: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}  # the loaded state of a build


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests marked ``not_on_cuda`` for CUDA devices."""
    kept, left_out = [], []
    for item in items:
        on_cuda = item.get_closest_marker("gpu") is not None
        (left_out if on_cuda and item.get_closest_marker("not_on_cuda") else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def _triton_on(where: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    pytest.importorskip("triton")
    if where == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled where there is a GPU, not interpreted")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return torch.device("cpu")


def _native(name: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    from fastsde.kernels.cpu import build, library

    if build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    if name != "native" and platform.machine() != "x86_64":
        pytest.skip(f"{name} is a build for x86-64")
    if name == "avx2" and " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX2")
    outcomes, functions = _taken.setdefault(name, ({}, {}))
    monkeypatch.setattr(build, "_outcomes", outcomes)
    monkeypatch.setattr(library, "_functions", functions)
    monkeypatch.setenv("FASTSDE_CXXFLAGS", _NATIVE[name])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return torch.device("cpu")


@pytest.fixture(params=[*_TRITON, *_BUILDS])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernels run; `fastsde.ops` uses them there."""
    return _native(request.param, monkeypatch) if request.param in _NATIVE else _triton_on(request.param, monkeypatch)


@pytest.fixture(params=[*_TRITON, _BUILDS[0]])
def main_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """`device` without the other native builds, for full grids of cases."""
    return _native(request.param, monkeypatch) if request.param in _NATIVE else _triton_on(request.param, monkeypatch)


@pytest.fixture(params=_TRITON)
def triton_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the Triton kernels run."""
    return _triton_on(request.param, monkeypatch)


@pytest.fixture(params=_BUILDS)
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the native kernels run."""
    return _native(request.param, monkeypatch)


@pytest.fixture
def tiles_as_on_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter use small tiles for few elements, as a GPU does; many small tiles would be too slow."""
    params = request.node.callspec.params
    if importlib.util.find_spec("triton") is not None and params["batch"] * math.prod(params["shape"]) < 5000:
        monkeypatch.setattr("fastsde.kernels.tile._MANY", 2 * 132)


@pytest.fixture(params=TILES)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tile that a convolution kernel, the test module's ``kernel``, takes: for few or for many pixels."""
    use_tile(request.module.kernel, request.param, monkeypatch)
    return str(request.param)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Makes torch.empty return NaN, so that elements which no kernel writes are noticed."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def compiler_environment() -> dict[str, str]:
    """The environment of a process that compiles this package's kernels, even if they are interpreted in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = (str(Path(fastsde.__file__).parents[1]), environment.get("PYTHONPATH"))
    return environment | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
