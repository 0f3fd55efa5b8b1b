"""The probability flow, solved to a tolerance for samples and for likelihoods, and how the results are checked.

Two adaptive solvers take different steps, so that their results differ by what the tolerance allows. So each is
compared with SciPy's solution at a hundredth of the tolerance in float64: fastsde's must be as close to it as that of
score_sde's way, up to a factor. With one step for the whole batch most samples are more accurate than they were asked
to be; so for likelihoods, which are sensitive to the first steps, fastsde's tolerance is smaller than score_sde's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

import fastsde
from fastsde import noise
from fastsde.checkpoints import Checkpoint
from fastsde.likelihood import divergence

from ..suite.case import check
from ..suite.measure import Figures, Run

SEED = 1
_FACTOR = 3.0
_CLOSER = 0.01  # the tolerance of the solution that is taken to be exact, relative to the task's


@dataclass(frozen=True)
class Flow:
    """The probability flow of a network between noise and data.

    Args:
        load: returns the checkpoint on a device.
        n: the number of samples.
        tolerance: both the relative and the absolute one; score_sde's is 1e-5.
        dtype: of the network.
    """

    load: Callable[[torch.device], Checkpoint]
    n: int
    device: torch.device
    tolerance: float = 1e-5
    dtype: torch.dtype = torch.float32

    @cached_property
    def checkpoint(self) -> Checkpoint:
        found = self.load(self.device)
        found.model.to(self.dtype).eval().requires_grad_(False)
        return found

    @property
    def conditions(self) -> dict[str, Tensor]:
        """The classes of the samples, one after the other."""
        classes = torch.arange(self.n, device=self.device) % 10
        return dict.fromkeys(self.checkpoint.conditions, classes)

    @cached_property
    def prior(self) -> Tensor:
        return self.checkpoint.sde.prior_sampling((self.n, *self.checkpoint.shape), seed=SEED, device=self.device)

    @cached_property
    def data(self) -> Tensor:
        """Samples of the model itself, to compute the likelihood of, rounded so that they are the same in any batch."""
        given = {"seed": SEED + 1, "model_kwargs": self.conditions}
        model = replace(self, dtype=torch.float32).checkpoint
        x = fastsde.sample(model, self.prior.shape, solver="heun", steps=51, **given)
        return (256 * x).round() / 256

    @property
    def signs(self) -> Tensor:
        """The probes of Hutchinson's estimate, those of `fastsde.log_prob`."""
        keys = noise.sample_keys(SEED, self.n, device=self.device)
        return noise.signs(keys, divergence.PROBE_STEP, self.checkpoint.shape, noise.STREAM_OTHER)


class FlowProof:
    """Checks results against a solution that is much more accurate.

    Args:
        solve: score_sde's own way, whose error is the measure.
        few: how many samples are compared, the first ones; the accurate solution of many images takes long.
    """

    def __init__(self, task: Flow, solve: Callable[[Flow], Tensor], few: int) -> None:
        self.task, self._solve, self._few = task, solve, few

    @cached_property
    def exact(self) -> Tensor:
        task = self.task
        return self._solve(
            replace(task, n=min(task.n, self._few), tolerance=_CLOSER * task.tolerance, dtype=torch.float64)
        )

    @cached_property
    def allowed(self) -> float:
        return _FACTOR * self._error(self._solve(self.task))

    def prepare(self) -> None:
        """Computes what several checks need."""
        _ = self.allowed

    def __call__(self, run: Run, found: Tensor) -> Figures:
        calls = getattr(run, "calls", None)
        return check("the solution", self._error(found), self.allowed) | ({} if calls is None else calls())

    def _error(self, found: Tensor) -> float:
        return float((found[: self._few].double() - self.exact).square().mean().sqrt())
