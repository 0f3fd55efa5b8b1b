"""The fused kernels beside what people use instead: ``python -m fastsde.benchmarks.kernels --out FILE``.

Two subjects: one Euler-Maruyama step of a large state, and whole swiss-roll trajectories. In each, every provider first
proves that it computes the same thing; then all are timed in interleaved rounds on the same inputs, the baseline twice,
so that the noise of the measurement shows. A figure comes with the physical limit by arithmetic: bytes over the copy
bandwidth measured in the same run.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import fastsde
from fastsde import checkpoints, noise, ops, reference, solvers
from fastsde.files import atomic_path

from .quality import sliced_wasserstein

Run = Callable[[], object]
TABLE = solvers.euler_maruyama(fastsde.VPSDE(), torch.linspace(1, 0, 1000))
ROW = 500
L2_BYTES = 128 << 20  # more than the cache of any GPU: rotated buffers of a subject together are larger


def _seconds(run: Run, device: torch.device, calls: int) -> float:
    """Seconds a call: on a GPU, of ``calls`` of them between two events, so that the launch of one hides in another."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def measure(
    providers: dict[str, Run], device: torch.device, rounds: int, calls: int = 1
) -> dict[str, dict[str, float]]:
    """Median, 20th and 80th percentile of each provider's seconds, over interleaved rounds after a warm-up of two."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for number in range(rounds + 2):
        for name, run in providers.items():
            seconds = _seconds(run, device, calls)
            if number >= 2:
                times[name].append(seconds)
    result = {}
    for name, values in times.items():
        deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
        result[name] = {"median_s": statistics.median(values), "p20_s": deciles[1], "p80_s": deciles[7]}
    return result


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    elements = 1 << (28 if device.type == "cuda" else 20)
    source, target = torch.randn(elements, device=device), torch.empty(elements, device=device)
    timed = measure({"copy": lambda: target.copy_(source)}, device, rounds, calls=5)
    return 8 * elements / timed["copy"]["median_s"]


def _check(name: str, error: float, bound: float) -> None:
    if not error <= bound:
        raise click.ClickException(
            f"{name} is wrong, so it has no time: off by {error:.3g}, at most {bound:.3g} is due"
        )


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
    _check("fastsde fused step", float((out[small] - expected).abs().max()), bound)
    # On the CPU there is nothing to compile for: the interpreter that runs the kernel there is not worth a time.
    compiled = torch.compile(_tutorial_step) if device.type == "cuda" else _tutorial_step
    for name, step in (("eager PyTorch", _tutorial_step), ("torch.compile", compiled)):
        rest = step(x, f)[small] - (k["a"] * x[small] + k["b"] * f[small])  # what is left is noise
        _check(name, abs(float(rest.std()) / k["d"] - 1) + abs(float(rest.mean())) / k["d"], 0.05)
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


def _tutorial_loop(net: nn.Module, n: int, rows: int, device: torch.device) -> Tensor:
    """The tutorial's sampling loop, for a network that predicts the score of x and t."""
    with torch.no_grad():
        times = torch.linspace(1, 0, rows + 1, device=device)
        x = torch.randn(n, 2, device=device)
        for here, there in pairwise(times):
            step = here - there
            beta = 0.1 + (20 - 0.1) * here
            score = net(x, here.expand(n))
            x = x - (-0.5 * beta * x - beta * score) * step + (beta * step).sqrt() * torch.randn_like(x)
    return x


class _Score(nn.Module):
    """The shipped network, which predicts eps, as one that predicts the score."""

    def __init__(self, model: nn.Module, sde: fastsde.VPSDE) -> None:
        super().__init__()
        self.model, self.sde = model, sde

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = -self.model(x, t) / self.sde.sigma(t)[:, None]
        return result


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
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if precision == "tf32" else "ieee"
        try:
            x: Tensor = samplers["bf16" if precision == "bf16" else "fp32"](n, seed=1)
        finally:
            matmul.fp32_precision = before
        return x

    few = min(n, 1000)
    expected = fastsde.sample(checkpoint.model, (few, 2), backend="reference", seed=1, **options)
    _check("fp32", float((persistent("fp32", few) - expected).abs().max()), 1e-4)
    for precision in ("tf32", "bf16"):
        _check(precision, sliced_wasserstein(persistent(precision, few).cpu(), expected.cpu()), 0.02)
    score = _Score(checkpoint.model, checkpoint.sde)
    providers: dict[str, Run] = {}
    if baseline:
        loop = _tutorial_loop(score, few, rows, device)  # other noise, so the distribution is compared
        _check("the tutorial's loop", sliced_wasserstein(loop.cpu(), expected.cpu()), 0.1)
        providers = dict.fromkeys(("tutorial", "tutorial again"), lambda: _tutorial_loop(score, n, rows, device))
    for precision in ("fp32", "tf32", "bf16"):
        providers[f"fastsde persistent, {precision}"] = lambda precision=precision: persistent(precision)
    return {"n": n, "rows": rows, "providers": measure(providers, device, rounds)}


def _settings(device: torch.device) -> dict[str, Any]:
    import triton

    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fastsde": fastsde.__version__,
        "commit": git.stdout.strip() or None,
    }


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--rounds", default=30, show_default=True)
@click.option("--quick", is_flag=True, help="Small sizes, to see that it works.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to keep the figures as JSON.")
def main(device: str, rounds: int, quick: bool, out: Path | None) -> None:
    """Time the fused kernels beside eager PyTorch and torch.compile, on a GPU."""
    place = torch.device(device)
    if not ops.has_kernels(place) or (place.type == "cuda" and not torch.cuda.is_available()):
        raise click.ClickException(f"the kernels do not run on {device}")
    sizes, samples = ((3072 * 8,), (16,)) if quick else ((784_000, 50_331_648), (1000, 20_000, 1_000_000))
    bandwidth = copy_bandwidth(place, rounds)
    result = {
        **_settings(place),
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
        with atomic_path(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
