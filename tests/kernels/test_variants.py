"""How many variants of a kernel a run compiles: numbers that vary need no new ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

BATCHES = (1, 2, 7, 16, 63, 64, 1000, 70_000)
INTS = "clip and phi, as floats and as ints"
STEPS = (0, 1, 2, 15, 16, 2**28 - 1)


def _runs() -> Iterator[tuple[str, Any, list[Callable[[], Any]]]]:
    """Yields names, kernels, and launches that must share one variant, or two."""
    from fastsde import ops, solvers
    from fastsde.guidance import Weights
    from fastsde.kernels import (
        coefficients,
        convolution,
        dsm_loss,
        guidance_rescale,
        head_convolution,
        langevin_size,
        mlp_sampler,
        normal,
        perturb,
        pooled_convolution,
        solver_step,
        stem_convolution,
        uniform,
    )
    from fastsde.lowering import Vectors, lower
    from fastsde.models import MLP
    from fastsde.sde import VPSDE

    multistep = solvers.build("dpm_solver_pp_2m", VPSDE(), 4, clip=1.0)
    width = multistep.packed.shape[1]
    langevin = solvers.build("predictor_corrector", VPSDE(), 5)

    def loss(n: int, shape: tuple[int, ...], step: int, backward: bool) -> None:
        f, keys, k = torch.empty(n, *shape), torch.empty(n, 2, dtype=torch.int64), torch.empty(n, 6)
        grad, out = (torch.empty(()), torch.empty_like(f)) if backward else (None, torch.empty(()))
        dsm_loss.dsm_loss(f, f, keys, step, k, grad=grad, out=out)

    def step_of(n: int, shape: tuple[int, ...], row: int, counted: bool) -> None:
        x, keys, table = torch.empty(n, *shape), torch.empty(n, 2, dtype=torch.int64), torch.empty(row % 999 + 1, width)
        counter = torch.empty(solver_step.counter_slots(n, x[0].numel()), dtype=torch.int64) if counted else None
        numbers = {"scale": torch.empty(n), "rates": torch.empty(len(table)), "clip": n / 7, "f_uncond": x}
        given = {"keys": keys, "counter": counter, "terms": multistep.terms(), "out": [x, x], **numbers}
        solver_step.solver_step([x, x], x, table, row, **given)

    def rescaling(n: int, shape: tuple[int, ...], row: int, counted: bool) -> None:
        f, scale, counter = torch.empty(n, *shape), torch.empty(n), torch.empty(1, dtype=torch.int64)
        given = {"rates": torch.empty(row % 999 + 1), "counter": counter if counted else None, "phi": 0.5}
        guidance_rescale.rescale_factor(f, f, row, scale=scale, factor=scale, **given)

    def sizing(n: int, shape: tuple[int, ...], row: int, counted: bool) -> None:
        x, keys, k = torch.empty(n, *shape), torch.empty(n, 2, dtype=torch.int64), langevin.packed.float()
        counter = torch.empty(1, dtype=torch.int64) if counted else None
        given = {"langevin": torch.empty(row % 999 + 1, 2), "terms": langevin.terms(), "keys": keys, "counter": counter}
        langevin_size.langevin_size([x], x, k, row, sizes=torch.empty(n, 2), **given)

    def drawing(n: int, shape: tuple[int, ...], step: int) -> None:
        normal.normal(torch.empty(n, 2, dtype=torch.int64), step, 0, torch.empty(n, *shape))

    def noising(n: int, shape: tuple[int, ...], step: int, shift: float) -> None:
        x_0, keys = torch.empty(n, *shape), torch.empty(n, 2, dtype=torch.int64)
        numbers = {"scale": shift + 1.0, "shift": shift}
        perturb.perturb(x_0, keys, step, torch.empty(n, 6), **numbers, out=torch.empty_like(x_0), tau=torch.empty(n))

    def timing(n: int, step: int) -> None:
        u, first = torch.empty(1, n), torch.empty(1, dtype=torch.int64)
        uniform.uniform(torch.empty(n, 2, dtype=torch.int64), step, 2, u, counter=first)

    def interpolating(n: int, segments: int) -> None:
        rows = torch.empty(segments % 1000 + 1, 4, 8)
        coefficients.coefficients(torch.empty(n), rows, segments, 17, torch.empty(n, 6))

    def guided(phi: float, clip: float) -> None:
        table = solvers.build("ddim", VPSDE(), 4, clip=clip)
        x, keys = torch.empty(3, 5), torch.empty(3, 2, dtype=torch.int64)
        weights = Weights(x[:, 0], (1.0,) * 4, (True,) * 4, phi)
        ops.Stepper(table, x, keys, weights)(0, [x], x, f_uncond=x)

    for shape in ((5,), (3, 28, 28)):
        sizes = list(zip(BATCHES, STEPS + STEPS, strict=False))
        for counted in (False, True):
            launches = [partial(step_of, n, shape, step, counted) for n, step in sizes]
            yield f"solver_step {shape} counted={counted}", solver_step.solver_step_kernel, launches
            launches = [partial(rescaling, n, shape, step, counted) for n, step in sizes]
            yield f"rescale {shape[0]} counted={counted}", guidance_rescale.rescale_kernel, launches
            launches = [partial(sizing, n, shape, step, counted) for n, step in sizes]
            yield f"langevin_size {shape[0]} counted={counted}", langevin_size.langevin_size_kernel, launches
        launches = [partial(drawing, n, shape, step) for n, step in sizes]
        yield f"normal {shape}", normal.normal_kernel, launches
        launches = [partial(noising, n, shape, step, float(i)) for i, (n, step) in enumerate(sizes)]
        yield f"perturb {shape}", perturb.perturb_kernel, launches
        for backward in (False, True):
            launches = [partial(loss, n, shape, step, backward) for n, step in sizes]
            yield f"dsm_loss {shape} backward={backward}", dsm_loss.dsm_loss_kernel, launches
    launches = [partial(loss, n, (5,), 0, False) for n in BATCHES]
    yield "mean", dsm_loss.mean_kernel, launches
    yield "uniform", uniform.uniform_kernel, [partial(timing, *each) for each in sizes]
    launches = [partial(interpolating, n, step + 1) for n, step in sizes]
    yield "coefficients", coefficients.coefficients_kernel, launches
    launches = [partial(guided, phi, clip) for phi in (0.5, 1) for clip in (1.5, 1, 2)]
    yield f"{INTS}: step", solver_step.solver_step_kernel, launches
    yield f"{INTS}: rescale", guidance_rescale.rescale_kernel, launches
    lowered = lower(MLP(2, (16,), "SiLU"), (2,), torch.ones(1))
    numbers = lowered.vectors(torch.ones(1), 1, ())
    packed = mlp_sampler.Packed(lowered.program, torch.device("cpu"), torch.float32)

    def trajectories(n: int, rows: int) -> None:
        keys, out = torch.empty(n, 2, dtype=torch.int64), torch.empty(n, 2)
        per_row = torch.empty(rows, lowered.program.row_width)
        vectors = Vectors(numbers.matrices, numbers.constants, per_row, torch.empty(n, 0))
        given = {"terms": multistep.trajectory_terms, "clip": n / 7, "every": rows, "vectors": vectors}
        mlp_sampler.mlp_sampler(packed, torch.empty(rows, width), keys, **given, out=out)

    def image(n: int, channels: int, size: int) -> torch.Tensor:
        return torch.empty(n, channels, size, size).to(memory_format=torch.channels_last)

    def films(n: int) -> torch.Tensor:
        return torch.empty(n, 64)

    def encoding(n: int) -> None:
        given = {"out": image(n, 64, 7), "pooled": image(n, 32, 4), "first": 32, "precision": "tf32", "film": films(n)}
        pooled_convolution.pooled_convolution(image(n, 16, 7), torch.empty(32, 3, 3, 16), torch.empty(32), **given)

    def decoding(n: int) -> None:
        weight, bias = torch.empty(16, 3, 3, 32), torch.empty(16)
        convolution.convolution(image(n, 32, 4), weight, bias, image(n, 32, 7), transposed=True, precision="tf32")

    def heading(n: int) -> None:
        weight, head, products = torch.empty(16, 3, 3, 32), torch.empty(9, 16), torch.empty(9, n, 7, 7)
        given = {"head": head, "products": products, "film": films(n)[:, 7:39], "precision": "tf32x3"}
        convolution.convolution(image(n, 32, 7), weight, torch.empty(16), None, **given)

    def first(n: int) -> None:
        given = {"t": torch.empty(n), "plane": torch.empty(7, 7, 16), "out": image(n, 32, 7), "pooled": image(n, 16, 4)}
        given |= {"first": 16, "precision": "tf32", "film": films(n)[:, :32]}
        stem_convolution.stem_convolution(image(n, 1, 7), torch.empty(16, 3, 3, 1), torch.empty(16), **given)

    def last(n: int) -> None:
        head_convolution.head_convolution(torch.empty(9, n, 7, 7), torch.empty(1), torch.empty(n, 1, 7, 7))

    for name, kernel, layer in (
        ("pooled_convolution ()", pooled_convolution.pooled_convolution_kernel, encoding),
        ("convolution (transposed)", convolution.convolution_kernel, decoding),
        ("convolution (head)", convolution.convolution_kernel, heading),
        ("stem_convolution", stem_convolution.stem_convolution_kernel, first),
        ("head_convolution", head_convolution.head_convolution_kernel, last),
    ):
        yield name, kernel, [partial(layer, n) for n in BATCHES]
    # A low tile for few samples (16, since no GPU reports its number of processors here), and a high one for many.
    for name, batches in (("few", range(1, 17)), ("many", BATCHES[4:])):
        yield f"mlp_sampler, {name}", mlp_sampler.mlp_sampler_kernel, [partial(trajectories, n, n) for n in batches]


class _Driver:
    """The parts of a driver that compiling needs, without a GPU."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def _compile_only() -> None:
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from fastsde.ops import dispatch

    dispatch.has_triton = lambda device: True  # these tensors are on the CPU
    run = JITFunction.run
    driver.set_active(_Driver())
    JITFunction.run = lambda self, *args, grid, warmup, **options: run(self, *args, grid=grid, warmup=True, **options)


def _count() -> dict[str, int]:
    _compile_only()
    counts = {}
    for name, kernel, launches in _runs():
        kernel.device_caches.clear()
        for launch in launches:
            launch()
        variants, *_ = kernel.device_caches[0]
        counts[name] = len(variants)
    return counts


@pytest.fixture(scope="module")
def counts(compiler_environment: dict[str, str]) -> dict[str, int]:
    """The variants of each of `_runs`, compiled in a process without Triton's interpreter and without a GPU."""
    pytest.importorskip("triton")
    command = [sys.executable, str(Path(__file__))]
    run = subprocess.run(command, env=compiler_environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found: dict[str, int] = json.loads(run.stdout)
    return found


@pytest.mark.slow
def test_a_run_compiles_each_kernel_once_or_twice(counts: dict[str, int]) -> None:
    runs = {name: variants for name, variants in counts.items() if INTS not in name}
    assert len(runs) == 30
    # Two for tiles: small ones for few samples, large ones for many (fastsde.kernels.tile, and the convolutions).
    assert runs == {name: 2 if "(" in name else 1 for name in runs}


@pytest.mark.slow
def test_ints_in_the_place_of_floats_make_no_variant(counts: dict[str, int]) -> None:
    assert [variants for name, variants in counts.items() if INTS in name] == [1, 1]


if __name__ == "__main__":
    print(json.dumps(_count()))
