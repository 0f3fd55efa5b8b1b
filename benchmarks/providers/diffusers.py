"""diffusers' loops with the same network: `ScoreSdeVpScheduler`, `DDPMScheduler` and `DPMSolverMultistepScheduler`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsde import solvers
from fastsde.checkpoints import Checkpoint

from ..suite.case import UnavailableError, imported
from ..suite.measure import Run
from ..tasks.trajectory import Score, Trajectory
from .tutorial import BETA_MAX, BETA_MIN


def _score_sde_vp(rows: int, device: torch.device) -> Any:
    """Returns a scheduler with steps of 1/rows on linspace(1, 1/rows, rows), as in the tutorial. It expects eps."""
    module = imported("diffusers.schedulers.deprecated.scheduling_sde_vp", "diffusers")
    scheduler = module.ScoreSdeVpScheduler(beta_min=BETA_MIN, beta_max=BETA_MAX, sampling_eps=1 / rows)
    scheduler.set_timesteps(rows, device=device)
    return scheduler


def score_sde_vp_step(rows: int, row: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns a function that takes one step, from x and eps."""
    scheduler = _score_sde_vp(rows, device)
    t = scheduler.timesteps[row]
    return lambda x, eps: scheduler.step_pred(eps, x, t)[0]


def score_sde_vp(task: Trajectory, precision: str) -> Run:
    scheduler = _score_sde_vp(task.rows, task.device)
    network = Score(task.network(precision), task.checkpoint, scheduler.timesteps.double().cpu(), "eps")

    def run() -> Tensor:
        with torch.no_grad(), task.precision_of_products(precision):
            x = torch.randn(task.shape, device=task.device)
            for t in scheduler.timesteps:
                x, _ = scheduler.step_pred(network(x, t.expand(task.n)), x, t)
        return x

    return run


def _ddpm(task: Trajectory) -> Any:
    """Returns a scheduler for ancestral sampling on a discrete chain of as many steps, with betas beta(t) / rows."""
    if task.rows < 2 * BETA_MAX:
        raise UnavailableError(f"a DDPM chain of beta(t) / rows needs at least {2 * BETA_MAX} rows, got {task.rows}")
    diffusers = imported("diffusers", "diffusers")
    scheduler = diffusers.DDPMScheduler(
        task.rows, beta_start=BETA_MIN / task.rows, beta_end=BETA_MAX / task.rows, clip_sample=False
    )
    scheduler.set_timesteps(task.rows)
    return scheduler


def ddpm(task: Trajectory, precision: str) -> Run:
    return _loop(task, precision, _ddpm(task))


def ddpm_task(task: Trajectory) -> Trajectory:
    """Returns the equivalent task for fastsde: its own DDPM on the alphas of that chain."""
    scheduler = _ddpm(task)
    alpha = torch.cat((scheduler.alphas_cumprod.double().flip(0).sqrt(), torch.ones(1, dtype=torch.float64)))
    return _as_task(task, scheduler, solvers.ddpm, alpha)


def _dpm_solver(task: Trajectory) -> Any:
    """Returns a scheduler for DPM-Solver++(2M) with a thousand training steps; its last step is of first order."""
    diffusers = imported("diffusers", "diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        1000, beta_start=BETA_MIN / 1000, beta_end=BETA_MAX / 1000, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(task.rows)
    return scheduler


def dpm_solver(task: Trajectory, precision: str) -> Run:
    return _loop(task, precision, _dpm_solver(task))


def dpm_solver_task(task: Trajectory) -> Trajectory:
    """Returns the equivalent task for fastsde, on the alphas of that scheduler."""
    scheduler = _dpm_solver(task)
    alpha = (1 + scheduler.sigmas.double().square()).rsqrt()
    return _as_task(task, scheduler, partial(solvers.dpm_solver_pp_2m, lower_order_final=False), alpha)


def _times(scheduler: Any) -> Tensor:
    """Returns the times of a scheduler's steps: step i of the discrete chain is at t = (i + 1) / steps."""
    return ((scheduler.timesteps.cpu() + 1).double() / scheduler.config.num_train_timesteps).clamp(max=1)


def _as_task(task: Trajectory, scheduler: Any, solver: Callable[..., solvers.StepTable], alpha: Tensor) -> Trajectory:
    """Returns a task with a network that predicts eps, and with the table of the solver at the scheduler's steps."""
    times = _times(scheduler)
    here = task.checkpoint
    eps = Checkpoint(Score(here.model, here, times, "eps"), here.sde, "eps")
    return replace(task, load=lambda: eps, solver=solver(alpha, (1 - alpha.square()).sqrt(), times))


def _loop(task: Trajectory, precision: str, scheduler: Any) -> Run:
    times = _times(scheduler)
    network = Score(task.network(precision), task.checkpoint, times, "eps")
    on_device = times.to(task.device, torch.float32)

    def run() -> Tensor:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_timesteps(task.rows)  # this also resets the history of the last trajectory
        with torch.no_grad(), task.precision_of_products(precision):
            x = torch.randn(task.shape, device=task.device)
            for i, t in zip(scheduler.timesteps, on_device, strict=True):
                x = scheduler.step(network(x, t.expand(task.n)), i, x).prev_sample
        return x

    return run
