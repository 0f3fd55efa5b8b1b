"""Few-step sampling: digits by DPM-Solver++(2M) in 20 rows, compared with the solver in eager PyTorch and diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from fastsde.networks import NETWORKS

from .mnist import unet_samplers
from .providers import diffusers, lean, sampling
from .suite.case import LEAN, Case, Provider
from .suite.plan import Plan
from .tasks.networks import DIGITS, UNET_KERNELS, unet_work
from .tasks.trajectory import ImagesProof, Trajectory

ROWS = 20


def cases(plan: Plan) -> Iterator[Case]:
    """Yields two batch sizes; with --quick only 4 digits."""
    for n in (4,) if plan.quick else (20, 1000) if plan.has_gpu else (20, 256):
        load = NETWORKS["tutorial-unet"].load
        rows = 6 if plan.tiny else ROWS
        task = Trajectory(
            load, DIGITS, n, rows, plan.device, *unet_work(), kernels=UNET_KERNELS, solver="dpm_solver_pp_2m"
        )
        proof, precision = ImagesProof(task), sampling.precisions(task)[0]
        multistep = partial(diffusers.dpm_solver, task, precision)
        shows = partial(sampling.as_task, diffusers.dpm_solver_task, task, precision)
        providers = [
            sampling.loop(LEAN, lean.sampling, task, proof, precision),
            Provider(f"diffusers DPMSolverMultistep, {precision}", multistep, shows, precision),
            *sampling.compilations(task),
            *unet_samplers(task, proof),
        ]
        yield sampling.case(
            task,
            proof,
            subject="few_steps",
            name=f"few-steps-{n}",
            what=f"DPM-Solver++(2M), U-Net, {n:,} images x {rows}",
            providers=providers,
        )
