"""The networks by name: always the same, tame, of the sizes that they promise, and verified like any other."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastsde
from fastsde import engines, lowering
from fastsde.benchmarks.tasks.networks import DDPM_FLOP, film_work, residual_work
from fastsde.networks import NETWORKS, DDPMUNet, FiLM, Named
from fastsde.request import Request
from fastsde.verify import verify

MLPS = ("residual", "film")


def test_a_network_by_name_is_always_the_same_and_leaves_pytorchs_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second = (NETWORKS["film"].load().model.state_dict() for _ in range(2))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(NETWORKS["film"].conditions(4)["c"][:2], NETWORKS["film"].conditions(2)["c"])
    assert NETWORKS["residual"].conditions(4) == {}


@pytest.mark.parametrize("name", MLPS)
def test_samples_stay_near_a_standard_normal_and_show_what_the_network_does(name: str) -> None:
    named = NETWORKS[name]
    options: dict[str, Any] = {"prediction": "v", "steps": 60, "model_kwargs": named.conditions(200)}
    shape = (200, *named.shape)
    x = fastsde.sample(named.load().model, shape, **options)
    without = fastsde.sample(lambda x, t, **given: 0 * x, shape, **options)
    assert 0.8 < float(x.std()) < 1.5
    assert float((x - without).square().mean().sqrt()) > 0.03  # thousands of times of what verify allows


@pytest.mark.parametrize("name", MLPS)
def test_its_least_arithmetic_is_what_pytorch_counts_without_what_is_known_before(name: str) -> None:
    named, n, width = NETWORKS[name], 4, 128
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        named.load().model(torch.randn(n, *named.shape), torch.rand(n), **named.conditions(n))
    ahead = 2 * width * width if name == "residual" else 2 * width * (2 * width + 2)
    work = {"residual": residual_work, "film": film_work}[name]()
    assert work[0] == counter.get_total_flops() / n - ahead


@pytest.mark.parametrize("name", MLPS)
def test_the_mlps_are_lowered(name: str) -> None:
    named = NETWORKS[name]
    given = tuple(named.conditions(2).values())
    program = lowering.lower(named.load().model, named.shape, torch.linspace(1, 0, 3), given).program
    assert "linear" in program.names
    assert ("layer_norm" in program.names) == (name == "film")


@pytest.mark.filterwarnings("ignore")  # from diffusers
def test_the_u_net_has_its_size_and_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", None)
        with pytest.raises(ImportError, match=r"pip install 'fastsde\[diffusers\]'$"):
            NETWORKS["ddpm-unet"].load()
    pytest.importorskip("diffusers", exc_type=ImportError)
    named = NETWORKS["ddpm-unet"]
    model = named.load().model
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6, 1) == 6.5
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert model(torch.randn(1, *named.shape), torch.rand(1)).shape == (1, *named.shape)
    assert 0.9 < DDPM_FLOP / counter.get_total_flops() < 1
    small = Named(lambda: DDPMUNet((32, 32), 1, 8), (3, 8, 8)).load()
    results = verify(small, steps=2, dtypes=[torch.float32], n=1, device="cpu")
    assert [each.verdict for each in results if each.backend == "eager"] == ["pass"]


@pytest.mark.parametrize("name", MLPS)
def test_verify_knows_them_by_name(name: str) -> None:
    results = {(each.backend, each.dtype): each for each in verify(name, steps=6, n=9, device="cpu")}
    assert results["eager", "float32"].verdict == results["eager", "bfloat16"].verdict == "pass"
    persistent = results["persistent", "float32"]
    assert persistent.verdict == "pass" or "compiler" in str(persistent.reason)


def test_a_wrong_condition_of_a_network_by_name_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = engines.get("eager")

    def engine(network: Any, request: Request) -> torch.Tensor:
        moved = {name: value.roll(1, 0) for name, value in request.model_kwargs.items()}
        return right(network, replace(request, model_kwargs=moved))

    monkeypatch.setitem(engines._ENGINES, "eager", engine)
    results = verify("film", steps=6, n=5, device="cpu", dtypes=[torch.float32])
    assert [each.verdict for each in results if each.backend == "eager"] == ["fail"]


def test_conditions_of_ones_own_take_the_place_of_the_networks() -> None:
    given = {"c": torch.zeros(3, 2)}
    results = verify("film", steps=2, model_kwargs=given, device="cpu", dtypes=[torch.float32])
    assert {each.verdict for each in results} <= {"truth", "yardstick", "pass", "unavailable"}
    with pytest.raises(ValueError, match="device 'gpu' cannot be used"):
        verify("film", device="gpu")
    with pytest.raises(ValueError, match="n must be at least 1"):
        verify("film", n=0, device="cpu")
    assert FiLM().shape == NETWORKS["film"].shape
