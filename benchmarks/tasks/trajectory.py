"""The task of sampling: a network, a number of samples and of rows, and the check of the samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastsde
from fastsde import noise, solvers
from fastsde.checkpoints import Checkpoint
from fastsde.tf32 import with_rounded_products

from ..quality import sliced_wasserstein
from ..suite.case import WrongError, check
from ..suite.machine import Work
from ..suite.measure import Figures, Run, fp32_products

SEED = 1
_FEW, _MANY = 20, 1000  # how many images (in float64) and points are compared
_DRAWN = 1 << 22  # normals computed at once for a loop that is given the contract's noise


@dataclass(frozen=True)
class Trajectory:
    """A whole trajectory of ``n`` samples.

    Args:
        load: returns a checkpoint with the network on the CPU.
        sample_shape: the shape of one sample.
        flop: FLOP of the network per sample and call.
        specials: exponentials and logarithms of the network per sample and call.
        kernels: the fewest dependent GPU kernels in a call of the network; 0 if all rows run in one kernel.
        clocks: the latency of a call in GPU clock cycles, if all rows run in one kernel.
        conditions: returns the conditions of so many samples on the CPU, by their names as the network's arguments.
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
    solver: str | solvers.StepTable = "euler_maruyama"
    conditions: Callable[[int], dict[str, Tensor]] | None = None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        loaded = self.load()
        loaded.model.to(self.device)
        return loaded

    @cached_property
    def model_kwargs(self) -> dict[str, Tensor]:
        """The conditions of all samples."""
        given = {} if self.conditions is None else self.conditions(self.n)
        return {name: value.to(self.device) for name, value in given.items()}

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n, *self.sample_shape)

    @property
    def has_images(self) -> bool:
        return len(self.sample_shape) == 3

    @cached_property
    def table(self) -> solvers.StepTable:
        here = self.checkpoint
        if isinstance(self.solver, solvers.StepTable):
            return self.solver
        return solvers.build(self.solver, here.sde, self.rows, prediction=here.prediction)

    @property
    def options(self) -> dict[str, Any]:
        """The options for `fastsde.sample` and `fastsde.Sampler`."""
        here = self.checkpoint
        if isinstance(self.solver, solvers.StepTable):
            return {"solver": self.solver}
        return {"prediction": here.prediction, "sde": here.sde, "solver": self.solver, "steps": self.rows}

    @property
    def work(self) -> Work:
        """The minimum work: the network in every row, and the samples written once."""
        row = Work(flop=self.flop * self.n, specials=self.specials * self.n, launches=self.kernels, clocks=self.clocks)
        return replace(row * self.rows, bytes=4 * self.n * math.prod(self.sample_shape))

    def precision_of_products(self, precision: str) -> AbstractContextManager[None]:
        kind = torch.backends.cudnn if self.has_images else torch.backends.cuda.matmul
        return fp32_products(kind, "tf32" if precision == "TF32" else "ieee")

    def reference(self, index: Tensor, precision: str, model: Any = None, **options: Any) -> Tensor:
        """Returns some samples computed in plain PyTorch with the contract's noise, by another model if one is given.

        Args:
            index: of the samples.
        """
        keys, given = noise.sample_keys(SEED, self.n, device=self.device)[index], self.conditions_of(index)
        options = {"dtype": dtype_of(precision), "keys": keys, "model_kwargs": given, **self.options, **options}
        with self.precision_of_products(precision):
            shape = (len(index), *self.sample_shape)
            x: Tensor = fastsde.sample(model or self.checkpoint.model, shape, backend="reference", **options)
        return x

    def conditions_of(self, index: Tensor) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.model_kwargs.items()}

    def network(self, precision: str, channels_last: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns the network in a precision, with fp32 inputs and outputs; it is a copy for bf16 or channels last.

        It is given the conditions of all samples.
        """
        dtype, given = dtype_of(precision) or torch.float32, self.model_kwargs
        if precision != "bf16" and not (channels_last and self.has_images):
            return partial(self.checkpoint.model, **given) if given else self.checkpoint.model
        layout = torch.channels_last if self.has_images else torch.preserve_format
        model = copy.deepcopy(self.checkpoint.model).to(dtype, memory_format=layout)

        def network(x: Tensor, t: Tensor) -> Tensor:
            f: Tensor = model(x.to(dtype, memory_format=layout), t.to(dtype), **given)
            return f.float()

        return network


def dtype_of(precision: str) -> torch.dtype | None:
    return torch.bfloat16 if precision == "bf16" else None


class Score(nn.Module):
    """Converts a network with any prediction to one that predicts the score or eps, with two known factors per row.

    The tutorial's network needs no conversion, so it must cost next to nothing: one or two operations per row, instead
    of a dozen to compute alpha and sigma from t. The network must be called in the order of the rows.

    Args:
        times: the times of the calls, float64 ``[rows]``.
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


class ContractNoise(TorchFunctionMode):
    """Replaces draws of ``torch.randn`` and ``torch.randn_like`` by the contract's noise, starting with the prior.

    Several draws are computed at once: one by one they would take a GPU's host longer than the loop itself.

    Args:
        draws: how many there will be.
    """

    def __init__(self, keys: Tensor, draws: int) -> None:
        super().__init__()
        self._keys, self._left = keys, iter(range(draws))
        self._ready: Iterator[Tensor] = iter(())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.randn, torch.randn_like):
            return func(*args, **(kwargs or {}))
        shape = args[0].shape if func is torch.randn_like else args if isinstance(args[0], int) else args[0]
        z = next(self._ready, None)
        if z is None:
            some = list(islice(self._left, max(1, _DRAWN // math.prod(shape))))
            if not some:
                raise WrongError("it draws noise more often than once per row")
            self._ready = iter(noise.normal(self._keys, torch.tensor(some, device=self._keys.device), shape[1:]))
            z = next(self._ready)
        return z.view(shape)


class Proof:
    """Checks samples against those of the reference with the same noise."""

    def __init__(self, task: Trajectory) -> None:
        self.task = task

    def prepare(self, precision: str) -> None:
        """Computes what the checks of several providers need, in one precision."""
        raise NotImplementedError

    def same_noise(self, precision: str, run: Run, x: Tensor) -> Figures:
        """Checks samples spread over the batch, of a provider that draws the contract's noise."""
        return self._near(precision, x, 0.0)

    def given_noise(self, precision: str, run: Run, x: Tensor) -> Figures:
        """Checks a loop that draws with ``torch.randn``, by running it again with the contract's noise.

        It may be off by another 1e-3: loops compute in fp32 what tables hold in float64, and when sigma^2 is small, the
        rounding of 1 - alpha^2 or of the times is not negligible (6e-8 relative to 1e-4).
        """
        self.check_samples(x)
        with ContractNoise(noise.sample_keys(SEED, self.task.n, device=self.task.device), self.task.rows + 1):
            again = run()
        return self._near(precision, again, 1e-3)

    def _near(self, precision: str, x: Tensor, more: float) -> Figures:
        raise NotImplementedError

    def check_samples(self, x: Tensor) -> None:
        if x.shape != self.task.shape or not x.isfinite().all():
            raise WrongError(f"samples must be finite and {self.task.shape}, got {tuple(x.shape)}")

    def _chosen(self, count: int) -> Tensor:
        """Returns indices spread over the batch."""
        task = self.task
        return torch.linspace(0, task.n - 1, min(task.n, count)).long().to(task.device)


class PointsProof(Proof):
    """Compares points number for number in fp32, to 1e-4 as in the kernels' tests, otherwise as distributions.

    These bounds are for points of size 1; for samples that diverge they grow in proportion to the size.
    """

    @cached_property
    def _expected(self) -> tuple[Tensor, Tensor]:
        index = self._chosen(_MANY)
        return index, self.task.reference(index, "fp32")

    def prepare(self, precision: str) -> None:
        assert self._expected

    def _near(self, precision: str, x: Tensor, more: float) -> Figures:
        self.check_samples(x)
        index, expected = self._expected
        size = max(1.0, float(expected.square().mean().sqrt()))
        if precision == "fp32":
            return check("a trajectory", float((x[index] - expected).abs().max()), (1e-4 + more) * size)
        return check("the distribution", sliced_wasserstein(x[index].cpu(), expected.cpu()), 0.02 * size)


class ImagesProof(Proof):
    """Checks that images are as close to float64 as `fastsde.verify` requires, in the median since some are chaotic."""

    def __init__(self, task: Trajectory) -> None:
        super().__init__(task)
        self._own = cache(self._error_of_reference)

    @cached_property
    def _truth(self) -> tuple[Tensor, Tensor]:
        index = self._chosen(_FEW)
        return index, self.task.reference(index, "fp32", dtype=torch.float64)

    def prepare(self, precision: str) -> None:
        self._own(precision)

    def _error(self, x: Tensor) -> float:
        return float((x - self._truth[1]).square().flatten(1).mean(1).sqrt().median())

    def _error_of_reference(self, precision: str) -> float:
        """Returns the error of plain PyTorch; in TF32 at least that of rounded products, whatever cuDNN chooses."""
        index, task = self._truth[0], self.task
        errors = [self._error(task.reference(index, precision))]
        with task.precision_of_products(precision):
            rounded = with_rounded_products(task.checkpoint.model, task.device) if precision != "bf16" else None
        if rounded is not None:
            errors.append(self._error(task.reference(index, precision, rounded)))
        return max(errors)

    def _near(self, precision: str, x: Tensor, more: float) -> Figures:
        self.check_samples(x)
        index, truth = self._truth
        table = self.task.table
        noises = 4e-6 * math.sqrt(1 + float(table.d.abs().sum(dim=1).square().sum()))
        constant = noises + 2.0**-24 * math.sqrt(len(table)) * float(truth.square().mean().sqrt())
        return check("a trajectory", self._error(x[index]), 2 * self._own(precision) + constant + more)


def proof(task: Trajectory) -> Proof:
    return ImagesProof(task) if task.has_images else PointsProof(task)
