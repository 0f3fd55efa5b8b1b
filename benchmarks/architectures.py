"""Networks as other projects write them: a residual MLP on embeddings, an MLP with FiLM and conditions, a DDPM U-Net.

They are untrained, with weights that let samples be compared (`fastsde.networks`). fastsde lowers the MLPs to programs,
and runs their whole trajectories in a kernel; the U-Net, which is one of diffusers, runs row by row. All rows take the
same time.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastsde.checkpoints import Checkpoint
from fastsde.networks import NETWORKS

from .providers import exported, jax, ours, sampling
from .suite.case import Case, Provider, Rank, Target, imported
from .suite.plan import Plan
from .tasks.networks import DDPM_FLOP, DDPM_KERNELS, film_work, residual_work
from .tasks.trajectory import Proof, Trajectory, proof

_PERSISTENT = "fastsde persistent, fp32"


def cases(plan: Plan) -> Iterator[Case]:
    """Yields the three networks. With --quick there are fewer rows, and two images."""
    n, rows = (400, 10) if plan.tiny else (1000, 100 if plan.quick else 999 if plan.has_gpu else 250)
    yield _mlp(plan, "residual", "residual MLP with embeddings", n, rows, residual_work(), at_least=4.0)
    yield _mlp(plan, "film", "MLP with FiLM and conditions", n, rows, film_work())
    yield _unet(plan, *((2, 2) if plan.quick else (8, 100 if plan.has_gpu else 5)))


def _mlp(
    plan: Plan, name: str, words: str, n: int, rows: int, work: tuple[int, int], at_least: float | None = None
) -> Case:
    named = NETWORKS[name]
    task = Trajectory(named.load, named.shape, n, rows, plan.device, *work, conditions=named.conditions)
    shows, loop = proof(task), sampling.baseline(task)
    targets = []
    if at_least is not None and not (plan.quick or plan.has_gpu):
        goal = f"{at_least:g} times the loop's speed"
        targets = [Target(goal, (_PERSISTENT,), beside=(loop,), at_least=at_least)]
    return sampling.case(
        task,
        shows,
        subject="architectures",
        name=f"{name}-{n}",
        what=f"{words}, {n:,} x {rows}",
        providers=[*_others(task, shows), *_samplers(task, shows)],
        targets=targets,
    )


def _unet(plan: Plan, n: int, rows: int) -> Case:
    task = Trajectory(_ddpm_unet, NETWORKS["ddpm-unet"].shape, n, rows, plan.device, DDPM_FLOP, 0, DDPM_KERNELS)
    shows = proof(task)
    return sampling.case(
        task,
        shows,
        subject="architectures",
        name=f"ddpm-unet-{n}",
        what=f"diffusers' U-Net, {n:,} images x {rows}",
        # Its compilation takes a minute.
        providers=[
            each for each in (*_others(task, shows), *_samplers(task, shows)) if not (plan.quick and each.compiles)
        ],
    )


def _ddpm_unet() -> Checkpoint:
    imported("diffusers", "diffusers")
    return NETWORKS["ddpm-unet"].load()


def _others(task: Trajectory, shows: Proof) -> list[Provider]:
    found = [each for each in sampling.others(task, shows) if not each.name.startswith(("diffusers", "torchsde"))]
    scan = [jax.scan(task, shows)] if task.sample_shape == NETWORKS["residual"].shape else []
    return [*found, *scan, *exported.others(task, shows)]


def _samplers(task: Trajectory, shows: Proof) -> list[Provider]:
    """Returns a provider for each backend and precision."""
    default, *rest = sampling.precisions(task)
    found = [ours.sampler(task, shows, "reference", default)]
    for precision in (default, *rest):
        fastest = sampling.rank(task, precision, Rank.NEEDED)
        found += [ours.sampler(task, shows, each, precision, rank=fastest) for each in _backends(task, precision)]
    found.append(ours.sampler(task, shows, "auto", default, anew=True))
    if task.has_images or task.device.type == "cuda":
        found.append(ours.sampler(task, shows, "auto", default, compile=True))
    if task.has_images and task.device.type == "cpu":
        found.append(ours.sampler(task, shows, "auto", default, compile="openvino"))
    return found


def _backends(task: Trajectory, precision: str) -> tuple[str, ...]:
    if task.device.type == "cuda":
        return ("graph",) if task.has_images else ("graph", "persistent")
    return ("eager",) if task.has_images else ("eager", "persistent")
