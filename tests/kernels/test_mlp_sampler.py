"""`mlp_sampler` against the reference: whole trajectories, every activation, width, precision, and kind of table."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tables import random_table
from tolerances import noise_error
from torch import Tensor, nn
from trajectories import packed_for, trajectory

import fastsde
from fastsde import VPSDE, StepTable, checkpoints, noise, ops, reference, solvers
from fastsde.lowering import Instruction, Part, Program, Vectors
from fastsde.models import MLP, ConcatTime
from fastsde.models.activations import ACTIVATIONS, Activation

SDE = VPSDE()
TABLE = solvers.euler_maruyama(SDE, torch.linspace(1, 0, 6))


def _assert_close(ours: Tensor, theirs: Tensor, scale: float = 1.0, table: StepTable = TABLE) -> None:
    """Compares to fp32 accuracy: five rows of some 8 roundings each; the state and its error grow from row to row.

    On a GPU the normals may differ within the tolerance of the noise contract.
    """
    largest = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
    normals = noise_error(table) if torch.cuda.is_available() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5 * 8 * 2**-24 * largest * scale + normals)


def _tame(model: MLP) -> MLP:
    """Returns the model with a last layer so small that it hardly moves the state and does not amplify errors."""
    with torch.no_grad():
        model.net[-1].weight.mul_(0.05)
    return model


def _sizes(device: torch.device) -> tuple[int, int]:
    """Returns batch sizes that a GPU treats as few and as many samples."""
    return 9, 16 * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1) + 1


def _run(model: nn.Module, n: int, device: torch.device, table: StepTable = TABLE, **options: Any) -> Tensor:
    return trajectory(copy.deepcopy(model), table, noise.sample_keys(3, n, device=device), **options)[0].cpu()


def _expected(model: nn.Module, n: int, table: StepTable = TABLE, **options: Any) -> Tensor:
    shape = getattr(model, "shape", (model.net[-1].out_features,))
    with torch.no_grad():
        return reference.sample(model, (n, *shape), table, noise.sample_keys(3, n), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "activation",
    [
        pytest.param(name, marks=[] if name in ("LogSigmoid", "SiLU", "Mish") else [pytest.mark.slow])
        for name in ACTIVATIONS
    ],
)
def test_every_activation(device: torch.device, activation: str) -> None:
    model = _tame(MLP(3, (20, 33), activation))
    for n in _sizes(device):
        _assert_close(_run(model, n, device), _expected(model, n))


def test_an_activation_that_it_does_not_have_is_refused_and_runs_elsewhere(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ACTIVATIONS, "Hardswish", Activation(nn.Hardswish))
    model = _tame(MLP(2, (16,), "Hardswish"))
    expected = _expected(model, 5)
    sampler = fastsde.Sampler(model.to(device), (2,), solver=TABLE, device=device)
    assert sampler.backend in ("graph", "eager")
    _assert_close(sampler(5, seed=3).cpu(), expected)
    why = r"Hardswish \(net.1\): hardswish: a program has no such operation"
    with pytest.raises(ValueError, match=f"'persistent': {why}"):
        fastsde.Sampler(model, (2,), backend="persistent", device=device)


@pytest.mark.parametrize("kind", ["log", "a function without a formula"])
def test_an_instruction_that_it_does_not_have_is_no_identity(
    triton_device: torch.device, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Program((2, 0, 2), (Instruction(kind, 2, 2, Part(0, 0, 2)),), Part(2, 0, 2), 0)
    assert ops.unknown_instruction(program.names, triton_device) == kind
    with pytest.raises(ValueError, match=f"the kernel has no instruction '{kind}'"):
        ops.pack_program(program, triton_device)
    monkeypatch.setattr("fastsde.kernels.mlp_packing._KINDS", (kind,))
    keys = noise.sample_keys(3, 5, device=triton_device)
    vectors = Vectors([], [], *(torch.empty(n, 0, device=triton_device) for n in (5, 5)))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        ops.launch_mlp_sampler(ops.pack_program(program, triton_device), TABLE, keys, vectors=vectors)
    # The compiler names the line of the kernel, and in the causes those of the functions that it calls.
    messages, error = [], caught.value
    while error is not None:
        messages.append(str(error))
        error = error.__cause__
    assert "not one of FUNCTIONS" in messages[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "hidden"),
    [
        *((2, ()), (5, (1,)), (17, (16,)), (2, (64, 64, 64)), (5, (65,)), (2, (8,) * 7), (1, (20, 33)), (4, (65, 7))),
        *(pytest.param(*wide, marks=pytest.mark.slow) for wide in ((16, (64, 64, 64)), (64, (65,)), (64, ()))),
        # Each takes 20 seconds to compile.
        *(pytest.param(*wide, marks=pytest.mark.not_on_cuda) for wide in ((5, (128, 100)), (2, (256, 256)))),
    ],
)
def test_every_kind_of_width_depth_and_dimension(device: torch.device, dim: int, hidden: tuple[int, ...]) -> None:
    model = _tame(MLP(dim, hidden, "SiLU"))
    _assert_close(_run(model, 5, device), _expected(model, 5))


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "hidden"), [(2, (64, 64, 64)), (16, (65,)), (17, (16,)), (2, (8,) * 7)])
def test_many_samples_of_every_kind_of_layer(device: torch.device, dim: int, hidden: tuple[int, ...]) -> None:
    model, n = _tame(MLP(dim, hidden, "LogSigmoid")), _sizes(device)[1]
    _assert_close(_run(model, n, device), _expected(model, n))


@pytest.mark.slow
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 63, 65, 130])
def test_every_number_of_samples_and_nothing_beyond(device: torch.device, n: int) -> None:
    model, kernel = _tame(MLP(2, (16,))), ops.dispatch.kernel("mlp_sampler", device)
    packed, vectors = packed_for(copy.deepcopy(model), TABLE, n, device)
    guarded = torch.full((n + 2, 2), math.nan, device=device)
    keys = noise.sample_keys(3, n, device=device)
    options = {"terms": TABLE.trajectory_terms, "vectors": vectors}
    kernel.mlp_sampler(packed, TABLE.on(device), keys, **options, out=guarded[1 : n + 1])
    assert guarded[0].isnan().all()
    assert guarded[-1].isnan().all()
    _assert_close(guarded[1 : n + 1].cpu(), _expected(model, n))


@pytest.mark.slow
@pytest.mark.parametrize("prediction", [pytest.param("eps", marks=pytest.mark.slow), "v"])
@pytest.mark.parametrize("solver", [name for name, kind in solvers.REGISTRY.items() if kind.is_affine])
def test_every_solver(device: torch.device, solver: str, prediction: str) -> None:
    table = solvers.build(solver, SDE, 5, prediction=prediction)
    model = _tame(MLP(2, (16, 16)))
    scale = 1 + table.A.abs().max().item() * 10  # a row with a bad fit may let a state explode
    expected = _expected(model, 9, table)
    _assert_close(_run(model, 9, device, table), expected, scale, table)


# Tables -------------------------------------------------------------------------------------------------------------


def _assert_as_exact(ours: list[Tensor], model: MLP, n: int, table: StepTable, every: int, **options: Any) -> None:
    """Checks that the error of samples and states is at most twice that of the fp32 reference, plus some rounding."""

    def run(network: MLP, dtype: torch.dtype) -> list[Tensor]:
        start = options.get("x_init")
        states = [noise.normal(noise.sample_keys(3, n), 0, model.shape) if start is None else start]
        keep = lambda row, time, x: states.append(x) if (row + 1) % every == 0 else None  # noqa: E731
        return [_expected(network, n, table, dtype=dtype, after_row=keep, **options), torch.stack(states)]

    exact = run(copy.deepcopy(model).double(), torch.float64)
    rounding = 2**-21 * max(float(right.abs().max()) for right in exact)
    error = noise_error(table) if torch.cuda.is_available() else 0.0
    for mine, theirs, right in zip(ours, run(model, torch.float32), exact, strict=True):
        allowed = 2 * float((theirs - right).abs().max()) + rounding
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=allowed + 2 * error)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 3, *(pytest.param(slots, marks=pytest.mark.slow) for slots in (2, 5, 8))])
def test_tables_of_every_kind_of_coefficient(device: torch.device, slots: int) -> None:
    """Coefficients of ``slots``, noise, D and the network's input are zero, one, moved, or anything."""
    generator = torch.Generator().manual_seed(slots)
    for case in range(4 if device.type == "cpu" else 2):  # each compiles on a GPU
        n, every = _sizes(device)[case % 2], 1 + case
        model = _tame(MLP(1 + 2 * case, (17,), "Tanh"))
        table = random_table(slots, 6, seed=case, clip=0.8 if case % 2 else None)
        x_init = torch.randn(n, *model.shape, generator=generator) if case == 2 else None
        keys, start = noise.sample_keys(3, n, device=device), None if x_init is None else x_init.to(device)
        ours = trajectory(copy.deepcopy(model), table, keys, x_init=start, every=every)
        _assert_as_exact([each.cpu() for each in ours], model, n, table, every, x_init=x_init)


def _table(rows: int, slots: int = 2, **columns: list[tuple[int, ...]]) -> StepTable:
    """Returns a table of zeros except for the given elements (place, value) of each column."""
    shapes = {"A": (rows, slots, slots), "q": (rows,), **dict.fromkeys("npbed", (rows, slots))}
    tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for name, elements in columns.items():
        for *place, value in elements:
            tensors[name][tuple(place)] = value
    return StepTable(torch.linspace(1, 0.1, rows, dtype=torch.float64), **tensors, clip=1.0)


@pytest.mark.parametrize("first", [1.0, 0.5, 0.0])
def test_the_first_row_has_an_input_of_its_own(device: torch.device, first: float) -> None:
    # From row 1 on the network is called with slot 1 only, which is zero before the first row.
    rows = range(1, 4)
    columns = {"n": [(0, 0, first), (0, 1, 0.7), *((row, 1, 1.0) for row in rows)], "b": [(0, 1, 1.0), (3, 0, 1.0)]}
    columns |= {"A": [*((row, 0, 0, 0.5) for row in range(4)), *((row, 1, 1, 0.9) for row in rows)]}
    table, model = _table(4, **columns), _tame(MLP(2, (16,), "Tanh"))
    _assert_close(_run(model, 9, device, table), _expected(model, 9, table), table=table)


def test_what_no_row_reads_is_not_computed() -> None:
    # Slot 0 depends on slot 1, slot 1 on slot 2, and nothing on slot 3, which stores a D that is not used elsewhere.
    columns: dict[str, Any] = {"n": [(0, 0, 1.0), (1, 0, 1.0)], "A": [(1, 0, 1, 0.5), (0, 1, 2, 0.5), (1, 3, 2, 0.5)]}
    columns |= {"b": [(0, 2, 1.0)], "e": [(0, 3, 1.0)], "p": [(0, 0, 1.0)], "d": [(0, 3, 1.0)]}
    terms = _table(2, 4, **columns).trajectory_terms
    assert terms.computed == (0, 1, 2)
    assert not any((terms.has_data, terms.has_noise, *terms.p, *terms.A[3]))


KEEPS = [(row, 0, 0, 1.0) for row in range(4)]
HUGE = (0, 1, 0, 3e38)  # in row 0 slot 1 is such a multiple of slot 0 that it is infinite unless slot 0 is below 2
PASSED = [(0, 1, 0, 1.0), *((row, 1, 1, 1.0) for row in (1, 2, 3))]  # slot 0 to slot 1 in row 0, where it stays
# How later rows use slot 1, and whether its value then matters.
NOT_FINITE = {
    "taken": ({"A": [*KEEPS, HUGE, (1, 1, 1, 1.0), (2, 0, 1, 0.5)]}, True),
    "an input, which Tanh hides": (
        {"A": [*KEEPS, HUGE, (1, 1, 1, 1.0)], "n": [(0, 0, 1.0), (1, 0, 1.0), (2, 1, 1.0), (3, 0, 1.0)]},
        True,
    ),
    "taken, and clipped later": (
        {"A": [HUGE, (0, 0, 0, 1.0), (1, 0, 1, 1.0)], "e": [(2, 0, 1.0), (3, 0, 1.0)], "p": [(2, 0, 1.0), (3, 0, 0.5)]},
        True,
    ),
    "slot 0, which no row reads": (
        {"A": [*PASSED, (1, 0, 1, 0.5), (2, 0, 1, 3e38), (3, 0, 1, 0.5)], "n": [(row, 1, 1.0) for row in range(4)]},
        True,
    ),
    "unused": ({"A": [*KEEPS, HUGE]}, False),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns about the infinities that the test is about
@pytest.mark.parametrize("name", NOT_FINITE)
def test_what_is_not_finite_stays_so_to_the_end_once_it_matters(device: torch.device, name: str) -> None:
    columns, matters = NOT_FINITE[name]
    table, x_init = _table(4, **{"n": [(row, 0, 1.0) for row in range(4)]} | columns), torch.full((3, 2), 0.5)
    x_init[1, 1] = 2.0
    finite = torch.isfinite(_run(_tame(MLP(2, (16,), "Tanh")), 3, device, table, x_init=x_init.to(device)))
    assert finite[0].all()
    assert finite[2].all()
    assert bool(finite[1].all()) is not matters


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("hidden", [(64, 64, 64), (128,)])
def test_lower_precisions_are_as_close_as_their_products(
    triton_device: torch.device, precision: str, hidden: tuple[int, ...]
) -> None:
    model = _tame(MLP(2, hidden))
    for n in _sizes(triton_device):
        error = (_run(model, n, triton_device, precision=precision) - _expected(model, n)).abs().max()
        # Operands of products are rounded to 8 or 11 bits (the interpreter truncates to bf16); |f| is of order 1, and
        # the five rows weight it by beta h, at most 4 each.
        assert error <= 5 * 4 * 4 * {"bf16": 2**-7, "tf32": 2**-10}[precision] * 0.5


def test_what_it_cannot_run_is_refused_where_it_is_launched(triton_device: torch.device) -> None:
    model, keys = MLP(2, (16,)), noise.sample_keys(3, 5, device=triton_device)
    with pytest.raises(ValueError, match="precision must be one of fp32, tf32, bf16, got 'fp16'"):
        trajectory(model, TABLE, keys, precision="fp16")


def test_a_linear_without_bias_and_activations_between(device: torch.device) -> None:
    net = nn.Sequential(nn.Linear(4, 32, bias=False), nn.Tanh(), nn.Linear(32, 3, bias=False))
    with torch.no_grad():
        net[2].weight.mul_(0.05)
    _assert_close(_run(ConcatTime(net), 6, device), _expected(ConcatTime(net), 6))


def test_progress_is_told_of_every_row(device: torch.device) -> None:
    rows: list[int] = []
    _run(_tame(MLP(2, (16,))), 5, device, progress=rows.append)
    assert rows == [len(TABLE)]


@pytest.mark.slow
def test_the_shipped_swiss_roll_over_999_rows(device: torch.device) -> None:
    checkpoint = checkpoints.load("swiss-roll")
    interpreted = device.type == "cpu" and ops.has_triton(device)
    options = {"prediction": checkpoint.prediction, "seed": 5, "steps": 199 if interpreted else 999}
    expected = fastsde.sample(checkpoint.model, (16, 2), backend="reference", **options)
    ours = fastsde.sample(checkpoint.model.to(device), (16, 2), backend="persistent", **options)
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-4)
