"""`mlp_sampler` against the reference: whole trajectories, every activation, width, precision and option."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tolerances import noise_error
from torch import Tensor, nn

import fastsde
from fastsde import VPSDE, StepTable, checkpoints, noise, ops, reference, solvers
from fastsde.models import MLP, ConcatTime
from fastsde.models.activations import ACTIVATIONS, Activation
from fastsde.models.mlp import linear_layers

SDE = VPSDE()
TABLE = solvers.euler_maruyama(SDE, torch.linspace(1, 0, 6))


def _assert_close(ours: Tensor, theirs: Tensor, scale: float = 1.0, table: StepTable = TABLE) -> None:
    """To fp32: five rows, each of some 8 roundings of a state that grows from row to row, and an error with it.

    The normals may be other ones on a GPU, within the noise contract.
    """
    largest = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
    normals = noise_error(table) if torch.cuda.is_available() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5 * 8 * 2**-24 * largest * scale + normals)


def _tame(model: MLP) -> MLP:
    """The model with a last layer so small that it hardly moves the state, and does not amplify an error."""
    with torch.no_grad():
        model.net[-1].weight.mul_(0.05)
    return model


def _kernel(device: torch.device) -> Any:
    return ops.dispatch.kernel("mlp_sampler", device)


def _sizes(device: torch.device) -> tuple[int, int]:
    """Few samples and many, by what a GPU takes for them."""
    return 9, 16 * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1) + 1


def _run(
    model: MLP, n: int, device: torch.device, table: StepTable = TABLE, precision: str = "fp32", **options: Any
) -> Tensor:
    linears, names = linear_layers(model)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layers = [(linear.weight.to(device), linear.bias.to(device)) for linear in linears]
    packed = _kernel(device).Packed(layers, names, dtype)
    out = torch.full((n, math.prod(model.shape)), math.nan, device=device)
    keys = noise.sample_keys(3, n, device=device)
    switches = {"has_noise": "d", "has_history": "c", "uses_data": "e"}
    used = {name: bool((getattr(table, column) != 0).any()) for name, column in switches.items()}
    on_device = ops.device_table(table, device)
    options |= {"clip": table.clip, "precision": precision, **used}
    _kernel(device).mlp_sampler(packed, on_device, keys, out=out, **options)
    return out.cpu()


def _expected(model: MLP, n: int, table: StepTable = TABLE, **options: Any) -> Tensor:
    with torch.no_grad():
        x = reference.sample(model, (n, *model.shape), table, noise.sample_keys(3, n), **options)
    return x.reshape(n, math.prod(model.shape))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(device: torch.device, activation: str) -> None:
    model = _tame(MLP(3, (20, 33), activation))
    for n in _sizes(device):
        _assert_close(_run(model, n, device), _expected(model, n))


def test_an_activation_that_it_does_not_have_is_refused_and_runs_elsewhere(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ACTIVATIONS, "Mish", Activation(nn.Mish))
    model = _tame(MLP(2, (16,), "Mish"))
    expected = _expected(model, 5)
    sampler = fastsde.Sampler(model.to(device), (2,), solver=TABLE, device=device)
    assert sampler.backend in ("graph", "eager")
    _assert_close(sampler(5, seed=3).cpu(), expected)
    with pytest.raises(
        ValueError, match=f"'persistent': its kernel on {device.type} does not implement the activation Mish"
    ):
        fastsde.Sampler(model, (2,), backend="persistent", device=device)
    with pytest.raises(ValueError, match="model has the activation Mish, which the kernel on"):
        ops.mlp_sampler(model, TABLE, noise.sample_keys(3, 5, device=device))
    with pytest.raises(ValueError, match=r"activation must be one .*got 'Mish'"):
        _run(model, 5, device)


def test_an_activation_without_a_formula_is_no_identity(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsde.kernels.mlp_packing.ACTIVATIONS", ("Mish",))
    monkeypatch.setitem(ACTIVATIONS, "Mish", Activation(nn.Mish))
    with pytest.raises(Exception, match="not one of ACTIVATIONS"):
        _run(MLP(2, (16,), "Mish"), 5, triton_device)


def test_progress_is_told_of_every_row(device: torch.device) -> None:
    rows: list[int] = []
    _run(_tame(MLP(2, (16,))), 5, device, progress=rows.append)
    assert rows == [len(TABLE)]


@pytest.mark.parametrize(
    "hidden",
    [
        *((), (1,), (16,), (64, 64, 64), (65,), (8,) * 7),
        # 20 seconds of compilation each.
        *(pytest.param(wide, marks=pytest.mark.not_on_cuda) for wide in ((128, 100), (256, 256))),
    ],
)
@pytest.mark.parametrize("dim", [2, 5, 17, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (1, 4, 16, 64))])
def test_every_width_depth_and_dimension(device: torch.device, dim: int, hidden: tuple[int, ...]) -> None:
    model = _tame(MLP(dim, hidden, "SiLU"))
    _assert_close(_run(model, 5, device), _expected(model, 5))


@pytest.mark.parametrize("hidden", [(16,), (64, 64, 64), (65,), (8,) * 7])
@pytest.mark.parametrize("dim", [2, 16, 17])
def test_many_samples_of_every_kind_of_layer(device: torch.device, dim: int, hidden: tuple[int, ...]) -> None:
    model, n = _tame(MLP(dim, hidden, "LogSigmoid")), _sizes(device)[1]
    _assert_close(_run(model, n, device), _expected(model, n))


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 63, 65, 130])
def test_every_number_of_samples_and_nothing_beyond(device: torch.device, n: int) -> None:
    model = _tame(MLP(2, (16,)))
    linears = [(linear.weight.to(device), linear.bias.to(device)) for linear in (model.net[0], model.net[2])]
    packed = _kernel(device).Packed(linears, ["LogSigmoid"], torch.float32)
    guarded = torch.full((n + 2, 2), math.nan, device=device)
    keys = noise.sample_keys(3, n, device=device)
    _kernel(device).mlp_sampler(packed, ops.device_table(TABLE, device), keys, out=guarded[1 : n + 1])
    assert guarded[0].isnan().all()
    assert guarded[-1].isnan().all()
    _assert_close(guarded[1 : n + 1].cpu(), _expected(model, n))


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_every_solver(device: torch.device, solver: str, prediction: str, clip: float | None) -> None:
    if clip is not None and solver not in ("ddpm", "ddim", "dpm_solver_pp_2m"):
        return
    table = solvers.build(solver, SDE, 5, prediction=prediction, clip=clip)
    model = _tame(MLP(2, (16, 16)))
    scale = 1 + table.a.abs().max().item() * 10  # a row of a bad fit may blow a state up
    expected = _expected(model, 9, table)
    _assert_close(_run(model, 9, device, table), expected, scale, table)


@pytest.mark.parametrize("every", [1, 2, 5, 7])
def test_states_and_an_initial_state(device: torch.device, every: int) -> None:
    model = _tame(MLP(2, (16,)))
    x_init = torch.randn(20, 2)
    states = torch.full((5 // every + 1, 20, 2), math.nan, device=device)
    out = _run(model, 20, device, x_init=x_init.to(device), every=every, states=states)
    expected = [x_init]
    final = _expected(
        model,
        20,
        x_init=x_init,
        after_row=lambda row, time, x: expected.append(x) if (row + 1) % every == 0 else None,
    )
    _assert_close(out, final)
    _assert_close(states.cpu(), torch.stack(expected))


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("hidden", [(64, 64, 64), (128,)])
def test_lower_precisions_are_as_close_as_their_products(
    triton_device: torch.device, precision: str, hidden: tuple[int, ...]
) -> None:
    model = _tame(MLP(2, hidden))
    for n in _sizes(triton_device):
        error = (_run(model, n, triton_device, precision=precision) - _expected(model, n)).abs().max()
        # A product's operands are rounded to 8 or 11 bits (the interpreter truncates to bf16); |f| is of order 1, and
        # the five rows weigh it by beta h, at most 4 each.
        assert error <= 5 * 4 * 4 * {"bf16": 2**-7, "tf32": 2**-10}[precision] * 0.5


def test_a_linear_without_bias_and_activations_between(device: torch.device) -> None:
    net = nn.Sequential(nn.Linear(4, 32, bias=False), nn.Tanh(), nn.Linear(32, 3, bias=False))
    with torch.no_grad():
        net[2].weight.mul_(0.05)
    packed = _kernel(device).Packed([(net[i].weight.to(device), None) for i in (0, 2)], ["Tanh"], torch.float32)
    out = torch.full((6, 3), math.nan, device=device)
    keys = noise.sample_keys(3, 6)
    _kernel(device).mlp_sampler(packed, ops.device_table(TABLE, device), keys.to(device), out=out)
    with torch.no_grad():
        expected = reference.sample(ConcatTime(net), (6, 3), TABLE, keys)
    _assert_close(out.cpu(), expected)


@pytest.mark.slow
def test_the_shipped_swiss_roll_over_999_rows(device: torch.device) -> None:
    checkpoint = checkpoints.load("swiss-roll")
    options = {"prediction": checkpoint.prediction, "seed": 5}
    expected = fastsde.sample(checkpoint.model, (16, 2), backend="reference", **options)
    ours = fastsde.sample(checkpoint.model.to(device), (16, 2), backend="persistent", **options)
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fits", [True, False])
def test_the_operation_takes_the_kernel_where_it_fits(
    device: torch.device, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches, kernel, dim = [], _kernel(device), 2 if fits else ops.mlp_limits(device)[0] + 1
    launch = kernel.mlp_sampler
    monkeypatch.setattr(kernel, "mlp_sampler", lambda *args, **given: launches.append(1) or launch(*args, **given))
    model = _tame(MLP(dim, (16,)))
    expected = _expected(model, 5)
    keys = noise.sample_keys(3, 5, device=device)
    ours, states = ops.mlp_sampler(model.to(device).net, TABLE, keys, every=5)
    assert len(launches) == fits
    _assert_close(ours.cpu(), expected)
    assert torch.equal(states[-1], ours)
