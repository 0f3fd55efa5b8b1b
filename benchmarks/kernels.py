"""The fused kernels beside what people use instead: ``python -m fastsde.benchmarks.kernels --out FILE``.

Two subjects: one Euler-Maruyama step of a large state, and whole swiss-roll trajectories. In each, every provider first
proves that it computes the same thing; then all are timed in interleaved rounds on the same inputs, the baseline twice,
so that the noise of the measurement shows. A figure comes with the physical limit by arithmetic: bytes over the copy
bandwidth measured in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import fastsde
from fastsde import checkpoints, noise, ops, reference, solvers

from .measure import Run, Score, check, check_roll, fp32_products, measure, settings, tutorial_loop, write_json

TABLE = solvers.euler_maruyama(fastsde.VPSDE(), torch.linspace(1, 0, 1000))
ROW = 500
L2_BYTES = 128 << 20  # more than the cache of any GPU: rotated buffers of a subject together are larger


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    elements = 1 << (28 if device.type == "cuda" else 20)
    source, target = torch.randn(elements, device=device), torch.empty(elements, device=device)
    timed = measure({"copy": lambda: target.copy_(source)}, device, rounds, calls=5)
    return 8 * elements / timed["copy"]["median_s"]


# One step -----------------------------------------------------------------------------------------------------------


_TIME, _STEP = float(TABLE.time[ROW]), 1 / 999
_BETA = 0.1 + (20 - 0.1) * _TIME


def _tutorial_step(x: Tensor, score: Tensor) -> Tensor:
    """The tutorial's update, operation for operation."""
    drift = -0.5 * _BETA * x - _BETA * score
    return x - drift * _STEP + math.sqrt(_BETA * _STEP) * torch.randn_like(x)


def _rotated(run: Callable[[Tensor, Tensor], object], buffers: list[tuple[Tensor, Tensor]]) -> Run:
    turn = 0

    def next_run() -> None:
        nonlocal turn
        turn += 1
        run(*buffers[turn % len(buffers)])

    return next_run


def solver_step(device: torch.device, elements: int, rounds: int, bandwidth: float) -> dict[str, Any]:
    """One noisy step of ``elements`` fp32 elements, in samples of 3,072."""
    shape = (max(1, elements // 3072), 3072)
    keys = noise.sample_keys(0, shape[0], device=device)
    count = max(2, math.ceil(L2_BYTES / (8 * elements))) if device.type == "cuda" else 2
    buffers = [(torch.randn(shape, device=device), torch.randn(shape, device=device)) for _ in range(count)]
    out = torch.empty(shape, device=device)

    def fused(x: Tensor, f: Tensor) -> None:
        ops.fused_step(x, f, TABLE, ROW, keys=keys, store_data=False, out=out)

    x, f = buffers[0]
    out.fill_(math.nan)
    fused(x, f)
    small = slice(0, 64)
    expected, _ = reference.solver_step(x[small], f[small], TABLE, ROW, keys=keys[small])
    k = TABLE.row(ROW)
    bound = 4e-6 * k["d"] + 4 * 2**-24 * float((k["a"] * x[small].abs() + k["b"] * f[small].abs()).max())
    check("fastsde fused step", float((out[small] - expected).abs().max()), bound)
    # On the CPU there is nothing to compile for: the interpreter that runs the kernel there is not worth a time.
    compiled = torch.compile(_tutorial_step) if device.type == "cuda" else _tutorial_step
    for name, step in (("eager PyTorch", _tutorial_step), ("torch.compile", compiled)):
        rest = step(x, f)[small] - (k["a"] * x[small] + k["b"] * f[small])  # what is left is noise
        check(name, abs(float(rest.std()) / k["d"] - 1) + abs(float(rest.mean())) / k["d"], 0.05)
    timed = measure(
        {
            "eager PyTorch": _rotated(_tutorial_step, buffers),
            "eager PyTorch again": _rotated(_tutorial_step, buffers),
            "torch.compile": _rotated(compiled, buffers),
            "fastsde": _rotated(fused, buffers),
        },
        device,
        rounds,
        calls=20,
    )
    limit = 12 * x.numel() / bandwidth
    return {
        "elements": x.numel(),
        "limit_s": limit,
        "share_of_limit": limit / timed["fastsde"]["median_s"],
        "providers": timed,
    }


# Whole trajectories -------------------------------------------------------------------------------------------------


def swiss_roll(device: torch.device, n: int, rows: int, rounds: int, baseline: bool) -> dict[str, Any]:
    """``n`` samples of ``rows`` steps by the persistent engine in each precision, and as the ``baseline`` the tutorial.

    The baseline is left out where it would take minutes.
    """
    checkpoint = checkpoints.load("swiss-roll", device=device)
    options: dict[str, Any] = {"prediction": checkpoint.prediction, "steps": rows}
    samplers = {
        "fp32": fastsde.Sampler(checkpoint.model, (2,), backend="persistent", **options),
        "bf16": fastsde.Sampler(checkpoint.model, (2,), backend="persistent", dtype=torch.bfloat16, **options),
    }

    def persistent(precision: str, n: int = n) -> Tensor:
        with fp32_products(torch.backends.cuda.matmul, "tf32" if precision == "tf32" else "ieee"):
            x: Tensor = samplers["bf16" if precision == "bf16" else "fp32"](n, seed=1)
        return x

    few = min(n, 1000)
    expected = fastsde.sample(checkpoint.model, (few, 2), backend="reference", seed=1, **options)
    for precision in ("fp32", "tf32", "bf16"):
        check_roll(precision, persistent(precision, few), expected, exact=precision == "fp32")
    score = Score(checkpoint.model, checkpoint.sde, checkpoint.prediction, rows)
    providers: dict[str, Run] = {}
    if baseline:
        loop = tutorial_loop(score, (few, 2), rows, device)
        check_roll("the tutorial's loop", loop, expected, same_noise=False)
        providers = dict.fromkeys(("tutorial", "tutorial again"), lambda: tutorial_loop(score, (n, 2), rows, device))
    for precision in ("fp32", "tf32", "bf16"):
        providers[f"fastsde persistent, {precision}"] = lambda precision=precision: persistent(precision)
    return {"n": n, "rows": rows, "providers": measure(providers, device, rounds)}


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--rounds", default=30, show_default=True)
@click.option("--quick", is_flag=True, help="Small sizes, to see that it works.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to keep the figures as JSON.")
def main(device: str, rounds: int, quick: bool, out: Path | None) -> None:
    """Time the fused kernels beside eager PyTorch and torch.compile, on a GPU."""
    place = torch.device(device)
    if not ops.has_triton(place) or (place.type == "cuda" and not torch.cuda.is_available()):
        raise click.ClickException(f"the kernels do not run on {device}")
    sizes, samples = ((3072 * 8,), (16,)) if quick else ((784_000, 50_331_648), (1000, 20_000, 1_000_000))
    bandwidth = copy_bandwidth(place, rounds)
    result = {
        **settings(place),
        "copy_bandwidth_bytes_per_s": bandwidth,
        "solver_step": [solver_step(place, size, rounds, bandwidth) for size in sizes],
        "swiss_roll": [
            swiss_roll(place, n, 20 if quick else 999, min(rounds, 10), n <= 20_000 and not quick) for n in samples
        ],
    }
    for subject in ("solver_step", "swiss_roll"):
        for case in result[subject]:
            click.echo(f"{subject}, {case.get('n') or case['elements']:,}")
            for name, timed in case["providers"].items():
                spread = f"{timed['p20_s'] * 1e3:.4g} .. {timed['p80_s'] * 1e3:.4g}"
                click.echo(f"  {name:28} {timed['median_s'] * 1e3:10.4g} ms   {spread}")
            if "share_of_limit" in case:
                click.echo(f"  {case['share_of_limit']:.0%} of the limit, {case['limit_s'] * 1e3:.4g} ms")
    if out is not None:
        write_json(out, result)


if __name__ == "__main__":
    main()
