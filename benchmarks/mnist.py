"""Sampling of digits by the tutorial's U-Net, in batches of 1, 20, 256 and 1,000.

A thousand digits take the tutorial's loop ten minutes on a CPU, which therefore runs fewer rows than 999. All rows take
the same time.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastsde.networks import NETWORKS

from .providers import ours, sampling
from .suite.case import Case, Provider, Rank, Target
from .suite.plan import Plan
from .tasks.networks import DIGITS, UNET_KERNELS, unet_work
from .tasks.trajectory import ImagesProof, Proof, Trajectory

_CPU_ROWS = {20: 250, 1000: 5, 1: 250, 256: 20}  # if time is short, the last ones are left out


def cases(plan: Plan) -> Iterator[Case]:
    """Yields all batch sizes; with --quick only 20 digits in 10 rows."""
    if plan.quick:
        yield _case(plan, *((4, 4) if plan.tiny else (20, 10)))
        return
    for n, rows in _CPU_ROWS.items():
        yield _case(plan, n, 999 if plan.has_gpu else rows)


def _case(plan: Plan, n: int, rows: int) -> Case:
    load = NETWORKS["tutorial-unet"].load  # untrained, which takes as long
    task = Trajectory(load, DIGITS, n, rows, plan.device, *unet_work(), kernels=UNET_KERNELS)
    proof, loop = ImagesProof(task), sampling.baseline(task)
    return sampling.case(
        task,
        proof,
        subject="mnist",
        name=f"mnist-{n}",
        what=f"MNIST U-Net, {n:,} image{'s' * (n > 1)} x {rows}",
        providers=[*sampling.others(task, proof), *unet_samplers(task, proof)],
        targets=[] if plan.quick else _targets(plan, n, loop),
    )


def unet_samplers(task: Trajectory, proof: Proof) -> list[Provider]:
    """Returns a provider for each backend and precision."""
    precisions = sampling.precisions(task)
    backends = ("eager", "graph") if task.device.type == "cuda" else ("eager",)
    found = [ours.sampler(task, proof, "reference", precisions[0])]
    for each in precisions:
        usual = sampling.rank(task, each)
        for backend in backends:
            is_fastest = backend == backends[-1] and usual is Rank.USUAL
            found.append(ours.sampler(task, proof, backend, each, rank=Rank.NEEDED if is_fastest else usual))
    if task.device.type == "cuda":
        found.append(ours.sampler(task, proof, "graph", precisions[0], anew=True))
        found += [ours.sampler(task, proof, "graph", each, compile=True) for each in ("bf16", "TF32", "fp32")]
    return found


def _targets(plan: Plan, n: int, loop: str) -> list[Target]:
    found = []
    if not plan.has_gpu and n == 20:
        for precision, bound in (("fp32", 1.8), ("bf16", 3.0)):
            ours = (f"fastsde eager, {precision}",)
            found.append(Target(f"{precision}: {bound:g} times the loop's speed", ours, beside=(loop,), at_least=bound))
    if plan.has_gpu and n in (20, 1000):
        for precision in ("TF32", "bf16") if n == 20 else ("bf16",):
            ours = (f"fastsde graph, {precision}", f"fastsde graph compiled, {precision}")
            seconds, bound = (0.045, 8.0) if n == 20 else (0.42, 5.0)
            found.append(Target(f"{precision}: at most {seconds:g} s", ours, at_most_s=seconds))
            found.append(Target(f"{precision}: {bound:g} times the loop's speed", ours, beside=(loop,), at_least=bound))
            if n == 1000:
                beside = (f"torch.compile, {precision}",)
                found.append(Target("1.3 times the speed of torch.compile in bf16", ours, beside=beside, at_least=1.3))
    return found
