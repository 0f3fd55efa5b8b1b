"""Which calls `fastsde.ops` sends to a kernel, and which to the reference."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsde import VPSDE, noise, ops, solvers
from fastsde.objective import Objective

pytest.importorskip("triton")

SDE = VPSDE()
TABLE = solvers.euler_maruyama(SDE, [1.0, 0.5])
K = Objective(SDE, "v").table(torch.tensor([0.1, 0.5, 0.9]))


def _step(x: Tensor, keys: Tensor, f: Tensor | None = None, **options: Any) -> Tensor:
    return ops.solver_step([x], x if f is None else f, TABLE, 0, keys=keys, **options)[0]


def _perturb(x: Tensor, keys: Tensor, **options: Any) -> Tensor:
    return ops.perturb(x, keys, 1, K.to(x.device), **options).x_in


def _loss(x: Tensor, keys: Tensor, f: Tensor | None = None, k: Tensor | None = None, **options: Any) -> Tensor:
    return ops.dsm_loss(x if f is None else f, x, keys, 1, (K if k is None else k).to(x.device), **options)


def _wants_grad(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


@pytest.mark.parametrize(
    ("name", "call", "launches"),
    [
        ("solver_step", lambda x, keys: _step(x, keys), 1),
        ("solver_step", lambda x, keys: _step(x, keys, x.bfloat16()), 1),
        ("solver_step", lambda x, keys: _step(x, keys, z=x.double()), 1),
        ("solver_step", lambda x, keys: _step(x.double(), keys), 0),
        ("solver_step", lambda x, keys: _step(x, keys, _wants_grad(x)), 0),
        ("solver_step", lambda x, keys: _step(x, keys, z=_wants_grad(x)), 0),
        ("solver_step", lambda x, keys: torch.no_grad()(_step)(x, keys, _wants_grad(x)), 1),
        ("perturb", lambda x, keys: _perturb(x, keys), 1),
        ("perturb", lambda x, keys: _perturb(x.byte(), keys, dtype=torch.bfloat16), 1),
        ("perturb", lambda x, keys: _perturb(x, keys, dtype=torch.float64), 0),
        ("perturb", lambda x, keys: _perturb(x.double(), keys), 0),
        ("perturb", lambda x, keys: _perturb(x.half(), keys), 0),
        ("perturb", lambda x, keys: _perturb(x, keys, z=x.double()), 0),
        ("perturb", lambda x, keys: _perturb(_wants_grad(x), keys), 0),
        ("dsm_loss", lambda x, keys: _loss(x, keys), 1),
        ("dsm_loss", lambda x, keys: _loss(x, keys, x.half()), 1),
        ("dsm_loss", lambda x, keys: _loss(x, keys, _wants_grad(x)).backward(), 2),
        ("dsm_loss", lambda x, keys: _loss(x, keys, _wants_grad(x).double()), 0),
        ("dsm_loss", lambda x, keys: _loss(x, keys, z=_wants_grad(x)), 0),
        ("dsm_loss", lambda x, keys: _loss(x, keys, k=K.double()), 0),
        ("dsm_loss", lambda x, keys: torch.no_grad()(_loss)(x, keys, k=_wants_grad(K)), 1),
        ("dsm_loss", lambda x, keys: _loss(x, keys, k=_wants_grad(K)), 0),
    ],
)
def test_calls_go_to_the_kernel_that_takes_them(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, name: str, call: Callable[..., Any], launches: int
) -> None:
    module = ops.dispatch.kernel(name, device)
    launched: list[str] = []

    def spy(launcher: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            launched.append(name)
            return launcher(*args, **options)

        return launch

    monkeypatch.setattr(module, name, spy(getattr(module, name)))
    if launches == 2 and hasattr(module, "loss_and_gradient"):  # in one pass
        monkeypatch.setattr(module, "loss_and_gradient", spy(module.loss_and_gradient))
        launches = 1
    call(torch.randn(3, 5, device=device), noise.sample_keys(0, 3, device=device))
    assert len(launched) == launches


@pytest.mark.parametrize("run", [_step, _perturb, _loss])
def test_a_gradient_that_no_kernel_has_is_that_of_the_reference(device: torch.device, run: Callable[..., Any]) -> None:
    # Gradients of the state and the data: the kernel of the loss computes only that of the network's output.
    x, keys = _wants_grad(torch.randn(3, 5, device=device)), noise.sample_keys(0, 3, device=device)
    run(x, keys).square().sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU takes the reference where there is a GPU")
@pytest.mark.parametrize("native", [True, False])
def test_without_the_interpreter_the_cpu_takes_native_kernels_or_the_reference(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not native:
        monkeypatch.setattr(ops.dispatch, "has_native", lambda device: False)
    module = importlib.import_module("fastsde.kernels.solver_step")
    monkeypatch.setattr(module, "solver_step", lambda *args, **options: pytest.fail("the kernel ran"))
    assert _step(torch.randn(3, 5), noise.sample_keys(0, 3)).isfinite().all()
