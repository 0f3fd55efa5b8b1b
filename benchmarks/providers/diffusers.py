"""diffusers' loops on the same network: `ScoreSdeVpScheduler`, `DDPMScheduler`, `DPMSolverMultistepScheduler`."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..suite.case import UnavailableError
from ..suite.measure import Run
from ..tasks.trajectory import Score, Trajectory
from .tutorial import BETA_MAX, BETA_MIN


def _imported(name: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"diffusers is not installed, or has no {name}: pip install diffusers") from error


def _score_sde_vp(rows: int, device: torch.device | None) -> Any:
    """Steps of 1/rows on linspace(1, 1/rows, rows), which are the tutorial's; it wants the network's eps."""
    module = _imported("diffusers.schedulers.deprecated.scheduling_sde_vp")
    scheduler = module.ScoreSdeVpScheduler(beta_min=BETA_MIN, beta_max=BETA_MAX, sampling_eps=1 / rows)
    scheduler.set_timesteps(rows, device=device)
    return scheduler


def score_sde_vp_step(rows: int, row: int) -> Callable[[Tensor, Tensor], Tensor]:
    """One step, for eps."""
    scheduler = _score_sde_vp(rows, None)
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


def ddpm(task: Trajectory, precision: str) -> Run:
    """Ancestral sampling on the discrete chain of as many steps, whose betas are beta(t) / rows."""
    if task.rows < 2 * BETA_MAX:
        raise UnavailableError(f"a DDPM chain of beta(t) / rows needs at least {2 * BETA_MAX} rows, got {task.rows}")
    diffusers = _imported("diffusers")
    scheduler = diffusers.DDPMScheduler(
        task.rows, beta_start=BETA_MIN / task.rows, beta_end=BETA_MAX / task.rows, clip_sample=False
    )
    scheduler.set_timesteps(task.rows)
    return _loop(task, precision, scheduler)


def dpm_solver(task: Trajectory, precision: str) -> Run:
    """DPM-Solver++(2M) as diffusers runs it: on a thousand training steps, its last step of first order."""
    diffusers = _imported("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        1000, beta_start=BETA_MIN / 1000, beta_end=BETA_MAX / 1000, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(task.rows)
    return _loop(task, precision, scheduler)


def _loop(task: Trajectory, precision: str, scheduler: Any) -> Run:
    """Step i of the discrete chain is at t = (i + 1) / steps."""
    steps = scheduler.config.num_train_timesteps
    times = ((scheduler.timesteps + 1).double() / steps).clamp(max=1)
    network = Score(task.network(precision), task.checkpoint, times, "eps")
    on_device = times.to(task.device, torch.float32)

    def run() -> Tensor:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_timesteps(task.rows)  # which also forgets the last trajectory
        with torch.no_grad(), task.precision_of_products(precision):
            x = torch.randn(task.shape, device=task.device)
            for i, t in zip(scheduler.timesteps, on_device, strict=True):
                x = scheduler.step(network(x, t.expand(task.n)), i, x).prev_sample
        return x

    return run
