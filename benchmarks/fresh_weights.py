"""The tutorial's networks before training. Their samples diverge, and their activations underflow to subnormal numbers,
each of which costs 150 cycles on many CPUs. `swiss_roll.py` and `mnist.py` have the same networks after training.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from fastsde.models import MLP, UNet

from .mnist import unet_samplers
from .providers import lean, sampling, tutorial
from .suite.case import LEAN, LOOP, Case, Provider
from .suite.plan import Plan
from .swiss_roll import CLOCKS, mlp_samplers
from .tasks.networks import DIGITS, UNET_KERNELS, fresh, mlp_work, unet_work
from .tasks.trajectory import Proof, Trajectory, proof


def cases(plan: Plan) -> Iterator[Case]:
    """Yields the MLP and the U-Net; with --quick only the MLP. All rows take the same time."""
    n, rows = (100, 20) if plan.tiny else (1000, 100 if plan.quick else 250)
    points = Trajectory(partial(fresh, MLP), (2,), n, rows, plan.device, *mlp_work(), clocks=CLOCKS)
    shows = proof(points)
    yield _case(points, shows, "fresh-mlp", "untrained MLP", mlp_samplers(points, shows))
    if not plan.quick:
        digits = Trajectory(partial(fresh, UNet), DIGITS, 20, 20, plan.device, *unet_work(), kernels=UNET_KERNELS)
        shows = proof(digits)
        yield _case(digits, shows, "fresh-unet", "untrained U-Net", unet_samplers(digits, shows))


def _case(task: Trajectory, shows: Proof, name: str, words: str, ours: list[Provider]) -> Case:
    precision = sampling.precisions(task)[0]
    loops = ((LOOP, tutorial.sampling), (LEAN, lean.sampling))
    return sampling.case(
        task,
        shows,
        subject="fresh_weights",
        name=name,
        what=f"{words}, {task.n:,} x {task.rows}",
        providers=[*(sampling.loop(each, make, task, shows, precision) for each, make in loops), *ours],
    )
