"""Calls from functions compiled with torch.compile give the same results as from the plain functions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsde
from fastsde import VPSDE, Sampler, noise, ops, solvers
from fastsde.compat.tutorial import calc_loss, generate_samples
from fastsde.dynamo import untraced
from fastsde.models import MLP
from fastsde.objective import Objective

KEYS = noise.sample_keys(0, 4)
OBJECTIVE = Objective()
K = OBJECTIVE.table(torch.linspace(0.1, 0.9, 4))
X, F = torch.linspace(-1, 1, 8).reshape(4, 2), torch.linspace(1, 2, 8).reshape(4, 2)
TABLES = [solvers.build(name, VPSDE(), 5, prediction="eps") for name in ("ddpm", "euler_maruyama", "ddim")]
SEQUENTIAL = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


class Convolution(nn.Module):
    """A small network for images that no native kernel runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) * t[:, None, None, None]


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def both(function: Callable[..., Any], *arguments: tuple[Any, ...], backend: str = "eager") -> None:
    """Compares a function and its compiled form for several arguments in turn."""
    compiled = torch.compile(function, backend=backend)
    for given in arguments:
        torch.testing.assert_close(compiled(*given), function(*given), rtol=1e-6, atol=1e-6)


SAMPLERS = {"mlp": Sampler(MLP(), (2,), steps=5), "convolution": Sampler(Convolution(), (1, 4, 4), steps=5)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_called_as_it_is(name: str) -> None:
    sampler = SAMPLERS[name]
    both(lambda seed: sampler(4, seed=seed), *((seed,) for seed in range(10)))
    both(lambda: sampler(3, trajectory=2)[1] * 2, ())

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (sampler(4) * 2).sum() + torch.sin(x)

    both(Model(), (X,))


def function(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x)


@pytest.mark.slow
@pytest.mark.parametrize("model", [MLP(), Convolution(), function], ids=["mlp", "convolution", "function"])
def test_sample_and_a_sampler_that_is_built_there(model: Any) -> None:
    shape = (4, 1, 4, 4) if isinstance(model, Convolution) else (4, 2)
    both(lambda seed: fastsde.sample(model, shape, steps=5, seed=seed) + 1, (0,), (1,), (2,))
    both(lambda seed: Sampler(model, shape[1:], steps=5)(4, seed=seed), (0,), (1,))


@pytest.mark.slow
def test_steps_are_of_the_table_and_row_that_they_are_given() -> None:
    """Compiled code treats coefficients as constants, which must not be used for another table of the same shape."""
    for backend in ("eager", "inductor"):
        step = lambda table, row: ops.solver_step([X], F, table, row, keys=KEYS)  # noqa: E731
        both(step, *((table, row) for table in TABLES for row in (0, 1)), backend=backend)
    both(lambda table: ops.solver_step([X.double()], F, table, 1, keys=KEYS), *((table,) for table in TABLES))


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        lambda step: ops.normal(KEYS, step, (3,)),
        lambda step: ops.perturb(X, KEYS, step, K),
        lambda step: ops.dsm_loss(F, X, KEYS, step, K),
        lambda step: ops.coefficients(OBJECTIVE, ops.training_times(OBJECTIVE, KEYS, step)),
        lambda step: noise.normal(KEYS, step, (3,)),
        lambda step: noise.uniform(KEYS, step, (3,), stream=9),
        lambda seed: noise.sample_keys(seed, 4),
    ],
    ids=["normal", "perturb", "dsm_loss", "coefficients", "noise.normal", "noise.uniform", "sample_keys"],
)
def test_noise_and_training_of_a_step_that_varies(function: Callable[[int], Any]) -> None:
    """An int that varies becomes symbolic."""
    both(function, (1,), (2,), (3,), backend="inductor")


@pytest.mark.slow
def test_the_loss_has_its_gradient() -> None:
    def gradient(f: Tensor) -> tuple[Tensor, Tensor]:
        f = f.clone().requires_grad_()
        loss = of_output(f)
        loss.backward()
        return loss.detach(), f.grad

    def loss(f: Tensor) -> Tensor:
        return ops.dsm_loss(f, X, KEYS, 3, K) * 2

    of_output = loss
    expected = gradient(F)
    of_output = torch.compile(loss)
    torch.testing.assert_close(gradient(F), expected)


@pytest.mark.slow
def test_the_tutorials_functions_draw_what_torch_draws() -> None:
    def seeded(function: Callable[[], Tensor]) -> Tensor:
        torch.manual_seed(0)
        return function()

    torch.compile(torch.sin)(X)  # the compiler itself uses the generator, too
    sample = lambda: generate_samples(SEQUENTIAL, 3)  # noqa: E731
    torch_sample = lambda: generate_samples(SEQUENTIAL, 3, noise="torch")  # noqa: E731
    loss = lambda: calc_loss(SEQUENTIAL, X)  # noqa: E731
    for function in (sample, torch_sample, loss):
        expected = seeded(function)
        torch.testing.assert_close(seeded(torch.compile(function)), expected, rtol=1e-6, atol=1e-6)
    seeded(torch.compile(loss)).backward()
    gradients = [weight.grad.clone() for weight in SEQUENTIAL.parameters()]
    SEQUENTIAL.zero_grad()
    seeded(loss).backward()
    torch.testing.assert_close(gradients, [weight.grad for weight in SEQUENTIAL.parameters()])


def test_an_untraced_function_is_that_function() -> None:
    seen: list[bool] = []

    @untraced
    def scaled(value: int, *, scale: int = 2) -> int:
        """The docstring."""
        seen.append(torch.compiler.is_compiling())
        return value * scale

    assert (scaled.__name__, scaled.__doc__) == ("scaled", "The docstring.")
    both(lambda x: torch.sin(x) * scaled(3, scale=5) + scaled(1), (X,))
    assert seen == [False] * 4  # twice for each
    with pytest.raises(RuntimeError, match="scaled"):  # what breaks the graph
        torch.compile(lambda x: torch.sin(x) * scaled(3), backend="eager", fullgraph=True)(X)


@pytest.mark.slow
def test_nobody_imports_the_compiler_for_it() -> None:
    script = """
import sys, fastsde
fastsde.sample(lambda x, t: -x, (2, 2), steps=3)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
