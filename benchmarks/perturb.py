"""Posterior noising: t and z are drawn and x_t = alpha(t) x_0 + sigma(t) z computed, for batches of data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from fastsde import ops, reference

from .providers import lean, tutorial
from .providers.compiled import compiled
from .suite.case import LEAN, LOOP, Case, Provider, check
from .suite.machine import Work
from .suite.measure import Figures, Run, rotated
from .suite.plan import Plan
from .tasks.elements import SDE, SPECIALS, copies, kernels_name, keys_of, need_kernels

_BATCHES = {"points": (256, 2), "digits": (64, 784), "large": (8192, 3072)}
_CPU_LARGE = (1000, 3072)
STEP = 3
_SCALE = 1 / 255  # of pixels


@dataclass(frozen=True)
class Batches:
    """Data as pixels and in fp32, to noise in turn."""

    shape: tuple[int, ...]
    plan: Plan

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def pixels(self) -> list[Tensor]:
        device = self.plan.device
        count = copies(self.elements, 8, self.plan)
        return [torch.randint(256, self.shape, dtype=torch.uint8, device=device) for _ in range(count)]

    @cached_property
    def data(self) -> list[Tensor]:
        return [pixels.float() * _SCALE for pixels in self.pixels]

    @cached_property
    def keys(self) -> Tensor:
        return keys_of(self.shape, self.plan.device)


def cases(plan: Plan) -> Iterator[Case]:
    """In --quick digits alone."""
    for name, shape in _BATCHES.items():
        if name == "large" and not plan.has_gpu:
            shape = _CPU_LARGE
        if name == "digits" or not plan.quick:
            yield _case(Batches(shape, plan), name)


def _case(batches: Batches, name: str) -> Case:
    drawn, exact = partial(_prove_drawn, batches), partial(_prove_ours, batches)
    kernels = kernels_name(batches.plan)
    providers = [
        Provider(LOOP, lambda: rotated(tutorial.perturb, batches.data), drawn),
        Provider(LEAN, lambda: rotated(lean.perturb, batches.data), drawn),
        Provider("torch.compile", partial(_compiled, batches), drawn, compiles=True),
        Provider("fastsde reference", partial(_contract, batches, reference.perturb), exact),
        Provider(kernels, partial(_kernel, batches, False), exact),
        Provider(f"{kernels}, from pixels", partial(_kernel, batches, True), exact),
    ]
    return Case(
        subject="perturb",
        name=f"perturb-{name}",
        what=f"noising, batch {batches.shape[0]:,} x {batches.shape[1]:,}",
        about={"n": batches.shape[0], "elements": batches.elements},
        providers=providers,
        work=Work(bytes=5 * batches.elements, flop=2 * batches.elements, specials=SPECIALS * batches.elements),
        calls=20,
        rounds=30,
        enough=2.0,
    )


def _compiled(batches: Batches) -> Run:
    fast = compiled(lambda x: lean.perturb(x)[:2], batches.plan.device)
    return rotated(fast, batches.data)


def _contract(batches: Batches, perturb: Callable[..., Any], of_pixels: bool = False) -> Run:
    data, scale = (batches.pixels, _SCALE) if of_pixels else (batches.data, 1.0)
    return rotated(lambda x: perturb(x, batches.keys, STEP, SDE, scale=scale), data)


def _kernel(batches: Batches, of_pixels: bool) -> Run:
    need_kernels(batches.plan.device)
    return _contract(batches, ops.perturb, of_pixels)


def _prove_ours(batches: Batches, run: Run, result: tuple[Tensor, Tensor]) -> Figures:
    """x_t to what normals may differ by, and rounding; t to rounding."""
    expected = reference.perturb(batches.data[0], batches.keys, STEP, SDE)
    errors = [float((one - other).abs().max()) for one, other in zip(result, expected, strict=True)]
    return check("x_t or t", max(errors), 1e-5)


def _prove_drawn(batches: Batches, run: Run, result: tuple[Tensor, ...]) -> Figures:
    """What is left beside alpha x_0 is noise of standard deviation sigma, and t is uniform."""
    x_t, t = result[0].double(), result[1].double()
    z = (x_t - SDE.alpha(t) * batches.data[0]) / SDE.sigma(t)
    off = [
        (z.mean(), z.numel()),
        ((z.square() - 1).mean() / math.sqrt(2), z.numel()),
        ((t - 0.5).mean() * 12**0.5, len(t)),
    ]
    return check("the noise or t", max(abs(float(each)) * math.sqrt(count) for each, count in off), 5.0)
