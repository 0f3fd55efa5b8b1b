"""Seeds keep giving the same samples: a few elements of each are compared with stored values.

The values come from the reference in float64 at commit d73d728: seed 7, 3 samples, 12 rows (11 for Heun), the shipped
networks. A change that breaks them changes the samples of all users' seeds.
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
        (-0.9830085, -0.71744103, -1.3166803),
        (0.40219629, -0.98014336, -0.95877608),
        (-1.0733512, -1.2791151, -0.33192385),
    ),
    ("mnist", "exponential_euler_maruyama"): (
        (-0.70513796, -0.65151312, -0.98336625),
        (-0.44031012, -0.75497222, -1.2527912),
        (-1.0048481, -1.1291745, -0.27660384),
    ),
    ("mnist", "heun"): (
        (-1.226299, 1.0778732, -1.0260941),
        (-0.98060188, 0.12976935, -1.1317829),
        (-0.96335439, 0.95544016, -1.1957652),
    ),
    ("mnist", "ddpm"): (
        (-0.99496579, -0.74051044, -1.0064628),
        (-0.99037664, -0.99499121, -0.99998175),
        (-0.99314984, -0.0051494588, -1.0042427),
    ),
    ("mnist", "ddim"): (
        (-1.0024488, 0.98790613, -1.0014912),
        (-0.98835203, -0.12607407, -1.0144382),
        (-0.99844045, 0.8023564, -0.99358488),
    ),
    ("mnist", "dpm_solver_pp_2m"): (
        (-1.0024271, 0.98864246, -1.0020371),
        (-0.98720116, 0.0050200634, -1.0156057),
        (-0.99775197, 0.8903552, -0.99091618),
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
