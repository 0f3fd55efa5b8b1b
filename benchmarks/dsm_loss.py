"""The denoising loss and its gradient, for the network's output, given x_0, t and the noise.

The tutorial's code is given x_t, its mean and its variance; lean PyTorch is given sigma and the noise; fastsde is given
its coefficients, and on a CPU the noise, which it draws again from the keys on a GPU. Every program has to read the
output and write the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from fastsde import noise, ops, reference

from .perturb import OBJECTIVE, STEP
from .providers.compiled import compiled
from .suite.case import LEAN, LOOP, Case, Provider, Rank, check
from .suite.machine import Work
from .suite.measure import Figures, Rotated
from .suite.plan import Plan
from .tasks.elements import SDE, calls, copies, kernels_name, keys_of, need_kernels, traffic

_BATCHES = {"points": (256, 2), "digits": (64, 784), "large": (8192, 3072)}
_CPU_LARGE = (1000, 3072)


@dataclass(frozen=True)
class Batch:
    """The network's output and everything that a provider computes its loss from, with the same noise for all."""

    f: Tensor
    x_0: Tensor
    t: Tensor  # [B]
    keys: Tensor
    z: Tensor

    @cached_property
    def sigma(self) -> Tensor:
        return SDE.sigma(self.t)[:, None]

    @cached_property
    def table(self) -> Tensor:
        """The coefficients, which fastsde keeps from the noising to the loss."""
        return OBJECTIVE.table(self.t)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, its mean and its variance, which the tutorial keeps from the noising to the loss."""
        mean = SDE.alpha(self.t)[:, None] * self.x_0
        return mean + self.sigma * self.z, mean, self.sigma.square()


Loss = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Batches:
    shape: tuple[int, ...]
    plan: Plan

    @cached_property
    def all(self) -> list[Batch]:
        device, (n, size) = self.plan.device, self.shape
        keys = keys_of(self.shape, device)
        z = noise.normal(keys, STEP, (size,), noise.STREAM_TRAINING_NOISE)
        found = []
        for _ in range(copies(4 * 4 * n * size, self.plan)):
            f, x_0 = torch.randn(self.shape, device=device).requires_grad_(), torch.rand(self.shape, device=device)
            batch = Batch(f, x_0, torch.rand(n, device=device).clamp_(min=1e-2), keys, z)
            assert batch.moments  # computed before anything is timed
            assert len(batch.table) == n
            found.append(batch)
        return found


def cases(plan: Plan) -> Iterator[Case]:
    """Yields all batches; with --quick only the digits."""
    for name, shape in _BATCHES.items():
        if name == "large" and not plan.has_gpu:
            shape = _CPU_LARGE
        if name == "digits" or not plan.quick:
            yield _case(Batches(shape, plan), name)


def _case(batches: Batches, name: str) -> Case:
    device, elements = batches.plan.device, math.prod(batches.shape)
    losses: dict[str, Callable[[], Loss]] = {
        LOOP: lambda: tutorial_loss,
        LEAN: lambda: lean_loss,
        "torch.compile": partial(_compiled_loss, device),
        "fastsde reference": lambda: partial(_ours, reference.dsm_loss),
        kernels_name(batches.plan): partial(_kernel, device),
    }
    ranks = {LEAN: Rank.NEEDED, kernels_name(batches.plan): Rank.NEEDED, "fastsde reference": Rank.LAST}
    providers = [
        Provider(
            provider,
            partial(_with_gradient, batches, make),
            _prove,
            compiles=provider == "torch.compile",
            rank=ranks.get(provider, Rank.USUAL),
        )
        for provider, make in losses.items()
    ]
    return Case(
        subject="dsm_loss",
        name=f"dsm-loss-{name}",
        what=f"loss and gradient, batch {batches.shape[0]:,} x {batches.shape[1]:,}",
        about={"n": batches.shape[0], "elements": elements},
        providers=providers,
        work=Work(traffic(4 * elements, 4 * elements, batches.plan), flop=6 * elements, launches=1),
        prepare=lambda: batches.all,
        calls=calls(elements, batches.plan),
        rounds=30,
        enough=2.0,
        is_kernel=True,
    )


def tutorial_loss(batch: Batch) -> Tensor:
    """Computes the mean of variance * (f - target)^2."""
    x_t, mean, variance = batch.moments
    target = -(x_t - mean) / variance
    return (variance * (batch.f - target) ** 2).mean()


def lean_loss(batch: Batch) -> Tensor:
    return _residual(batch.f, batch.z, batch.sigma)


def _residual(f: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
    return torch.addcmul(z, f, sigma).square().mean()


def _compiled_loss(device: torch.device) -> Loss:
    fast = compiled(_residual, device)
    return lambda batch: fast(batch.f, batch.z, batch.sigma)


def _ours(loss: Callable[..., Tensor], batch: Batch) -> Tensor:
    z = batch.z if batch.f.device.type == "cpu" else None
    return loss(batch.f, batch.x_0, batch.keys, STEP, batch.table, z=z)


def _kernel(device: torch.device) -> Loss:
    need_kernels(device)
    return partial(_ours, ops.dsm_loss)


def _with_gradient(batches: Batches, make: Callable[[], Loss]) -> Rotated[Batch]:
    loss = make()

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        value = loss(batch)
        (gradient,) = torch.autograd.grad(value, batch.f)
        return value.detach(), gradient

    return Rotated(run, batches.all)


def _prove(run: Rotated[Batch], result: tuple[Tensor, Tensor]) -> Figures:
    """Checks loss and gradient against float64, relative to the loss and to the largest gradient."""
    batch = run.last
    f = batch.f.detach().double().requires_grad_()
    value = _residual(f, batch.z.double(), SDE.sigma(batch.t.double())[:, None])
    (gradient,) = torch.autograd.grad(value, f)
    value = value.detach()
    errors = (result[0] - value).abs() / value, (result[1] - gradient).abs().max() / gradient.abs().max()
    return check("the loss or its gradient", max(map(float, errors)), 2e-5)
