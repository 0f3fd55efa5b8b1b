"""The CPU: native kernels beside PyTorch and the tutorial's loops, ``python -m fastsde.benchmarks.cpu --out FILE``.

All of it runs in one process on all cores that PyTorch takes, in interleaved rounds, and the tutorial's loops twice.
Every provider first proves that it computes the right thing. The native kernels are compiled anew, in a cache of their
own, so that first calls have what a new user's have.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor

from fastsde import checkpoints, data, noise, ops
from fastsde.kernels.cpu.build import find_compiler
from fastsde.training import tutorial_config

from .engines import SEED, Proof, Subject, Training, prove_finite
from .measure import LOOP, Case, Figures, Run, check, check_roll, settings
from .run import run_subjects

CPU = torch.device("cpu")
_FIRST_CALL = """
import time, torch, fastsde
model = fastsde.checkpoints.load("swiss-roll")
started = time.perf_counter()
fastsde.sample(model.model, (1000, 2), prediction=model.prediction)
print(time.perf_counter() - started)
"""


def first_call() -> float:
    """Seconds of the first sampling in a new process that has an empty cache, after the import."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"FASTSDE_CACHE_DIR": cache}
        command = [sys.executable, "-c", _FIRST_CALL]
        return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def roll(n: int, bound: float, rounds: int) -> Case:
    """``n`` points of the swiss roll."""
    subject = Subject(checkpoints.load("swiss-roll"), n, 999, CPU, torch.backends.cuda.matmul)
    case = Case(CPU, subject=f"swiss-roll-{n}", n=n, rows=999)
    expected = subject.reference(n, "fp32", seed=SEED)

    def prove(ours: bool, run: Run, x: Tensor) -> Figures:
        return check_roll("a trajectory", x, expected, ours, ours)

    for backend in ("persistent", "eager"):
        case.add(f"fastsde {backend}", partial(subject.sampler, backend, "fp32"), partial(prove, True))
    case.add("fastsde.sample() anew", partial(subject.sampler, "auto", "fp32", anew=True), partial(prove, True))
    case.add(LOOP, partial(subject.loop, "fp32"), partial(prove, False))
    case.add_again(LOOP)
    case.time(rounds, enough=20)
    loop = case.fastest(LOOP, f"{LOOP}, again")
    case.at_least(f"persistent, {LOOP}", loop, case.fastest("fastsde persistent"), bound)
    if n == 1000:
        case.at_most("first call in a new process, compilation included", first_call(), 3.0)
    return case


def normals(rounds: int) -> Case:
    """A million normals, in one sample and in many."""
    case = Case(CPU, subject="normals", n=1_000_000)

    def prove(keys: Tensor, shape: tuple[int, ...], run: Run, z: Tensor) -> Figures:
        error = float((z - noise.normal(keys, 0, shape)).abs().max())
        check("a normal", error, 4e-6)
        return {"error": error, "allowed": 4e-6}

    for name, n, shape in (("one sample", 1, (1_000_000,)), ("1276 images", 1276, (784,))):
        keys = noise.sample_keys(SEED, n)
        make = partial(lambda keys, shape: lambda: ops.normal(keys, 0, shape), keys, shape)
        case.add(f"fastsde, {name}", make, partial(prove, keys, shape))
    case.add("torch.randn", lambda: lambda: torch.randn(1_000_000), lambda run, z: {"moments": float(z.std())})
    case.add_again("torch.randn")
    case.time(10 * rounds)
    randn = case.fastest("torch.randn", "torch.randn, again")
    case.at_least("one sample, torch.randn", randn, case.fastest("fastsde, one sample"), 2)
    return case


def training(rounds: int) -> Case:
    """Steps of the tutorial's recipe for the swiss roll."""
    config, steps = tutorial_config("swiss-roll"), 500
    ways = Training(config, data.swiss_roll(100_000), CPU, steps)
    case = Case(CPU, subject="train-swiss-roll", batch_size=config.batch_size, steps=config.steps, timed_steps=steps)
    case.add("fastsde native", ways.native, ways.prove_native)
    case.add("fastsde eager", ways.eager, prove_finite)
    case.add(LOOP, ways.loop, prove_finite)
    case.add_again(LOOP)
    case.time(rounds, per=steps)
    loop = case.fastest(LOOP, f"{LOOP}, again")
    case.at_least(f"native step, {LOOP}", loop, case.fastest("fastsde native"), 5)
    return case


def digits(n: int, rounds: int) -> Case:
    """``n`` digits by the U-Net."""
    subject = Subject(checkpoints.load("mnist"), n, 999, CPU, torch.backends.cudnn.conv)
    case = Case(CPU, subject=f"mnist-{n}", n=n, rows=999)
    proof = Proof(subject, many=20)
    case.add("fastsde, fp32", partial(subject.sampler, "auto", "fp32"), partial(proof.same_noise, "fp32"))
    has_bf16 = subject.checkpoint.model.optimize(torch.bfloat16).is_native  # asked here, since it compiles the kernel
    if has_bf16:
        case.add("fastsde, bf16", partial(subject.sampler, "auto", "bf16"), partial(proof.same_noise, "bf16"))
    case.add(LOOP, partial(subject.loop, "fp32"), proof.other_noise)
    case.add_again(LOOP)
    case.time(rounds, enough=20)
    loop = case.fastest(LOOP, f"{LOOP}, again")
    case.at_least(f"fp32, {LOOP}", loop, case.fastest("fastsde, fp32"), 1.8)
    if has_bf16:
        case.at_least(f"bf16, {LOOP}", loop, case.fastest("fastsde, bf16"), 3)
    return case


SUBJECTS: dict[str, Callable[[int], Case]] = {
    "normals": normals,
    "train-swiss-roll": training,
    "swiss-roll-1000": partial(roll, 1000, 3),
    "swiss-roll-20000": partial(roll, 20_000, 4),
    "mnist-20": partial(digits, 20),
}


def _cpu() -> Figures:
    info = Path("/proc/cpuinfo").read_text()
    named = re.search(r"^model name\s*:\s*(.*)$", info, re.MULTILINE)
    wide = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in info]
    return {"cpu": named[1] if named else None, "instructions": wide, "threads": torch.get_num_threads()}


@click.command()
@click.option("--rounds", default=5, show_default=True, help="At most; of what is slow, three.")
@click.option("--subject", "chosen", multiple=True, type=click.Choice(tuple(SUBJECTS)), help="Only these.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to keep the figures as JSON.")
def main(rounds: int, chosen: tuple[str, ...], out: Path | None) -> None:
    """Time the native kernels of the CPU beside PyTorch and the tutorial's loops."""
    torch.manual_seed(SEED)
    result: Figures = {**settings(CPU), **_cpu(), "subjects": []}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FASTSDE_CACHE_DIR"] = cache
        if find_compiler() is None:
            raise click.ClickException("there are no native kernels here: no C++ compiler")
        subjects = {name: partial(SUBJECTS[name], rounds) for name in chosen or SUBJECTS}
        run_subjects(subjects, CPU, result, out, fatal=("wrong", "failed"))


if __name__ == "__main__":
    main()
