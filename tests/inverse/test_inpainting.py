"""Known values put in after each row: a written loop, independent coordinates, and everything around a call."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from gaussian_laws import Law, network
from torch import Tensor

import fastsde
from fastsde import VESDE, VPSDE, Sampler, noise, ops, reference
from fastsde.models import MLP

SDE = VPSDE()
LAW = Law(torch.tensor([0.5, -1.0]).double(), torch.tensor([[1.0, 0.7], [0.7, 0.8]]).double())


def written_loop(
    model: Any, table: fastsde.StepTable, keys: Tensor, mask: Tensor, known: Tensor, t_end: float
) -> Tensor:
    """The rows, and after each the known values with the noise of the next row's time."""
    x = noise.normal(keys, 0, mask.shape[1:]).to(known.dtype)
    slots = (x, *(torch.zeros_like(x) for _ in range(1, table.slots)))
    for row in range(len(table)):
        f = model(slots[0], torch.full((len(x),), float(table.time[row]), dtype=x.dtype))
        slots = reference.solver_step(slots, f, table, row, keys=keys)
        t = float(table.time[row + 1]) if row + 1 < len(table) else t_end
        z = noise.normal(keys, row + 1, mask.shape[1:], stream=4).to(x.dtype)
        level = known if t == 0 else SDE.alpha(t) * known + SDE.sigma(t) * z
        slots = (torch.where(mask, level, slots[0]), *slots[1:])
    return slots[0]


OPTIONS: list[Any] = [
    {"solver": "euler_maruyama"},
    {"solver": "ddpm", "t_end": 0.05},
    {"solver": "ddim", "resamples": 3, "jump": 2},
    {"solver": "dpm_solver_pp_2m"},
    {"solver": "heun", "steps": 9},
    {"solver": "euler_maruyama", "denoise": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_each_row_ends_with_the_known_values(options: dict[str, Any], backend: str) -> None:
    exact = backend == "reference"
    dtype = torch.float64 if exact else torch.float32
    model = network(LAW, SDE, "eps")
    sampler = Sampler(model, (2,), prediction="eps", dtype=dtype, backend=backend, **{"steps": 10, **options})
    mask, known = torch.tensor([True, False]), torch.tensor([1.5, float("nan")])
    x = sampler(5, seed=3, mask=mask, known=known)
    keys = noise.sample_keys(3, 5)
    expected = written_loop(
        model, sampler.table, keys, mask.expand(5, 2), known.to(dtype).expand(5, 2), options.get("t_end", 0.0)
    )
    # In fp32 normals of the kernels differ by 4e-6, and the rounding of D grows by 1 / alpha, 150 at most.
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-12 if exact else 150 * 16 * 2**-24)
    if "t_end" not in options:
        assert torch.equal(x[:, 0], torch.full((5,), 1.5, dtype=dtype))


def test_of_independent_coordinates_the_unknown_ones_are_unchanged() -> None:
    law = Law(LAW.mean, torch.diag(torch.tensor([1.0, 0.3])).double())
    sampler = Sampler(network(law, SDE), (2,), steps=20, backend="reference", dtype=torch.float64)
    mask, known = torch.tensor([False, True]), torch.tensor([0.0, 2.0])
    x = sampler(6, mask=mask, known=known)
    assert torch.equal(x[:, 0], sampler(6)[:, 0])
    assert torch.equal(x[:, 1], torch.full((6,), 2.0).double())


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = MLP(3)
    mask = torch.rand(7, 3, generator=torch.manual_seed(0)) < 0.5
    known = torch.randn(7, 3, generator=torch.manual_seed(1))
    whole = Sampler(model, (3,), steps=8)(7, mask=mask, known=known)
    split = Sampler(model, (3,), steps=8, max_batch=2)(7, mask=mask, known=known)
    last = Sampler(model, (3,), steps=8)(2, first_sample=5, mask=mask[5:], known=known[5:])
    scale = float(whole.abs().max())
    torch.testing.assert_close(split / scale, whole / scale, rtol=0, atol=1e-6)
    torch.testing.assert_close(last / scale, whole[5:] / scale, rtol=0, atol=1e-6)


@pytest.mark.parametrize("plain", [False, True], ids=["kernels", "plain PyTorch"])
def test_states_and_callbacks_have_the_known_values(monkeypatch: pytest.MonkeyPatch, plain: bool) -> None:
    if plain:
        monkeypatch.setattr(ops, "has_kernels", lambda device: False)
    seen: list[Tensor] = []

    def callback(row: int, time: float, x: Tensor) -> None:
        seen.append(x.clone())
        x.add_(1)

    sampler = Sampler(MLP(2), (2,), steps=4, t_end=0.2)
    mask, known = torch.tensor([True, True]), torch.tensor([0.3, -0.4])
    x, states = sampler(3, mask=mask, known=known, trajectory=1, callback=callback)
    assert sampler.last_backend == "eager"
    keys = noise.sample_keys(0, 3)
    for row, time in enumerate([*sampler.table.time[1:].tolist(), 0.2]):
        z = noise.normal(keys, row + 1, (2,), stream=4)
        level = float(SDE.alpha(time)) * known + float(SDE.sigma(time)) * z
        torch.testing.assert_close(seen[row], level, rtol=0, atol=2e-5)
        torch.testing.assert_close(states[row + 1], level + 1, rtol=0, atol=2e-5)
    assert torch.equal(states[-1], x)


@pytest.mark.parametrize("shape", [(1,), (63,), (1000,), (1, 5, 7), ()])
def test_shapes(shape: tuple[int, ...]) -> None:
    sampler = Sampler(lambda x, t: -x, shape, steps=3)
    mask = (torch.arange(torch.Size(shape).numel()) % 2 == 0).reshape(shape)
    known = torch.linspace(-1, 1, 2 * mask.numel())[::2].reshape(shape)
    for n in (0, 1, 4):
        x = sampler(n, mask=mask, known=known)
        assert x.shape == (n, *shape)
        assert torch.equal(x[:, mask], known[mask].expand(n, -1))
    images = known.expand(4, *shape).contiguous().transpose(0, -1).contiguous().transpose(0, -1)  # strided
    assert torch.equal(sampler(4, mask=mask, known=images), x)


def test_known_values_stand_at_the_end_where_sigma_is_not_zero() -> None:
    x = Sampler(lambda x, t: -x, (2,), sde=VESDE(), steps=5)(3, mask=torch.tensor(True), known=torch.tensor([1.0, 2.0]))
    assert torch.equal(x, torch.tensor([1.0, 2.0]).expand(3, 2))


def test_samplers_still_pickle() -> None:
    sampler = pickle.loads(pickle.dumps(Sampler(MLP(2), (2,), steps=4, resamples=2, jump=2)))
    assert sampler(2, mask=torch.tensor([True, False]), known=torch.zeros(2)).shape == (2, 2)


def table_sampler() -> Sampler:
    return Sampler(lambda x, t: -x, (2,), solver=fastsde.solvers.build("ddim", SDE, 3, prediction="eps"))


MASK, KNOWN = torch.tensor([True, False]), torch.zeros(2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask": MASK}, ValueError, "mask and known go together, got only mask"),
        ({"known": KNOWN}, ValueError, "mask and known go together, got only known"),
        ({"mask": MASK.float(), "known": KNOWN}, TypeError, "mask must be bool, .*, got torch.float32"),
        ({"mask": [True, False], "known": KNOWN}, TypeError, "mask must be a tensor, got list"),
        ({"mask": MASK, "known": MASK}, TypeError, "known must be floating-point, got torch.bool"),
        ({"mask": MASK, "known": torch.zeros(3)}, ValueError, r"known must broadcast to \[4, 2\], got shape \[3\]"),
        (
            {"mask": MASK.expand(3, 2), "known": KNOWN},
            ValueError,
            r"mask must broadcast to \[4, 2\], got shape \[3, 2\]",
        ),
        ({"mask": MASK, "known": KNOWN / 0}, ValueError, "known must be finite where mask is True"),
        ({"mask": MASK, "known": KNOWN.to("meta")}, ValueError, "known must be on cpu, got meta"),
    ],
)
def test_bad_known_values_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Sampler(lambda x, t: -x, (2,), steps=3)(4, **arguments)


def test_backends_that_cannot_say_so() -> None:
    with pytest.raises(ValueError, match=r"backend 'persistent' .* does not support mask; use 'eager' or 'reference'"):
        Sampler(MLP(2), (2,), steps=3, backend="persistent")(4, mask=MASK, known=KNOWN)
    with pytest.raises(ValueError, match="mask needs the process and the prediction of each row"):
        table_sampler()(4, mask=MASK, known=KNOWN)
