"""Start-up: the import, and first calls in a new process, including compilation of kernels and capture of graphs."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastsde
from fastsde import checkpoints

from .suite.case import LOOP, Case, Provider, Rank, Target, check
from .suite.measure import Figures, Run
from .suite.plan import Plan
from .suite.table import is_ours

_IMPORT = """
import json, time
started = time.perf_counter()
import {module}
{use}
print(json.dumps([time.perf_counter() - started, [1.0]]))
"""
_SAMPLE = """
import json, sys, time, torch, fastsde
from fastsde import checkpoints
device = torch.device("{device}")
torch.manual_seed(0)
here = checkpoints.load("{model}", device)
{before}
started = time.perf_counter()
x = {call}
x = x.cpu()
print(json.dumps([time.perf_counter() - started, [float(x.std()), *x.flatten()[:50].tolist()]]))
"""
_OURS = (
    "fastsde.sample(here.model, ({n}, *here.shape), prediction=here.prediction, steps={rows}, device=device, {options})"
)
_LOOP = """
from fastsde.benchmarks.providers import {module}
from fastsde.benchmarks.tasks.trajectory import Trajectory
task = Trajectory(lambda: here, tuple(here.shape), {n}, {rows}, device, 0, 0)
"""


def cases(plan: Plan) -> Iterator[Case]:
    """Yields the import and first calls; --quick leaves out the U-Net, warm caches and ``torch.compile``."""
    yield Case(
        subject="startup",
        name="startup-import",
        what="import in a new process",
        about={},
        providers=[
            Provider(
                module,
                partial(_import, module),
                lambda run, result: check("the import", 0.0, result[1][0] - 1),
                rank=Rank.NEEDED,
            )
            for module in ("torch", "fastsde")
        ],
        baseline="torch",
        run_s=1.5,
        **_COMMON,
    )
    for model, n, rows in (("swiss-roll", 1000, 100 if plan.quick else 999), ("mnist", 20, 20)):
        if model == "swiss-roll" or not plan.quick:
            for warm in (False,) if plan.quick else (False, True):
                yield _first_calls(plan, model, n, rows, warm)


_COMMON: dict[str, Any] = {"rounds": 2, "timer": lambda run: run()[0]}


def _first_calls(plan: Plan, model: str, n: int, rows: int, warm: bool) -> Case:
    first = partial(_first_call, plan, model, n, rows, warm)
    ways = {LOOP: partial(first, loop="tutorial"), "fastsde": first}
    if plan.has_gpu:
        ways["fastsde graph"] = partial(first, options="backend='graph'")
    if not plan.quick:
        ways["torch.compile"] = partial(first, loop="compiled")
        ways["fastsde compiled"] = partial(first, options="backend='eager', compile=True")
    cache = "warm" if warm else "empty"
    first_roll = model == "swiss-roll" and not (warm or plan.quick or plan.has_gpu)
    return Case(
        subject="startup",
        name=f"startup-{model}-{cache}",
        what=f"first call, {cache} cache, {model}, {n:,} x {rows}",
        about={"n": n, "rows": rows},
        providers=[
            Provider(
                name,
                way,
                partial(_prove, plan, model, n, rows, is_ours(name)),
                compiles="compile" in name,
                rank=Rank.NEEDED if name == "fastsde" else Rank.USUAL,
            )
            for name, way in ways.items()
        ],
        targets=[Target("at most 3 s", ("fastsde",), at_most_s=3.0)] if first_roll else [],
        run_s=4.0,
        **_COMMON,
    )


def _import(module: str) -> Run:
    use = "fastsde.sample" if module == "fastsde" else ""  # the attribute loads torch and what sampling needs
    return partial(_seconds, _IMPORT.format(module=module, use=use), None)


def _first_call(plan: Plan, model: str, n: int, rows: int, warm: bool, loop: str = "", options: str = "") -> Run:
    sizes = {"n": n, "rows": rows}
    before = _LOOP.format(module=loop, **sizes) if loop else ""
    precision = "TF32" if plan.has_gpu and model == "mnist" else "fp32"
    call = f'{loop}.sampling(task, "{precision}")()' if loop else _OURS.format(options=options, **sizes)
    script = _SAMPLE.format(device=plan.device, model=model, before=before, call=call)
    if not warm:
        return partial(_seconds, script, None)
    cache = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    _seconds(script, cache)
    return partial(_seconds, script, cache)


def _seconds(script: str, cache: str | None) -> tuple[float, list[float]]:
    """Returns the (seconds, figures) that a script prints in a new process, with empty caches or a given one."""
    with tempfile.TemporaryDirectory() as empty:
        folder = Path(cache or empty)
        names = {"FASTSDE_CACHE_DIR": "fastsde", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        environment = os.environ | {name: str(folder / each) for name, each in names.items()}
        paths = (str(Path(fastsde.__file__).parents[1]), os.environ.get("PYTHONPATH"))  # this very package
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["the process ended without a message"])[-1])
    seconds, figures = json.loads(done.stdout.splitlines()[-1])
    return seconds, figures


def _prove(
    plan: Plan, model: str, n: int, rows: int, ours: bool, run: Run, result: tuple[float, list[float]]
) -> Figures:
    """Checks the first numbers of fastsde's samples, in the median, and only the standard deviation of the others'."""
    here = checkpoints.load(model, plan.device)
    options = {"prediction": here.prediction, "steps": rows, "device": plan.device}
    expected = fastsde.sample(here.model, (n, *here.shape), backend="eager", **options).cpu()
    deviation, *first = result[1]
    if ours:
        error = (torch.tensor(first) - expected.flatten()[: len(first)]).abs().median()
        return check("a sample", float(error), 1e-2 if plan.has_gpu else 1e-3)
    return check("the standard deviation", abs(deviation / float(expected.std()) - 1), 0.15)
