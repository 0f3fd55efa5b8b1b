"""Sampling: a network, a number of samples and of rows; and what samples must be like to be right."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

import fastsde
from fastsde import noise, solvers
from fastsde.checkpoints import Checkpoint

from ..quality import sliced_wasserstein
from ..suite.case import WrongError, check
from ..suite.machine import Work
from ..suite.measure import Figures, Run, fp32_products

SEED = 1
_FEW, _MANY = 20, 1000  # images in float64, and points, that are compared


@dataclass(frozen=True)
class Trajectory:
    """A whole trajectory of ``n`` samples.

    Args:
        load: returns the network on the CPU and how to sample from it.
        sample_shape: of one sample.
        flop: of the network, a sample and call.
        specials: the same in exponentials and logarithms.
        kernels: the fewest that a call takes on a GPU, each waiting for the last; 0 where all rows are one.
        clocks: of a GPU's chain of operations that a call is, where all rows are one kernel.
    """

    load: Callable[[], Checkpoint]
    sample_shape: tuple[int, ...]
    n: int
    rows: int
    device: torch.device
    flop: float
    specials: float
    kernels: int = 0
    clocks: float = 0
    solver: str = "euler_maruyama"

    @cached_property
    def checkpoint(self) -> Checkpoint:
        loaded = self.load()
        loaded.model.to(self.device)
        return loaded

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n, *self.sample_shape)

    @property
    def has_images(self) -> bool:
        return len(self.sample_shape) == 3

    @cached_property
    def table(self) -> solvers.StepTable:
        here = self.checkpoint
        return solvers.build(self.solver, here.sde, self.rows, prediction=here.prediction)

    @property
    def options(self) -> dict[str, Any]:
        """What `fastsde.sample` and `fastsde.Sampler` need to know."""
        here = self.checkpoint
        return {"prediction": here.prediction, "sde": here.sde, "steps": self.rows, "solver": self.solver}

    @property
    def work(self) -> Work:
        """The network in every row, and the samples written once."""
        row = Work(flop=self.flop * self.n, specials=self.specials * self.n, launches=self.kernels, clocks=self.clocks)
        return replace(row * self.rows, bytes=4 * self.n * math.prod(self.sample_shape))

    def precision_of_products(self, precision: str) -> AbstractContextManager[None]:
        kind = torch.backends.cudnn.conv if self.has_images else torch.backends.cuda.matmul
        return fp32_products(kind, "tf32" if precision == "TF32" else "ieee")

    def reference(self, n: int, precision: str, **options: Any) -> Tensor:
        """Plain PyTorch, with this package's noise."""
        options = {"dtype": dtype_of(precision), **self.options, **options}
        with self.precision_of_products(precision):
            shape = (n, *self.sample_shape)
            x: Tensor = fastsde.sample(self.checkpoint.model, shape, backend="reference", **options)
        return x

    def network(self, precision: str) -> Callable[[Tensor, Tensor], Tensor]:
        """The network in a precision, fp32 in and out; a copy where it is in bf16."""
        dtype = dtype_of(precision)
        if dtype is None:
            return self.checkpoint.model
        model = copy.deepcopy(self.checkpoint.model).to(dtype)
        if self.has_images:
            model = model.to(memory_format=torch.channels_last)

        def network(x: Tensor, t: Tensor) -> Tensor:
            f: Tensor = model(x.to(dtype), t.to(dtype))
            return f.float()

        return network


def dtype_of(precision: str) -> torch.dtype | None:
    return torch.bfloat16 if precision == "bf16" else None


class Score(nn.Module):
    """A network of any prediction as one of the score, or of eps, by two factors known for each row.

    The tutorial's network needs no such factors, so they must cost next to nothing: one or two operations a row, where
    alpha and sigma of t would take a dozen. Calls follow one another in the order of the rows.

    Args:
        times: float64 ``[rows]``, at which it is called.
        of: "score" or "eps".
    """

    def __init__(self, model: Callable[..., Tensor], here: Checkpoint, times: Tensor, of: str = "score") -> None:
        super().__init__()
        self.model, self._calls = model, 0
        r, s = solvers.score_form(here.sde, times, here.prediction)
        factor = -here.sde.sigma(times) if of == "eps" else torch.ones_like(times)
        self._factors = list(zip((r * factor).tolist(), (s * factor).tolist(), strict=True))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        row = self._calls % len(self._factors)
        self._calls += 1
        return self.row(row, x, t)

    def row(self, row: int, x: Tensor, t: Tensor) -> Tensor:
        r, s = self._factors[row]
        f = self.model(x, t)
        return f * s if r == 0 else torch.add(x, f, alpha=s / r).mul_(r)


# Proof --------------------------------------------------------------------------------------------------------------


def moments_apart(a: Tensor, b: Tensor) -> float:
    """How far apart the means and the variances of two batches are: about 1 where only chance separates them.

    The RMS over all elements of a sample, in standard errors; the larger of the two.
    """
    batches = a.double().flatten(1), b.double().flatten(1)
    means, variances = ([each.mean(0) for each in batches], [each.var(0) for each in batches])
    fourth = [(each - mean).pow(4).mean(0) for each, mean in zip(batches, means, strict=True)]
    chance_of_means = sum(v / len(x) for v, x in zip(variances, batches, strict=True))
    chance_of_variances = sum((m - v * v) / len(x) for m, v, x in zip(fourth, variances, batches, strict=True))
    ratios = (
        (values[0] - values[1]).square().mean() / torch.as_tensor(chance).mean()
        for values, chance in ((means, chance_of_means), (variances, chance_of_variances))
    )
    return max(float(ratio.sqrt()) for ratio in ratios)


class Proof:
    """What samples must be like, beside those of the reference that have the same noise, and those of any noise."""

    def __init__(self, task: Trajectory) -> None:
        self._task = task

    def same_noise(self, precision: str, run: Run, x: Tensor) -> Figures:
        """Samples spread over the batch."""
        raise NotImplementedError

    def other_noise(self, run: Run, x: Tensor) -> Figures:
        """The distribution."""
        raise NotImplementedError

    def _checked(self, x: Tensor) -> Tensor:
        if x.shape != self._task.shape or not x.isfinite().all():
            raise WrongError(f"samples must be finite and {self._task.shape}, got {tuple(x.shape)}")
        return x

    def _chosen(self, count: int) -> tuple[Tensor, Tensor]:
        """Indices spread over the batch, and their keys."""
        task = self._task
        index = torch.linspace(0, task.n - 1, min(task.n, count)).long().to(task.device)
        return index, noise.sample_keys(SEED, task.n, device=task.device)[index]


class PointsProof(Proof):
    """Number for number in full fp32, else by the distance of the distributions."""

    @cached_property
    def _expected(self) -> tuple[Tensor, Tensor]:
        index, keys = self._chosen(_MANY)
        return index, self._task.reference(len(keys), "fp32", keys=keys)

    def same_noise(self, precision: str, run: Run, x: Tensor) -> Figures:
        index, expected = self._expected
        own = self._checked(x)[index]
        if precision == "fp32":
            return check("a trajectory", float((own - expected).abs().max()), 1e-4)
        return check("the distribution", sliced_wasserstein(own.cpu(), expected.cpu()), 0.02)

    def other_noise(self, run: Run, x: Tensor) -> Figures:
        index, expected = self._expected
        distance = sliced_wasserstein(self._checked(x)[index].cpu(), expected.cpu())
        return check("the distribution", distance, 0.1 * float(expected.std()))


class ImagesProof(Proof):
    """Images as near to those in float64 as `fastsde.verify` asks, in the median: one in some is chaotic.

    With any noise, the pixels have the means and the variances of the reference's.
    """

    def __init__(self, task: Trajectory) -> None:
        super().__init__(task)
        self._own = cache(self._error_of_reference)

    @cached_property
    def _truth(self) -> tuple[Tensor, Tensor, Tensor]:
        index, keys = self._chosen(_FEW)
        return index, keys, self._task.reference(len(keys), "fp32", keys=keys, dtype=torch.float64)

    @cached_property
    def _expected(self) -> Tensor:
        """As many as `other_noise` compares: on a GPU they are quickly drawn."""
        count = 100 if self._task.device.type == "cuda" else _FEW
        return self._task.reference(count, "TF32", seed=SEED)

    def _error(self, x: Tensor) -> float:
        return float((x - self._truth[2]).square().flatten(1).mean(1).sqrt().median())

    def _error_of_reference(self, precision: str) -> float:
        keys = self._truth[1]
        return self._error(self._task.reference(len(keys), precision, keys=keys))

    def same_noise(self, precision: str, run: Run, x: Tensor) -> Figures:
        index, _, truth = self._truth
        table = self._task.table
        noises = 4e-6 * math.sqrt(1 + float(table.d.square().sum()))
        constant = noises + 2.0**-24 * math.sqrt(len(table)) * float(truth.square().mean().sqrt())
        return check("a trajectory", self._error(self._checked(x)[index]), 2 * self._own(precision) + constant)

    def other_noise(self, run: Run, x: Tensor) -> Figures:
        more = [run() for _ in range(-(-len(self._expected) // len(x)) - 1)]
        drawn = torch.cat((self._checked(x), *more))
        return check("the distribution of the pixels", moments_apart(drawn, self._expected), 2.0)


def proof(task: Trajectory) -> Proof:
    return ImagesProof(task) if task.has_images else PointsProof(task)
