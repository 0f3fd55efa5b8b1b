"""``torch.compile`` of the whole step, including the network, in its fastest mode.

On a GPU this is ``max-autotune`` with CUDA graphs, but with convolutions only from ATEN: Inductor's own templates gave
wrong results for 3x3 convolutions in PyTorch 2.11. Single kernels run without CUDA graphs, which would copy the inputs
first. On a CPU it is the default mode, since neither ``max_autotune`` nor constant weights (``freezing``) were faster,
with channels last and with normals from ATEN (``fallback_random``), since Inductor draws its own one by one there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsde import reference
from fastsde.solvers import ABSENT, ANY, ONE

from ..suite.case import check
from ..suite.measure import Figures, Run
from ..tasks.elements import check_normals
from ..tasks.recipe import Recipe
from ..tasks.trajectory import Trajectory, dtype_of
from . import lean
from .tutorial import Steps


def compiled(function: Callable[..., Any], device: torch.device, graph: bool = False) -> Callable[..., Any]:
    """Compiles a function for inputs of one size as a single graph; raises if a part of it cannot be compiled.

    Args:
        graph: whether a GPU replays it as a CUDA graph, so that the next call overwrites the outputs.
    """
    options: dict[str, Any] = {"fallback_random": True}
    if device.type == "cuda":
        options = torch._inductor.list_mode_options("max-autotune" if graph else "max-autotune-no-cudagraphs")
        options["max_autotune_conv_backends"] = "ATEN"
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


class Step:
    """One row of any table of `fastsde.solvers`. The row is an input, so that all rows share one compiled graph."""

    def __init__(self, task: Trajectory, precision: str) -> None:
        self._task, self._precision = task, precision
        self._dtype = dtype_of(precision) or torch.float32
        self._model = copy.deepcopy(task.checkpoint.model).to(self._dtype)
        if task.has_images:
            self._model = self._model.to(memory_format=torch.channels_last)
        table = task.table
        self._table, self._terms, m = table, table.terms(), table.slots
        self._has_data, self._has_noise = self._terms.has_data, self._terms.has_noise
        self._reads_slot_0 = all(table.row(k).reads_slot_0 for k in range(len(table)))
        self._widths = [1, 1, m, m, m, m, m, *[m] * m]  # time, q, n, p, b, e, d and the rows of A
        self.rows = table.packed.to(task.device, torch.float32)
        self._fast = compiled(self._step, task.device, graph=True)

    def _step(self, slots: list[Tensor], row: Tensor) -> list[Tensor]:
        t, q, n, p, b, e, d, *A = row.split(self._widths)
        terms, x = self._terms, slots[0] if self._reads_slot_0 else _sum(n, slots)
        inputs = x.to(self._dtype)
        if self._task.has_images:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        f = self._model(inputs, t.expand(len(x)).to(self._dtype), **self._task.model_kwargs).float()
        data = z = f
        if self._has_data:
            data = _sum([*p, q[0]], [*slots, f], [*terms.p, terms.q])
            if self._table.clip is not None:
                data = data.clamp(-self._table.clip, self._table.clip)
        if self._has_noise:
            z = torch.randn_like(x)
        values = [*slots, f, data, z]
        return [
            _sum([*A[j], b[j], e[j], d[j]], values, [*terms.A[j], terms.b[j], terms.e[j], terms.d[j]])
            for j in range(terms.slots)
        ]

    @torch.no_grad()
    def __call__(self, slots: list[Tensor], row: Tensor) -> list[Tensor]:
        new: list[Tensor] = self._fast(slots, row)
        # On a GPU the outputs are memory of the CUDA graph.
        return [slot.clone() for slot in new] if self._task.device.type == "cuda" else new

    def run(self) -> Tensor:
        """Runs a whole trajectory."""
        with self._task.precision_of_products(self._precision):
            slots = [torch.randn(self._task.shape, device=self._task.device)]
            slots += [torch.zeros_like(slots[0]) for _ in range(1, self._table.slots)]
            for row in self.rows:
                slots = self(slots, row)
        return slots[0]

    @torch.no_grad()
    def prove(self) -> Figures:
        """Checks a row in the middle: its noise, and that without noise its error is at most twice plain PyTorch's.

        Errors are relative to float64.
        """
        task, k = self._task, len(self.rows) // 2
        slots = list(torch.randn((self._table.slots, *task.shape), device=task.device))
        quiet = self.rows[k].clone()
        quiet.split(self._widths)[6].zero_()
        with task.precision_of_products(self._precision):
            for _ in range(3):  # the first calls warm up and capture the graph
                found = self(slots, quiet)[0]
            noisy = self(slots, self.rows[k])[0]
            index = torch.linspace(0, task.n - 1, min(task.n, 20)).long().to(task.device)
            some = [slot[index] for slot in slots]
            x = reference.network_input(some, self._table, k)
            t, given = self.rows[k, :1].expand(len(x)), task.conditions_of(index)
            plain = replace(task, n=len(x), conditions=lambda _: given).network(self._precision)(x, t)
        some = [slot.double() for slot in some]
        truth = copy.deepcopy(task.checkpoint.model).double()(x.double(), t.double(), **given)
        own, right = (self._without_noise(some, f.double(), k) for f in (plain, truth))
        error = float((own - right).square().mean().sqrt())
        figures = check("a row", float((found[index] - right).square().mean().sqrt()), 2 * error + 1e-6)
        if d := self._table.row(k).d[0]:
            check_normals("the noise of a row", (noisy - found).double() / d)
        return figures

    def _without_noise(self, slots: list[Tensor], f: Tensor, k: int) -> Tensor:
        """Returns slot 0 after row k in float64, with the coefficients rounded as the compiled row reads them."""
        names = ("time", "n", "p", "q", "A", "b", "e", "d")
        row = {name: getattr(self._table, name)[k : k + 1].float().double() for name in names}
        return reference.solver_step(
            slots, f, replace(self._table, snr=None, eps_max=None, **row), 0, z=torch.zeros_like(f)
        )[0]


def _sum(coefficients: Sequence[Tensor], values: Sequence[Tensor], kinds: Sequence[int] | None = None) -> Tensor:
    """Returns the sum of the terms, by their kinds, without those that are zero in all rows."""
    kinds = kinds or [ANY] * len(values)
    used = [
        value if kind == ONE else coefficient * value
        for coefficient, value, kind in zip(coefficients, values, kinds, strict=True)
        if kind != ABSENT
    ]
    return sum(used[1:], used[0]) if used else torch.zeros_like(values[0])


def sampling(task: Trajectory, precision: str) -> Run:
    return Step(task, precision).run


def prove(run: Any, x: Tensor) -> Figures:
    """Checks that the samples are finite and that a row is correct. The compiled noise cannot be replaced for this."""
    step: Step = run.__self__
    check("the samples", 0.0 if x.isfinite().all() else math.inf, 0.0)
    return step.prove()


def training(recipe: Recipe) -> Steps:
    """Returns training steps with the network, the loss and its gradients as one graph, and with fused Adam."""
    fast = compiled(lean.loss, recipe.device, graph=True)

    def loss(network: Callable[..., Tensor], x: Tensor) -> Tensor:
        if recipe.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        value: Tensor = fast(network, x)
        return value

    return lean.training(recipe, loss)
