"""Seeds keep giving the same samples: a few elements of each are compared with stored values.

The values come from the reference in float64: seed 7, 3 samples, 12 rows (11 for Heun), the shipped networks, the
digits without labels. A change that breaks them changes the samples of all users' seeds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import NORMAL_ERROR
from torch import Tensor

import fastsde
from fastsde import checkpoints, noise, solvers

# The bound is twice plain PyTorch's own error. In TF32 that says nothing about the other backends: in their layout of
# the weights, cuDNN may take other layers in TF32.
pytestmark = pytest.mark.usefixtures("full_fp32")

ELEMENTS = {"swiss-roll": [0, 1], "mnist": [200, 406, 500]}  # of each sample, flat
SHAPES = {"swiss-roll": (3, 2), "mnist": (3, 1, 28, 28)}
DIGESTS = {
    ("swiss-roll", "euler_maruyama"): (
        (1.050142, 0.053408228),
        (1.0982844, -0.16172147),
        (0.76136038, -0.74321881),
    ),
    ("swiss-roll", "exponential_euler_maruyama"): (
        (0.62302168, 0.0091914751),
        (1.0596258, -0.3698283),
        (0.72940734, -0.43176223),
    ),
    ("swiss-roll", "heun"): (
        (0.83990552, -0.9823496),
        (0.19469606, -0.22238114),
        (-0.44823159, 0.18727053),
    ),
    ("swiss-roll", "ddpm"): (
        (0.33047433, -0.23495205),
        (0.70139622, -0.57797417),
        (0.64597203, 0.19678319),
    ),
    ("swiss-roll", "ddim"): (
        (0.75451406, -0.88801419),
        (0.31602116, -0.30458117),
        (-0.55093422, 0.31235129),
    ),
    ("swiss-roll", "dpm_solver_pp_2m"): (
        (0.7691266, -0.90711148),
        (0.30691649, -0.33250005),
        (-0.67333549, 0.31710204),
    ),
    ("mnist", "euler_maruyama"): (
        (-1.0253839, -0.90260414, -1.3534289),
        (0.27364642, -0.88706689, -0.95743588),
        (-1.1093106, -0.44027774, -0.16930749),
    ),
    ("mnist", "exponential_euler_maruyama"): (
        (-0.7208056, -0.81607329, -0.97025365),
        (-0.50286599, -0.74076876, -1.2484937),
        (-1.0397021, -0.4925781, -0.14196128),
    ),
    ("mnist", "heun"): (
        (-1.2127903, 1.144941, -1.0306102),
        (-1.0400354, 0.7643248, -1.0159239),
        (-0.97074882, 0.93293246, -1.2015671),
    ),
    ("mnist", "ddpm"): (
        (-0.99977856, -0.60680596, -1.0005101),
        (-0.99893942, -0.99755626, -1.0028361),
        (-1.0011349, -0.12605784, -0.99952948),
    ),
    ("mnist", "ddim"): (
        (-0.99885241, 1.0150395, -0.99850647),
        (-1.0008147, -0.064319269, -0.9989268),
        (-1.001941, 0.82917908, -1.003251),
    ),
    ("mnist", "dpm_solver_pp_2m"): (
        (-0.99881044, 1.0199539, -0.99846933),
        (-1.0005168, 0.18029087, -1.0021384),
        (-1.0020323, 0.89434508, -1.0029569),
    ),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("network", "solver"),
    [pytest.param(*each, marks=[pytest.mark.slow] if each[0] == "mnist" else []) for each in DIGESTS],
)
def test_seeds_give_the_samples_that_they_gave(network: str, solver: str, device: str) -> None:
    check(network, solver, device, "eager", "auto")


@pytest.mark.slow
@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("solver", [solver for network, solver in DIGESTS if network == "swiss-roll"])
def test_graphs_do_as_well(solver: str) -> None:
    check("swiss-roll", solver, torch.get_default_device().type, "graph")


def check(network: str, solver: str, device: str, *backends: str) -> None:
    here, steps = checkpoints.load(network), 11 if solver == "heun" else 12
    table = solvers.build(solver, here.sde, steps, prediction=here.prediction)
    model, stored = here.model.to(device), torch.tensor(DIGESTS[network, solver], dtype=torch.float64, device="cpu")

    def elements(backend: str, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        options |= {"solver": table, "seed": 7, "device": device, "backend": backend, "dtype": dtype}
        x = fastsde.sample(model, shape, **options)
        return x.flatten(1)[:, ELEMENTS[network]].double().cpu()

    def moved(row: int, x: Tensor) -> Tensor:
        """The normals of a row, each off by the largest difference that the contract allows."""
        generator = torch.Generator("cpu").manual_seed(row)
        signs = torch.randint(2, shape, generator=generator, device="cpu").to(x) * 2 - 1
        return noise.normal(keys, row + 1, shape[1:]) + NORMAL_ERROR * signs

    shape, keys = SHAPES[network], noise.sample_keys(7, 3, device=device)
    exact = elements("reference", torch.float64)
    # How much these samples change if normals differ, as they do between machines; and 8 digits are stored.
    x_init = moved(-1, torch.empty(0, dtype=torch.float64, device=device))
    away = elements("reference", torch.float64, x_init=x_init, noise=moved if table.d.any() else None)
    normals = 4 * float((away - exact).abs().max()) + 1e-7
    assert (exact - stored).abs().max() <= normals
    # As in `fastsde.verify`: twice plain PyTorch's own error, and one rounding of the state per row.
    own = float((elements("reference") - stored).abs().max())
    allowed = 2 * own + normals + steps * 2**-24 * float(stored.abs().max())
    for backend in backends:
        assert (elements(backend) - stored).abs().max() <= allowed, backend
