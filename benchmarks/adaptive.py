"""The probability flow to score_sde's tolerance of 1e-5: samples and likelihoods, beside score_sde's own way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

import fastsde
from fastsde import checkpoints
from fastsde.solvers import AdaptiveODE

from .providers import score_sde
from .suite.case import Case, Provider, Rank, Target
from .suite.machine import Work
from .suite.measure import Figures
from .suite.plan import Plan
from .tasks.flow import SEED, Flow, FlowProof
from .tasks.networks import mlp_work, small_digits, unet_work

SCORE_SDE = "score_sde's way"
_CALLS = 100  # of the network, at least, for the limit
_BACKWARD = 2  # what a backward pass with respect to x costs beside the forward pass, with that itself


class OurSampling:
    """`fastsde.Sampler` with adaptive steps, and its calls of the network."""

    def __init__(self, task: Flow, backend: str = "auto") -> None:
        solver = AdaptiveODE(task.tolerance, task.tolerance)
        self._task, self._sampler = task, fastsde.Sampler(task.checkpoint, solver=solver, backend=backend)

    def __call__(self) -> Tensor:
        return self._sampler(self._task.n, seed=SEED, model_kwargs=self._task.conditions or None)

    def calls(self) -> Figures:
        calls = self._sampler.network_calls
        assert calls is not None
        return {"network_calls": int(calls.max()), "evaluations": int(calls.sum())}


def our_likelihood(task: Flow, **options: Any) -> Callable[[], Tensor]:
    given = {"trace": "hutchinson", "seed": SEED, "model_kwargs": task.conditions or None}
    return lambda: fastsde.log_prob(task.checkpoint, task.data, **given, **options)


def cases(plan: Plan) -> Iterator[Case]:
    """Yields points and digits; with --quick few of them, and a larger tolerance for digits."""
    roll = partial(checkpoints.load, "swiss-roll")
    digits = small_digits if plan.tiny else partial(checkpoints.load, "mnist")
    quick = {"tolerance": 1e-3} if plan.quick and not plan.tiny else {}
    sampled = (
        ("swiss-roll", Flow(roll, 100 if plan.quick else 1000, plan.device), mlp_work()),
        ("mnist", Flow(digits, 1 if plan.quick else 16, plan.device, **quick), unet_work()),
    )
    for name, task, work in sampled:
        proof = FlowProof(task, lambda task: score_sde.Sampling(task)(), 1000 if name == "swiss-roll" else 2)
        ways = {
            SCORE_SDE: partial(score_sde.Sampling, task),
            "fastsde adaptive": partial(OurSampling, task),
            "fastsde adaptive, plain network": partial(OurSampling, task, "reference"),
        }
        yield _case(task, proof, f"adaptive-{name}", "samples", ways, work)
    observed = (
        ("swiss-roll", Flow(roll, 100 if plan.quick else 1000, plan.device), mlp_work(), 0.2, 100),
        ("mnist", Flow(digits, 1 if plan.quick else 4, plan.device, **quick), unet_work(), 0.3, 160),
    )
    for name, task, work, share, rows in observed:
        proof = FlowProof(task, lambda task: score_sde.Likelihood(task)(), 1000 if name == "swiss-roll" else 1)
        tolerance = share * task.tolerance
        ways = {
            SCORE_SDE: partial(score_sde.Likelihood, task),
            f"fastsde.log_prob, rk4 x {rows}": partial(our_likelihood, task, solver="rk4", steps=rows),
            f"fastsde.log_prob, adaptive, {tolerance:g}": partial(
                our_likelihood, task, solver=AdaptiveODE(tolerance, tolerance)
            ),
        }
        yield _case(task, proof, f"likelihood-{name}", "likelihoods", ways, work, _BACKWARD)


def _case(
    task: Flow,
    proof: FlowProof,
    name: str,
    what: str,
    ways: dict[str, Callable[[], Callable[[], Tensor]]],
    work: tuple[int, int],
    passes: int = 1,
) -> Case:
    flop, specials = (passes * _CALLS * task.n * each for each in work)
    ours = tuple(way for way in ways if way != SCORE_SDE)
    return Case(
        subject="adaptive",
        name=name,
        what=f"{what} by the flow, {task.n:,} of {name.partition('-')[2]}, tolerance {task.tolerance:g}",
        about={"n": task.n, "tolerance": task.tolerance},
        providers=[
            Provider(way, make, proof, rank=Rank.NEEDED if way in (SCORE_SDE, ours[0]) else Rank.USUAL)
            for way, make in ways.items()
        ],
        baseline=SCORE_SDE,
        work=Work(flop=flop, specials=specials),
        prepare=proof.prepare,
        targets=[Target(f"the speed of {SCORE_SDE}", ours, beside=(SCORE_SDE,), at_least=1.0)],
    )
