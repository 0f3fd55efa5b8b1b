"""The overhead of a call and of a row: one sample in one row, and rows of a small custom network.

The network has little to do here, so that everything around it shows: checks, choices, keys, and the step's launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from fastsde import checkpoints, models
from fastsde.checkpoints import Checkpoint

from .providers import lean, ours, sampling
from .suite.case import LEAN, Case, Rank
from .suite.plan import Plan
from .tasks.networks import Unknown, fresh, mlp_work
from .tasks.trajectory import PointsProof, Trajectory

_WIDTH, _DIM, _N, _ROWS = 64, 5, 64, 499


def cases(plan: Plan) -> Iterator[Case]:
    """Yields a warm call, and the rows of a small network that fastsde does not know."""
    load = partial(checkpoints.load, "swiss-roll")
    one = Trajectory(load, (2,), 1, 1, plan.device, *mlp_work())
    yield _case(one, "call-one", "one sample, one row", "auto", calls=50)
    rows = 99 if plan.quick else _ROWS
    small = Trajectory(_small, (_DIM,), _N, rows, plan.device, *mlp_work((_WIDTH,), _DIM), kernels=2)
    yield _case(small, "call-rows", f"small network not known to fastsde, {_N} samples x {rows}", "eager")


def _small() -> Checkpoint:
    return fresh(lambda: Unknown(models.MLP(_DIM, (_WIDTH,)), (_DIM,)))


def _case(task: Trajectory, name: str, what: str, backend: str, calls: int = 1) -> Case:
    proof = PointsProof(task)
    return sampling.case(
        task,
        proof,
        subject="call",
        name=name,
        what=what,
        providers=[
            sampling.loop(LEAN, lean.sampling, task, proof, "fp32"),
            ours.sampler(task, proof, "reference", "fp32"),
            ours.sampler(task, proof, backend, "fp32", rank=Rank.NEEDED),
            ours.sampler(task, proof, backend, "fp32", anew=True),
        ],
        calls=calls,
        rounds=30,
        enough=2.0,
    )
