"""Likelihoods of small networks by the native kernel, against PyTorch's autograd on the same networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from networks import CONDITIONED, LOWERED, tame
from torch import Tensor, nn

import fastsde
from fastsde import NonFiniteError, log_prob, noise, ops
from fastsde.likelihood import native
from fastsde.models import MLP
from fastsde.solvers import AdaptiveODE

pytestmark = pytest.mark.skipif(not ops.has_native(torch.device("cpu")), reason="no native kernels")

# 100 rows of fp32 sums of about 10, with rounding errors of half a unit in the last place each: some 1e-5.
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 3e-5}


@contextmanager
def counted() -> Iterator[list[int]]:
    """Yields a list of the numbers of rows of the launches."""
    rows, launch = list[int](), ops.launch_mlp_sampler

    def run(packed: Any, table: Any, *args: Any, **kwargs: Any) -> Tensor:
        rows.append(len(table))
        return launch(packed, table, *args, **kwargs)

    with mock.patch.object(native.ops, "launch_mlp_sampler", run):
        yield rows


def usual(model: nn.Module, x: Tensor, **how: Any) -> Tensor:
    """Returns the densities by autograd."""
    with mock.patch.object(native, "_numbers", return_value=None):
        return log_prob(model, x, **how)


def network(dim: int = 2, **options: Any) -> MLP:
    torch.manual_seed(0)
    return MLP(dim, (16, 16), **options).requires_grad_(False)


def points(n: int = 5, dim: int = 2) -> Tensor:
    return noise.normal(noise.sample_keys(3, n), 0, (dim,))


@pytest.mark.parametrize("solver", ["rk4", "heun"])
@pytest.mark.parametrize("how", [{"trace": "exact"}, {"trace": "hutchinson", "probes": 2, "seed": 4}])
def test_one_launch_gives_the_densities_of_autograd(solver: str, how: dict[str, Any]) -> None:
    model, x = network(3), points(70, 3)
    given: dict[str, Any] = {"prediction": "eps", "solver": solver, "steps": 23, **how}
    with counted() as rows:
        found = log_prob(model, x, **given)
    assert rows == [23]
    torch.testing.assert_close(found, usual(model, x, **given), **CLOSE)
    torch.testing.assert_close(log_prob(model, x, max_batch=11, **given), found, **CLOSE)
    keys = noise.sample_keys(4, 70)
    how_seeded = {name: value for name, value in given.items() if name != "seed"}
    torch.testing.assert_close(log_prob(model, x[64:], keys=keys[64:], **how_seeded), found[64:], **CLOSE)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_adaptive_steps_are_launches_of_a_row(trace: str) -> None:
    pytest.importorskip("torchode", exc_type=ImportError)
    model, x = network(), points(9)
    given: dict[str, Any] = {"prediction": "v", "solver": AdaptiveODE(1e-5, 1e-5), "trace": trace}
    with counted() as rows:
        found = log_prob(model, x, **given)
    assert len(rows) > 6
    assert set(rows) == {1}
    torch.testing.assert_close(found, usual(model, x, **given), rtol=1e-4, atol=1e-4)  # ten times the tolerance


@pytest.mark.parametrize("process", [fastsde.VESDE(), fastsde.EDM(), fastsde.RectifiedFlow(), fastsde.SubVPSDE()])
def test_other_processes(process: fastsde.sde.Process) -> None:
    given: dict[str, Any] = {"sde": process, "prediction": "x0", "steps": 16}
    with counted() as rows:
        found = log_prob(network(), points(), **given)
    assert rows == [16]
    torch.testing.assert_close(found, usual(network(), points(), **given), **CLOSE)


@pytest.mark.parametrize("solver", ["rk4", AdaptiveODE(1e-5, 1e-5)], ids=["rk4", "adaptive"])
def test_conditions_of_each_sample(solver: str | AdaptiveODE) -> None:
    if isinstance(solver, AdaptiveODE):
        pytest.importorskip("torchode", exc_type=ImportError)
    model, x = network(classes=4, condition=3), points(6)
    given = {"label": torch.tensor([0, 1, 2, 3, 4, 0]), "condition": points(6, 3)}
    how: dict[str, Any] = {"prediction": "eps", "solver": solver}
    with counted() as rows:
        found = log_prob(model, x, model_kwargs=given, **how)
    assert rows
    torch.testing.assert_close(found, usual(model, x, model_kwargs=given, **how), rtol=1e-4, atol=1e-4)
    some = {name: value[4:] for name, value in given.items()}
    torch.testing.assert_close(log_prob(model, x[4:], model_kwargs=some, **how), found[4:], **CLOSE)


def test_changed_weights_are_noticed() -> None:
    model, x = network(), points()
    how: dict[str, Any] = {"prediction": "eps", "steps": 8}
    before = log_prob(model, x, **how)
    with torch.no_grad():
        model.net[0].weight.mul_(1.5)
    after = log_prob(model, x, **how)
    torch.testing.assert_close(after, usual(model, x, **how), **CLOSE)
    assert not torch.allclose(after, before, atol=1e-3)


class Failing(nn.Module):
    """A network that returns NaN above t = 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) * torch.sqrt(0.5 - t)[:, None]


def test_what_is_not_finite_is_reported_with_its_row() -> None:
    with pytest.raises(NonFiniteError, match=r"the network returned NaN or infinity in row \d+, at time 0\.[5-9]"):
        log_prob(Failing(), points(), spacing="uniform", steps=16)


def hooked(model: MLP) -> MLP:
    model.net[0].register_forward_hook(lambda module, args, output: 2 * output)
    return model


class Reads(nn.Module):
    """A network that decides by the state's numbers, which is no program."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = self.layer(x) * (2 if bool(x.sum() > 0) else 1)
        return found


@pytest.mark.parametrize(
    "make", [lambda: network().double(), lambda: hooked(network()), lambda: Reads(), lambda: network(40)]
)
def test_others_run_as_usual(make: Callable[[], nn.Module]) -> None:
    model = make()
    x = points(3, 40 if isinstance(model, MLP) and model.shape == (40,) else 2).to(next(model.parameters()).dtype)
    with counted() as rows:
        log_prob(model, x, prediction="eps", steps=4, trace="exact")
    assert not rows


def test_a_network_raises_its_own_error() -> None:
    with pytest.raises(TypeError, match="label must be None"):
        log_prob(network(), points(), prediction="eps", model_kwargs={"label": torch.zeros(5, dtype=torch.int64)})


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (make, _) in LOWERED.items() if isinstance(make, type)])
def test_networks_as_people_write_them(name: str) -> None:
    make, shape = LOWERED[name]
    torch.manual_seed(0)
    model = tame(make().eval().requires_grad_(False))
    x = noise.normal(noise.sample_keys(1, 7), 0, shape)
    how: dict[str, Any] = {"prediction": "eps", "steps": 12, "trace": "hutchinson"}
    if name == "film":
        how["model_kwargs"] = CONDITIONED["both"]
    with counted() as rows:
        found = log_prob(model, x, **how)
    assert rows == [12]
    torch.testing.assert_close(found, usual(model, x, **how), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_the_shipped_swiss_roll() -> None:
    checkpoint = fastsde.checkpoints.load("swiss-roll")
    x = fastsde.data.swiss_roll(200, seed=1).x
    with counted() as rows:
        found = log_prob(checkpoint, x)
    assert rows == [100]
    precise = fastsde.checkpoints.load("swiss-roll")
    precise.model.double()
    torch.testing.assert_close(found, log_prob(precise, x.double()), rtol=1e-5, atol=1e-4)
