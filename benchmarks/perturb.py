"""Noising of batches of data: draws t and z and computes x_t = alpha(t) x_0 + sigma(t) z."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from fastsde import noise, ops, reference
from fastsde.objective import Objective

from .providers import lean, tutorial
from .providers.compiled import compiled
from .suite.case import LEAN, LOOP, Case, Provider, Rank, check
from .suite.machine import Work
from .suite.measure import Figures, Rotated
from .suite.plan import Plan
from .tasks.elements import SDE, SPECIALS, calls, check_normals, copies, kernels_name, keys_of, need_kernels, traffic

_BATCHES = {
    "points": ((256, 2), False),
    "digits": ((64, 784), False),
    "pixels": ((64, 784), True),
    "large": ((8192, 3072), False),
}
_CPU_LARGE = (1000, 3072)
STEP = 3
OBJECTIVE = Objective(SDE)


@dataclass(frozen=True)
class Batches:
    """Batches of data to be noised in turn, as pixels or in fp32."""

    shape: tuple[int, ...]
    of_pixels: bool
    plan: Plan

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def input_bytes(self) -> int:
        return self.elements * (1 if self.of_pixels else 4)

    @property
    def scale(self) -> float:
        """The factor from the stored data to the range [0, 1]."""
        return 1 / 255 if self.of_pixels else 1.0

    @cached_property
    def given(self) -> list[Tensor]:
        device = self.plan.device
        count = copies(self.input_bytes, self.plan)
        pixels = [torch.randint(256, self.shape, dtype=torch.uint8, device=device) for _ in range(count)]
        return pixels if self.of_pixels else [each.float() / 255 for each in pixels]

    @cached_property
    def keys(self) -> Tensor:
        return keys_of(self.shape, self.plan.device)

    def data(self, given: Tensor) -> Tensor:
        """Returns the data in fp32."""
        return given.float() * self.scale if self.of_pixels else given


def cases(plan: Plan) -> Iterator[Case]:
    """Yields all batches; with --quick only the digits."""
    for name, (shape, of_pixels) in _BATCHES.items():
        if name == "large" and not plan.has_gpu:
            shape = _CPU_LARGE
        if name == "digits" or not plan.quick:
            yield _case(Batches(shape, of_pixels, plan), name)


def _case(batches: Batches, name: str) -> Case:
    plan, size = batches.plan, batches.elements
    drawn, exact = partial(_prove_drawn, batches), partial(_prove_ours, batches)
    providers = [
        Provider(LOOP, partial(_on, batches, tutorial.perturb), drawn),
        Provider(LEAN, partial(_on, batches, lean.perturb), drawn, rank=Rank.NEEDED),
        Provider("torch.compile", partial(_compiled, batches), drawn, compiles=True),
        Provider("fastsde reference", partial(_contract, batches, _reference), exact, rank=Rank.LAST),
        Provider(kernels_name(plan), partial(_kernel, batches), exact, rank=Rank.NEEDED),
    ]
    return Case(
        subject="perturb",
        name=f"perturb-{name}",
        what=f"noising{' pixels' * batches.of_pixels}, batch {batches.shape[0]:,} x {batches.shape[1]:,}",
        about={"n": batches.shape[0], "elements": size},
        providers=providers,
        work=Work(traffic(batches.input_bytes, 4 * size, plan), 2 * size, SPECIALS * size, launches=1),
        calls=calls(size, plan),
        rounds=30,
        enough=2.0,
        is_kernel=True,
        prepare=lambda: (batches.given, batches.keys),
    )


def _on(batches: Batches, perturb: Callable[[Tensor], Any]) -> Rotated[Tensor]:
    return Rotated(lambda given: perturb(batches.data(given)), batches.given)


def _compiled(batches: Batches) -> Rotated[Tensor]:
    """Compiles the noising together with the conversion of the stored data."""
    fast = compiled(lambda given: lean.perturb(batches.data(given))[:2], batches.plan.device)
    return Rotated(fast, batches.given)


def _contract(batches: Batches, noised: Callable[[Batches, Tensor], Any]) -> Rotated[Tensor]:
    return Rotated(lambda given: noised(batches, given), batches.given)


def _reference(batches: Batches, given: Tensor) -> reference.Noised:
    t = OBJECTIVE.draw(noise.uniform(batches.keys, STEP, (), noise.STREAM_TRAINING_TIME))
    return reference.perturb(given, batches.keys, STEP, OBJECTIVE.table(t), scale=batches.scale)


def _kernels(batches: Batches, given: Tensor) -> reference.Noised:
    (coefficients,) = ops.step_coefficients(OBJECTIVE, batches.keys, STEP)
    return ops.perturb(given, batches.keys, STEP, coefficients, scale=batches.scale)


def _kernel(batches: Batches) -> Rotated[Tensor]:
    need_kernels(batches.plan.device)
    return _contract(batches, _kernels)


def _prove_ours(batches: Batches, run: Rotated[Tensor], result: reference.Noised) -> Figures:
    """Checks x_t and t against the reference, up to rounding and the allowed difference of normals."""
    expected = _reference(batches, run.last)
    errors = [float((one - other).abs().max()) for one, other in zip(result[:2], expected[:2], strict=True)]
    return check("x_t or t", max(errors), 1e-5)


def _prove_drawn(batches: Batches, run: Rotated[Tensor], result: tuple[Tensor, ...]) -> Figures:
    """Checks that x_t - alpha x_0 is noise of standard deviation sigma, and that t is uniform."""
    x_t, t = result[0].double(), result[1].double()
    z = (x_t - SDE.alpha(t) * batches.data(run.last)) / SDE.sigma(t)
    uniform = [abs(float((t**k).mean()) - 1 / (k + 1)) * math.sqrt(len(t)) / 0.3 for k in (1, 2)]
    check("the uniform distribution of t", max(uniform), 6.0)
    return check_normals("the noise", z)
