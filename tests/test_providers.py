"""Engines besides PyTorch in the benchmarks: JAX, OpenVINO and ONNX Runtime agree where they are installed."""

from __future__ import annotations

import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsde import checkpoints
from fastsde.benchmarks.providers import exported, jax, sampling
from fastsde.benchmarks.suite.case import Provider, UnavailableError, WrongError
from fastsde.benchmarks.tasks.trajectory import Trajectory, proof
from fastsde.networks import NETWORKS, DDPMUNet, Named

CPU = torch.device("cpu")


def task(name: str = "residual", n: int = 40, rows: int = 8) -> Trajectory:
    named = NETWORKS[name]
    return Trajectory(named.load, named.shape, n, rows, CPU, 0, 0, conditions=named.conditions)


def engines(of: Trajectory, word: str) -> list[Provider]:
    return [each for each in [jax.scan(of, proof(of)), *exported.others(of, proof(of))] if each.name.startswith(word)]


def installed(*names: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            if name == "openvino":
                sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
            pytest.importorskip(name, exc_type=ImportError)


@pytest.mark.parametrize(
    ("word", "module"),
    [("JAX", "jax"), ("OpenVINO", "openvino"), ("ONNX", "onnxruntime"), ("ONNX", "onnx"), ("ONNX", "onnxscript")],
)
def test_an_engine_that_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, word: str, module: str
) -> None:
    for each in ("onnxruntime", "onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, each, types.ModuleType(each))
    monkeypatch.setitem(sys.modules, module, None)
    (engine,) = engines(task(), word)
    with pytest.raises(UnavailableError, match=rf"^{module} is not installed; .*: pip install 'fastsde\[engines\]'$"):
        engine.make()


def test_engines_take_part_on_a_cpu_only() -> None:
    gpu = replace(task(), device=torch.device("cuda"))
    with pytest.raises(UnavailableError, match="GPU"):
        exported.run(gpu, lambda *_: pytest.fail("it was built"), "fp32")
    with pytest.raises(UnavailableError, match="GPU"):
        jax.Scan(gpu, None)


def test_jax_has_twins_of_two_networks_only() -> None:
    with pytest.raises(UnavailableError, match="no twin of FiLM"):
        jax.converted(None, NETWORKS["film"].load().model)


def test_an_exported_network_is_run_and_proved_with_its_conditions() -> None:
    """PyTorch itself stands for an engine."""
    of = task("film")

    def engine(network: torch.nn.Module, example: tuple[Tensor, Tensor], precision: str, factor: float) -> Any:
        assert example[0].shape == of.shape
        assert not network.training
        return lambda x, t: (factor * network(torch.from_numpy(x), torch.from_numpy(t))).numpy()

    shows = proof(of)
    run = exported.run(of, partial(engine, factor=1.0), "fp32")
    assert shows.given_noise("fp32", run, run())["error"] < 1e-4
    run = exported.run(of, partial(engine, factor=1.1), "fp32")
    with pytest.raises(WrongError, match="a trajectory is off"):
        shows.given_noise("fp32", run, run())


def test_other_precisions_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    images = Trajectory(partial(checkpoints.load, "mnist"), (1, 28, 28), 2, 2, CPU, 0, 0)
    for known, expected in ([], ["fp32"]), (["amx_bf16"], ["fp32", "bf16"]):
        monkeypatch.setattr(sampling, "cpu_instructions", lambda known=known: known)
        assert [each.precision for each in engines(images, "OpenVINO")] == expected
        assert [each.precision for each in engines(images, "ONNX")] == ["fp32"]


# Where they are installed -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # from the engines
@pytest.mark.parametrize("name", ["residual", "film", "unet"])
@pytest.mark.parametrize(
    ("word", "modules"), [("OpenVINO", ["openvino"]), ("ONNX", ["onnxruntime", "onnx", "onnxscript"])]
)
def test_an_engine_agrees_and_its_threads_do_not_spin(word: str, modules: list[str], name: str) -> None:
    installed(*modules)
    if name == "unet":
        installed("diffusers")
        small = Named(lambda: DDPMUNet((32, 32), 1, 8), (3, 8, 8))
        of = Trajectory(small.load, small.shape, 3, 3, CPU, 0, 0)
    else:
        of = task(name)
    for engine in engines(of, word):
        run = engine.make()
        figures = engine.prove(run, run())
        assert figures["error"] <= figures["allowed"]
        assert idle(run) < 0.5


def idle(run: Callable[[], Any], seconds: float = 0.2) -> float:
    """Returns how many threads work, on average, after a run has returned."""
    run()
    started = time.process_time()
    time.sleep(seconds)
    return (time.process_time() - started) / seconds


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # from JAX
@pytest.mark.parametrize("name", ["residual", "swiss-roll"])
def test_jax_agrees_step_for_step_and_in_its_moments(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    installed("jax")
    of = task(n=400)
    if name == "swiss-roll":
        of = Trajectory(partial(checkpoints.load, "swiss-roll"), (2,), 400, 50, CPU, 0, 0)
    (engine,) = engines(of, "JAX")
    run = engine.make()
    assert not torch.equal(run(), run())
    figures = engine.prove(run, run())
    assert 0 < figures["error"] <= figures["allowed"]
    assert idle(run) < 0.5
    # Each part of the proof finds its own fault.
    with pytest.raises(WrongError, match="the mean of the samples"):
        run.prove(proof(of), run() + 1.0)
    right = run._rows
    run._rows = (right[0], right[1], right[2], 1.05 * right[3])
    run._given = run._jax.jit(lambda draws: run._take(draws))
    with pytest.raises(WrongError, match="a trajectory is off"):
        engine.prove(run, run())
    network = run.network
    run._rows, run.network = right, lambda x, t: 1.001 * network(x, t)
    with pytest.raises(WrongError, match="the network is off"):
        engine.prove(run, run())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # from JAX
def test_jaxs_scan_has_tables_of_one_slot() -> None:
    installed("jax")
    (engine,) = engines(replace(task(), solver="dpm_solver_pp_2m"), "JAX")
    with pytest.raises(UnavailableError, match="one slot"):
        engine.make()
