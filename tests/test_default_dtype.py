"""PyTorch's default dtype is left to the user: tensors that the package creates have the dtype that it names."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trajectories import trajectory

import fastsde
from fastsde import VPSDE, Sampler, checkpoints, data, distributed, noise, ops, plotting, reference, solvers
from fastsde.compat import tutorial
from fastsde.models import MLP, UNet
from fastsde.objective import Objective
from fastsde.verify import verify

DTYPES = [torch.bfloat16, torch.float16, torch.float64]
FEW_DTYPES = [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:])]
SDE = VPSDE()
KEYS = noise.sample_keys(3, 5)
OBJECTIVE = Objective(SDE)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def curved(x: Tensor, t: Tensor) -> Tensor:
    return -x * (0.5 + t.reshape(-1, *[1] * (x.ndim - 1)) / 3) + 0.01 * x.sin()


def guided(x: Tensor, t: Tensor, y: float) -> Tensor:
    return curved(x, t) * y


ROLL, DIGITS, BARE = MLP(2, (8, 8)), UNet(1, 8, (2, 3)), nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2))
WEIGHTS = [each.clone() for each in ROLL.parameters()]
X = torch.linspace(-2, 2, 10).reshape(5, 2)
PIXELS = torch.arange(5 * 64, dtype=torch.uint8).reshape(5, 1, 8, 8)


def perturbed(module: Any) -> list[Tensor]:
    k = ops.coefficients(OBJECTIVE, ops.training_times(OBJECTIVE, KEYS, 3)[0])
    x_in, tau, _ = module.perturb(PIXELS, KEYS, 3, k, scale=1 / 127.5, shift=-1.0)
    loss = module.dsm_loss(curved(x_in, tau), PIXELS, KEYS, 3, k, scale=1 / 127.5, shift=-1.0)
    return [k, x_in, tau, loss]


def torch_noise() -> list[Tensor]:
    torch.manual_seed(0)
    return [tutorial.generate_samples(BARE, 5, noise="torch"), tutorial.calc_loss(BARE, X).detach()]


def solver(name: str) -> fastsde.StepTable:
    return solvers.build(name, SDE, 7, prediction="eps", t_end=0.01)


CALLS: dict[str, Callable[[], Any]] = {
    "noise": lambda: [noise.normal(noise.sample_keys(1, 3), 2, (5,)), noise.uniform(KEYS, 2, (5,), 2)],
    "times": lambda: [SDE.alpha(0.3), SDE.sigma(0.3), SDE.beta(0.3), SDE.diffusion(0.3), SDE.drift(X, 0.3)],
    "prior": lambda: [SDE.prior_sampling((4, 3), seed=1), SDE.prior_logp(X), *SDE.marginal_prob(X, 0.3)],
    "tables": lambda: [getattr(solver(n), c) for n in solvers.SOLVERS for c in ("time", "A", "b", "d")],
    "reference": lambda: perturbed(reference),
    "ops": lambda: [*perturbed(ops), ops.normal(KEYS, 1, (3,)), *ops.solver_step([X], X, solver("ddim"), 1)],
    "mlp_sampler": lambda: trajectory(ROLL, solver("heun"), KEYS, every=3),
    "data": lambda: [data.swiss_roll(20).x, data.digits().x],
    "checkpoints": lambda: list(checkpoints.load("swiss-roll").model.parameters()),
    "sample(name)": lambda: fastsde.sample("swiss-roll", (4, 2), steps=5),
    "generate_samples": lambda: [tutorial.generate_samples(BARE, 5), *torch_noise()],
    "trajectory": lambda: fastsde.sample(ROLL, (5, 2), steps=6, trajectory=2),
    "auto batch": lambda: fastsde.sample(curved, (40, 2), steps=3, max_batch="auto"),
    "guidance": lambda: fastsde.sample(
        guided, (5, 2), steps=4, guidance=1.5, model_kwargs={"y": 1.0}, uncond_kwargs={"y": 0.5}
    ),
    "own noise": lambda: fastsde.sample(curved, (5, 2), steps=4, noise=lambda row, x: torch.full_like(x, row)),
    "float64": lambda: fastsde.sample(curved, (5, 2), steps=4, dtype=torch.float64),
    "bfloat16": lambda: fastsde.sample(curved, (5, 2), steps=4, dtype=torch.bfloat16),
    "distributed": lambda: distributed.sample(Sampler(curved, (2,), steps=3), 10),
    "pictures": lambda: [torch.tensor(np.asarray(plotting.image_grid(PIXELS / 255, (0.0, 1.0))))],
}
for network, shape in ((curved, (2,)), (ROLL, (2,)), (BARE, (2,)), (DIGITS, (1, 8, 8))):
    for backend in ("auto", "reference", "eager"):
        CALLS[f"sample {type(network).__name__} {backend}"] = lambda network=network, shape=shape, backend=backend: [
            fastsde.sample(network, (5, *shape), solver=solver(name), backend=backend) for name in solvers.SOLVERS
        ]


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Tensor]]:
    return {name: [each.clone() for each in tensors(call())] for name, call in CALLS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FEW_DTYPES, ids=str)
def test_no_public_function_depends_on_it(expected: dict[str, list[Tensor]], dtype: torch.dtype) -> None:
    different = []
    with default_dtype(dtype):
        for name, call in CALLS.items():
            for ours, theirs in zip(tensors(call()), expected[name], strict=True):
                if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
                    different.append(name)
    assert not different


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FEW_DTYPES, ids=str)
def test_captured_rows_do_not_depend_on_it(graphs: Any, dtype: torch.dtype) -> None:
    network = MLP(2, (8,))

    def calls() -> list[Tensor]:
        options = {"backend": "graph", "steps": 5}
        return [fastsde.sample(network, (4, 2), solver=name, **options) for name in ("euler_maruyama", "ddim")]

    expected = calls()
    with default_dtype(dtype):
        assert all(map(torch.equal, calls(), expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_verify_does_not_depend_on_it(dtype: torch.dtype, tmp_path: Path) -> None:
    expected = verify("swiss-roll", n=8, steps=4, device="cpu")
    with default_dtype(dtype):
        assert verify("swiss-roll", n=8, steps=4, device="cpu") == expected


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FEW_DTYPES, ids=str)
def test_the_triton_kernels_do_not_depend_on_it(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled where there is a GPU, not interpreted")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.has_triton(torch.device("cpu"))

    roll, unet = copy.deepcopy(ROLL), copy.deepcopy(DIGITS)  # nothing of it is kept for the native kernels

    def calls() -> list[Tensor]:
        options = {"steps": 3, "solver": "dpm_solver_pp_2m", "prediction": "eps"}
        samples = [fastsde.sample(roll, (5, 2), backend=backend, **options) for backend in ("persistent", "eager")]
        return [*samples, *perturbed(ops), fastsde.sample(unet, (2, 1, 8, 8), backend="eager", **options)]

    with np.errstate(all="ignore"):
        expected = calls()
        with default_dtype(dtype):
            assert all(map(torch.equal, calls(), expected))


FACTORIES = {"zeros", "ones", "empty", "full", "linspace", "rand", "randn", "eye"}


@pytest.mark.parametrize("folder", ["fastsde", "kernels"])
def test_every_tensor_that_is_made_names_its_dtype(folder: str) -> None:
    found = []
    for path in sorted((Path(__file__).parent.parent / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            function = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if function.removeprefix("torch.") not in FACTORIES or not function.startswith("torch."):
                continue
            is_device = node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0
            if not is_device and not {"dtype", None} & {keyword.arg for keyword in node.keywords}:
                found.append(f"{path.name}:{node.lineno}")
    assert not found
