"""Sampling of the swiss roll by the tutorial's MLP: 1,000, 20,000 and 1,000,000 points.

A million points take the tutorial's loop ten minutes on a CPU, where large batches therefore run fewer rows than 999.
All rows take the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from fastsde import checkpoints

from .providers import jax, ours, sampling
from .suite.case import Case, Provider, Rank, Target
from .suite.plan import Plan
from .tasks.networks import mlp_work
from .tasks.trajectory import PointsProof, Proof, Trajectory

_CPU_ROWS = {1000: 999, 20_000: 250, 1_000_000: 5}
_TARGETS = {1000: 3.0, 20_000: 4.0}  # on a CPU, relative to the loop
CLOCKS = 940  # latency of one row, whose four layers depend on each other


def cases(plan: Plan) -> Iterator[Case]:
    """Yields all batch sizes; with --quick 1,000 points in a tenth of the rows, the fewest that still give the roll."""
    if plan.quick:
        yield _case(plan, *((400, 40) if plan.tiny else (1000, 100)))
        return
    for n, rows in _CPU_ROWS.items():
        yield _case(plan, n, 999 if plan.has_gpu else rows)


def _case(plan: Plan, n: int, rows: int) -> Case:
    load = partial(checkpoints.load, "swiss-roll")
    task = Trajectory(load, (2,), n, rows, plan.device, *mlp_work(), clocks=CLOCKS)
    proof, loop = PointsProof(task), sampling.baseline(task)
    scan = jax.scan(task, proof)
    has_targets = not plan.quick and not plan.has_gpu and n in _TARGETS
    return sampling.case(
        task,
        proof,
        subject="swiss_roll",
        name=f"swiss-roll-{n}",
        what=f"swiss roll, {n:,} samples x {rows}",
        providers=[*sampling.others(task, proof), scan, *mlp_samplers(task, proof)],
        targets=[
            Target(
                f"{bound:g} times the speed of {name}", ("fastsde persistent, fp32",), beside=(name,), at_least=bound
            )
            for name, bound in ((loop, _TARGETS[n]), (scan.name, 4.0))
        ]
        if has_targets
        else [],
    )


def mlp_samplers(task: Trajectory, proof: Proof) -> list[Provider]:
    """Returns a provider for each backend and precision."""
    ways = [("reference", "fp32"), ("eager", "fp32"), ("persistent", "fp32")]
    if task.device.type == "cuda":
        ways += [("graph", "fp32"), ("graph", "bf16"), ("persistent", "TF32"), ("persistent", "bf16")]
    fastest = {("persistent", "fp32"), ("graph", "fp32")}
    found = [ours.sampler(task, proof, *way, rank=Rank.NEEDED if way in fastest else Rank.USUAL) for way in ways]
    found.append(ours.sampler(task, proof, "auto", "fp32", anew=True))
    if task.device.type == "cuda":
        found.append(ours.sampler(task, proof, "graph", "fp32", compile=True))
    return found
