"""Shared configuration of the suite: tests marked ``gpu`` are skipped, with the reason, if there is no GPU."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator

import pytest

from fastsde.openmp import wait_passively

wait_passively()  # in this process and those that tests start

import torch  # noqa: E402
from cuda_graphs import graphs as graphs  # noqa: E402 (a fixture)

from fastsde.benchmarks.suite.measure import fp32_products  # noqa: E402
from fastsde.ops import dispatch  # noqa: E402


def _define_interpreted_kernels() -> None:
    """Imports the kernels with Triton's interpreter on, which Triton decides once, when a kernel is defined.

    They run only while the variable is set (the ``device`` fixture of tests/kernels), so that the rest of the suite
    does not use the slow interpreter.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        kernels = importlib.import_module("fastsde.kernels")
        importlib.import_module("torch._inductor.utils")  # inspects Triton, and must see its final state
        for module in pkgutil.iter_modules(kernels.__path__, "fastsde.kernels."):
            importlib.import_module(module.name)


needs_interpreter = not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
if needs_interpreter:
    _define_interpreted_kernels()
    importlib.import_module("fast_interpreter").make_interpreter_fast()


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.option.collectonly or not needs_interpreter:
        return
    problem = dispatch.interpreter_problem()
    if problem is not None:
        raise pytest.UsageError(f"{problem} (without a GPU the tests interpret kernels)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def full_fp32() -> Iterator[None]:
    """Keeps fp32 convolutions on a GPU out of TF32, PyTorch's default, which rounds their arguments to 2^-11."""
    with fp32_products(torch.backends.cudnn, "ieee"):
        yield


def _large_tile(pixels: int, out: int, channels: int, *_: int) -> dict[str, int]:
    sizes = {"PIXELS": min(max(pixels, 16), 1024), "N": max(out, 16), "K": max(channels, 16)}
    return {name: 1 << (size - 1).bit_length() for name, size in sizes.items()}


@pytest.fixture
def large_convolution_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the interpreter few large tiles of a convolution: each of its programs takes milliseconds."""
    if needs_interpreter:
        for name in ("convolution", "pooled_convolution"):
            monkeypatch.setattr(f"fastsde.kernels.{name}.launch_config", _large_tile)


@pytest.fixture
def every_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes every checkpoint, however quickly they follow each other."""
    monkeypatch.setattr("fastsde.training.run_folder.CHECKPOINT_SECONDS", 0.0)


def pytest_collection_finish() -> None:
    """Freezes all existing objects for the garbage collector: captures and tests run it hundreds of times."""
    gc.collect()
    gc.freeze()
