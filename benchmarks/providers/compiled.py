"""``torch.compile`` of the whole step, network included, in the mode that makes it fastest.

On a GPU that is ``max-autotune`` with CUDA graphs, but convolutions from ATEN alone: Inductor's own templates gave
wrong 3x3 results in PyTorch 2.11. On a CPU it is ``max_autotune`` with the weights as constants (``freezing``) and
normals from ATEN (``fallback_random``), since Inductor draws its own one by one there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..suite.case import check
from ..suite.measure import Run
from ..tasks.recipe import Recipe
from ..tasks.trajectory import Trajectory, dtype_of
from . import lean


def compiled(function: Callable[..., Any], device: torch.device, trains: bool = False) -> Callable[..., Any]:
    """For inputs of one size."""
    if device.type == "cuda":
        options = {**torch._inductor.list_mode_options("max-autotune"), "max_autotune_conv_backends": "ATEN"}
    else:
        options = {"max_autotune": True, "fallback_random": True, "freezing": not trains}
    return torch.compile(function, dynamic=False, options=options)


def sampling(task: Trajectory, precision: str) -> Run:
    """Any table of `fastsde.solvers`; its row is an input, so that one graph serves all of them."""
    dtype = dtype_of(precision) or torch.float32
    model = copy.deepcopy(task.checkpoint.model).to(dtype)
    if task.has_images:
        model = model.to(memory_format=torch.channels_last)
    table = task.table
    has_noise, has_data = bool((table.d != 0).any()), bool((table.c != 0).any() or (table.e != 0).any())
    columns = (table.time, table.a, table.b, table.c, table.d, table.e, table.p, table.q)
    rows = torch.stack(columns, dim=1).to(task.device, torch.float32)

    def step(x: Tensor, last: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        t, a, b, c, d, e, p, q = row.unbind()
        inputs = x.to(dtype)
        if task.has_images:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        f = model(inputs, t.expand(len(x)).to(dtype)).float()
        x_next, data = a * x + b * f, last
        if has_data:
            data = p * x + q * f
            x_next = x_next + e * data + c * last
        return x_next + d * torch.randn_like(x) if has_noise else x_next, data

    fast = compiled(step, task.device)

    def run() -> Tensor:
        with torch.no_grad(), task.precision_of_products(precision):
            x = torch.randn(task.shape, device=task.device)
            data = torch.zeros_like(x)
            for row in rows:
                x, data = fast(x, data, row)
                if task.device.type == "cuda":  # the outputs are the graph's own memory
                    x, data = x.clone(), data.clone() if has_data else data
        return x

    with torch.no_grad(), task.precision_of_products(precision):
        _prove_network(fast, task, precision)
    return run


def _prove_network(fast: Callable[..., tuple[Tensor, Tensor]], task: Trajectory, precision: str) -> None:
    """f beside float64, at most twice as far off as plain PyTorch: a loop shows gross errors alone."""
    x, t = torch.randn(task.shape, device=task.device), torch.rand(1, device=task.device)
    row = torch.zeros(8, device=task.device)
    row[0], row[2] = t, 1  # x' = f
    index = torch.linspace(0, task.n - 1, min(task.n, 20)).long().to(task.device)
    model, some = task.checkpoint.model, x[index]
    truth = copy.deepcopy(model).double()(some.double(), t.double().expand(len(some)))
    own = float((task.network(precision)(some, t.expand(len(some))) - truth).square().mean().sqrt())
    for _ in range(3):  # the first calls warm up and capture
        f = fast(x, torch.zeros_like(x), row)[0].clone()
    check("the compiled network", float((f[index] - truth).square().mean().sqrt()), 2 * own + 1e-6)


def training(recipe: Recipe) -> Run:
    """The loss, its gradients and the network as one graph; Adam is fused."""
    fast = compiled(lean.loss, recipe.device, trains=True)

    def loss(network: Callable[..., Tensor], x: Tensor) -> Tensor:
        if recipe.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        value: Tensor = fast(network, x)
        return value

    return lean.training(recipe, loss)
