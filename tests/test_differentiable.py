"""Gradients through sampling: by finite differences in float64, and by plain backpropagation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

import fastsde
from fastsde import Sampler, noise, reference, solvers


class Net(nn.Module):
    """A small smooth network with a condition."""

    def __init__(self, dim: int = 3, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(dim + 1, 8, dtype=dtype), nn.Linear(8, dim, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        self.calls += 1
        h = torch.tanh(self.first(torch.cat((x, t[:, None].to(x)), 1)))
        h = self.dropout(h)
        return self.last(h if c is None else h * c[:, None])


def start(n: int = 2, dim: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return noise.normal(noise.sample_keys(1, n), 0, (dim,)).to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["euler_maruyama", "ddim", "dpm_solver_pp_2m"])
def test_gradients_are_those_of_finite_differences(solver: str) -> None:
    model = Net()
    sampler = Sampler(model, (3,), solver=solver, steps=4, prediction="v", differentiable=True)

    def run(x: Tensor, c: Tensor, *weights: Tensor) -> Tensor:
        return sampler(2, x_init=x, model_kwargs={"c": c})

    c = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    assert gradcheck(run, (start().requires_grad_(), c, *model.parameters()))


def test_gradients_through_guidance() -> None:
    sampler = Sampler(Net(), (3,), solver="ddim", steps=3, prediction="v", guidance=2.0, differentiable=True)
    uncond = {"c": torch.zeros(2, dtype=torch.float64)}

    def run(x: Tensor, c: Tensor) -> Tensor:
        return sampler(2, x_init=x, model_kwargs={"c": c}, uncond_kwargs=uncond)

    assert gradcheck(run, (start().requires_grad_(), torch.ones(2, dtype=torch.float64, requires_grad=True)))


def test_gradients_through_states_that_are_kept_or_replaced() -> None:
    sampler = Sampler(Net(), (3,), solver="ddim", steps=4, prediction="v", differentiable=True)

    def run(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return sampler(2, x_init=x, trajectory=2, callback=lambda row, time, x: x * scale)

    assert gradcheck(run, (start().requires_grad_(), torch.tensor(0.9, dtype=torch.float64, requires_grad=True)))


@pytest.mark.parametrize("max_batch", [None, 2])
def test_recomputed_rows_give_the_gradients_of_kept_ones(max_batch: int | None) -> None:
    model, table = Net(dtype=torch.float32), solvers.build("euler_maruyama", fastsde.VPSDE(), 6, prediction="v")
    x = fastsde.sample(
        model, (5, 3), steps=6, prediction="v", seed=4, max_batch=max_batch, differentiable=True, backend="auto"
    )
    ours = torch.autograd.grad(x.square().sum(), list(model.parameters()))
    calls = model.calls
    kept = reference.sample(model, (5, 3), table, noise.sample_keys(4, 5))
    theirs = torch.autograd.grad(kept.square().sum(), list(model.parameters()))
    assert calls == 2 * 6 * (1 if max_batch is None else 3)  # forward, and again in the backward pass
    assert torch.equal(kept, x) or max_batch
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)  # sums over the batch, in another order


def test_dropout_is_the_same_in_both_passes() -> None:
    model = Net(dropout=0.5)
    model.train()
    sampler = Sampler(model, (3,), solver="ddim", steps=3, prediction="v", differentiable=True)
    with pytest.warns(RuntimeWarning, match="Dropout"):  # once
        sampler(1)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return sampler(2, x_init=x)

    assert gradcheck(run, (start().requires_grad_(),))


def test_memory_holds_the_activations_of_one_row() -> None:
    """Of 16 rows, the graph keeps the states and not the hidden layers: at most one tensor of each row's shape."""
    held: list[int] = []
    sampler = Sampler(Net(), (3,), solver="ddim", steps=16, prediction="v", differentiable=True)

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sampler(1000, x_init=start(1000).requires_grad_())
    assert sum(held) <= 2 * 16 * 3000  # a row's activations alone are 1000 (4 + 8 + 8)


def test_without_gradients_wanted_nothing_is_recorded() -> None:
    sampler = Sampler(Net(), (3,), solver="ddim", steps=3, prediction="v", differentiable=True)
    with torch.no_grad():
        assert not sampler(2, x_init=start().requires_grad_()).requires_grad
    assert not Sampler(Net(), (3,), steps=3)(2, x_init=start().requires_grad_()).requires_grad
    assert sampler(2).requires_grad  # to the parameters
    assert sampler.last_backend == "reference"


def test_a_shipped_model_learns_through_its_samples() -> None:
    """Fits x_init to samples at a given place: the loss falls along the gradient."""
    sampler = Sampler("swiss-roll", solver="ddim", steps=5, device="cpu", differentiable=True)
    x = start(8, 2, torch.float32).requires_grad_()
    loss = (sampler(8, x_init=x) - 0.3).square().mean()
    (gradient,) = torch.autograd.grad(loss, x)
    with torch.no_grad():
        moved = (sampler(8, x_init=x - 0.1 * gradient) - 0.3).square().mean()
    assert moved < loss


@pytest.mark.parametrize("backend", ["eager", "graph", "persistent"])
def test_kernels_have_no_gradient(backend: str) -> None:
    with pytest.raises(ValueError, match=rf"backend '{backend}'.*use '"):
        Sampler(Net(dtype=torch.float32), (3,), backend=backend, differentiable=True)


def test_bad_options() -> None:
    with pytest.raises(TypeError, match="differentiable must be True or False, got 1"):
        Sampler(Net(), (3,), differentiable=1)
    with pytest.raises(ValueError, match=r"dtype must be that of the weights with differentiable=True, torch.float64"):
        Sampler(Net(), (3,), dtype=torch.float32, differentiable=True)
    with pytest.raises(ValueError, match="differentiable=True needs a solver with rows"):
        Sampler(Net(), (3,), solver=solvers.AdaptiveODE(), differentiable=True)
    guided = fastsde.ClassifierGuidance(lambda x, t: -x.square().sum(1))
    with pytest.raises(ValueError, match="differentiable=True and classifier guidance exclude each other"):
        Sampler(Net(), (3,), guidance=guided, differentiable=True)
    with pytest.raises(ValueError, match="compile=True and differentiable=True exclude each other"):
        Sampler(Net(dtype=torch.float32), (3,), compile=True, differentiable=True)


class Zero(nn.Module):
    """A network that starts at 0, as the last layer of many does."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 3)
        nn.init.zeros_(self.last.weight), nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"solver": "predictor_corrector"}, {}),
        ({"guidance": fastsde.Guidance(2.0, rescale=0.5)}, {"uncond_kwargs": {}}),
    ],
    ids=["Langevin rows", "rescaled guidance"],
)
def test_an_output_of_zeros_has_a_gradient(options: dict[str, Any], call: dict[str, Any]) -> None:
    model = Zero()
    x = Sampler(model, (3,), steps=4, t_end=0.1, differentiable=True, **options)(2, **call)
    gradients = torch.autograd.grad(x.sum(), list(model.parameters()))
    assert all(torch.isfinite(each).all() for each in gradients)
    assert gradients[1].any()
