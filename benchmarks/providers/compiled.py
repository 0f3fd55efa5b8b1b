"""``torch.compile`` of the whole step, network included, in the mode that makes it fastest.

On a GPU that is ``max-autotune`` with CUDA graphs, but convolutions from ATEN alone: Inductor's own templates gave
wrong 3x3 results in PyTorch 2.11. Of a single kernel a graph would first copy the inputs, so that it has none. On a
CPU it is the default, since neither ``max_autotune`` nor weights as constants (``freezing``) were faster, with channels
last and with normals from ATEN (``fallback_random``): Inductor draws its own one by one there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..suite.case import check
from ..suite.measure import Figures, Run
from ..tasks.elements import check_normals
from ..tasks.recipe import Recipe
from ..tasks.trajectory import Trajectory, dtype_of
from . import lean
from .tutorial import Steps


def compiled(function: Callable[..., Any], device: torch.device, graph: bool = False) -> Callable[..., Any]:
    """For inputs of one size, as one whole: what cannot be compiled raises.

    Args:
        graph: whether a GPU is to replay it as a CUDA graph, whose outputs the next call overwrites.
    """
    options: dict[str, Any] = {"fallback_random": True}
    if device.type == "cuda":
        options = torch._inductor.list_mode_options("max-autotune" if graph else "max-autotune-no-cudagraphs")
        options["max_autotune_conv_backends"] = "ATEN"
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


class Step:
    """One row of any table of `fastsde.solvers`; the row is an input, so that one graph serves all of them."""

    def __init__(self, task: Trajectory, precision: str) -> None:
        self._task, self._precision = task, precision
        self._dtype = dtype_of(precision) or torch.float32
        self._model = copy.deepcopy(task.checkpoint.model).to(self._dtype)
        if task.has_images:
            self._model = self._model.to(memory_format=torch.channels_last)
        table = task.table
        self._has_noise = bool((table.d != 0).any())
        self._has_data = bool((table.c != 0).any() or (table.e != 0).any())
        columns = (table.time, table.a, table.b, table.c, table.d, table.e, table.p, table.q)
        self.rows = torch.stack(columns, dim=1).to(task.device, torch.float32)
        self._fast = compiled(self._step, task.device, graph=True)

    def _step(self, x: Tensor, last: Tensor | None, row: Tensor) -> tuple[Tensor, Tensor | None]:
        t, a, b, c, d, e, p, q = row.unbind()
        inputs = x.to(self._dtype)
        if self._task.has_images:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        f = self._model(inputs, t.expand(len(x)).to(self._dtype)).float()
        x_next, data = a * x + b * f, last
        if self._has_data:
            data = p * x + q * f
            x_next = x_next + e * data + c * last
        return x_next + d * torch.randn_like(x) if self._has_noise else x_next, data

    @torch.no_grad()
    def __call__(self, x: Tensor, last: Tensor | None, row: Tensor) -> tuple[Tensor, Tensor | None]:
        x, data = self._fast(x, last if self._has_data else None, row)
        if self._task.device.type == "cuda":  # the outputs are the graph's own memory
            x, data = x.clone(), None if data is None else data.clone()
        return x, data

    def run(self) -> Tensor:
        """A whole trajectory."""
        with self._task.precision_of_products(self._precision):
            x = torch.randn(self._task.shape, device=self._task.device)
            data = torch.zeros_like(x) if self._has_data else None
            for row in self.rows:
                x, data = self(x, data, row)
        return x

    @torch.no_grad()
    def prove(self) -> Figures:
        """A row in the middle: its noise, and without it at most twice as far from float64 as plain PyTorch is."""
        task = self._task
        x, last = torch.randn((2, *task.shape), device=task.device)
        row = self.rows[len(self.rows) // 2]
        t, a, b, c, d, e, p, q = row.double()
        quiet = row.clone()
        quiet[4] = 0
        with task.precision_of_products(self._precision):
            for _ in range(3):  # the first calls warm up and capture
                found = self(x, last, quiet)[0]
            noisy = self(x, last, row)[0]
            index = torch.linspace(0, task.n - 1, min(task.n, 20)).long().to(task.device)
            some, before = x[index], last[index]
            plain = task.network(self._precision)(some, t.float().expand(len(some)))
        truth = copy.deepcopy(task.checkpoint.model).double()(some.double(), t.expand(len(some)))
        own = float(((b + e * q) * (plain - truth)).square().mean().sqrt())
        right = a * some + b * truth + e * (p * some + q * truth) + c * before
        figures = check("a row", float((found[index] - right).square().mean().sqrt()), 2 * own + 1e-6)
        if self._has_noise:
            check_normals("its noise", (noisy - found).double() / d)
        return figures


def sampling(task: Trajectory, precision: str) -> Run:
    return Step(task, precision).run


def prove(run: Any, x: Tensor) -> Figures:
    """The samples are finite, and a row is right: its noise is compiled, and can be that of nobody else."""
    step: Step = run.__self__
    check("the samples", 0.0 if x.isfinite().all() else math.inf, 0.0)
    return step.prove()


def training(recipe: Recipe) -> Steps:
    """The loss, its gradients and the network as one graph; Adam is fused."""
    fast = compiled(lean.loss, recipe.device, graph=True)

    def loss(network: Callable[..., Tensor], x: Tensor) -> Tensor:
        if recipe.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        value: Tensor = fast(network, x)
        return value

    return lean.training(recipe, loss)
