"""Where the gains end: networks dominated by their own arithmetic, and one that fastsde does not know.

Untrained U-Nets of 1, 2 and 4 times the tutorial's width (1, 4 and 16 times its arithmetic), the first also as a
network that fastsde does not know, and an MLP 512 wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from .providers import ours, sampling
from .suite.case import Case, Rank
from .suite.plan import Plan
from .tasks.networks import CHANNELS, DIGITS, UNET_KERNELS, mlp_work, random_mlp, random_unet, unet_work
from .tasks.trajectory import Trajectory, proof

MLP_WIDTH = 512


def cases(plan: Plan) -> Iterator[Case]:
    """Yields all networks; with --quick only the one that fastsde does not know."""
    n, rows = (4, 3) if plan.tiny else (20, 5 if plan.quick else 100 if plan.has_gpu else 10)
    for width, known in ((1, False),) if plan.quick else ((1, False), (1, True), (2, True), (4, True)):
        work = unet_work([width * channels for channels in CHANNELS])
        load = partial(random_unet, width, known)
        task = Trajectory(load, DIGITS, n, rows, plan.device, *work, kernels=UNET_KERNELS)
        name = f"unet-{width}x" if known else "unet-unknown"
        words = f"U-Net of {work[0] / 1e6:,.0f} MFLOP" if known else "U-Net not known to fastsde"
        yield _case(task, name, words, plan.quick)
    if not plan.quick:
        task = Trajectory(
            partial(random_mlp, MLP_WIDTH), (2,), 1000, rows, plan.device, *mlp_work((MLP_WIDTH,) * 3), kernels=4
        )
        yield _case(task, f"mlp-{MLP_WIDTH}", f"MLP {MLP_WIDTH} wide", plan.quick)


def _case(task: Trajectory, name: str, words: str, quick: bool) -> Case:
    shows = proof(task)
    others = [each for each in sampling.others(task, shows) if not each.name.startswith(("diffusers", "torchsde"))]
    return sampling.case(
        task,
        shows,
        subject="network_size",
        name=name,
        what=f"{words}, {task.n:,} x {task.rows}",
        providers=[
            *others,
            *(
                ours.sampler(task, shows, "auto", precision, compiled, rank=sampling.rank(task, precision, Rank.NEEDED))
                for precision in sampling.precisions(task)
                for compiled in (False, True)
                if not compiled or (task.has_images and not quick)
            ),
        ],
    )
