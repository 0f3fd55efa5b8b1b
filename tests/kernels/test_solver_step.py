"""The fused solver step against a float64 evaluation of the row, within the rounding of its operations."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import NORMAL_ERROR
from torch import Tensor

from fastsde import VPSDE, noise, ops, reference, solvers
from fastsde.kernels import status
from fastsde.solvers import StepTable

pytestmark = pytest.mark.usefixtures("poisoned")

SDE = VPSDE()
EPS = 2.0**-24
# Roundings on the longest path, that of e q f: guidance (w, its difference, product and sum), q f and the sum of D (3),
# e D (2), and the other terms that are added to it (4). On the path of D alone: 7.
ROUNDINGS, DATA_ROUNDINGS = 13, 7
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """The terms of a row, and what the step is called with."""

    terms: str
    clip: float | None = None
    guidance: float | None = None
    draws: bool = True  # or z is given
    dtype: torch.dtype = torch.float32

    def table(self, rows: int = 3) -> StepTable:
        columns = {
            name: torch.randn(rows, dtype=torch.float64) * (name in self.terms) for name in StepTable.columns()[1:]
        }
        return StepTable(time=torch.rand(rows, dtype=torch.float64), **columns, clip=self.clip)


CASES = {
    "noise": Case("abd"),
    "noise given": Case("abd", draws=False),
    "no noise": Case("abpq"),
    "history": Case("abcpq"),
    "clip": Case("abdepq", clip=0.5),
    "guidance": Case("abd", guidance=2.5, dtype=torch.bfloat16),
    "everything": Case("abcdepq", clip=1, guidance=-3, dtype=torch.float16),
}
# Batch and shape of a sample: single elements, samples that share a tile and fill one exactly or not, several tiles.
SHAPES = [
    *((1, ()), (3, (2,)), (300, (63,)), (3, (1, 28, 28)), (2, (5, 1001))),
    *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((300, (1,)), (2, (2048,)), (3, (1000,)))),
]


def _inputs(case: Case, shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    def draw(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    inputs: dict[str, Any] = {"x": draw(), "f": draw(case.dtype)}
    if case.guidance is not None:
        inputs |= {"f_uncond": draw(case.dtype), "guidance": case.guidance}
    if "c" in case.terms:
        inputs["history"] = draw()
    if "d" in case.terms:
        keys = noise.sample_keys(int(torch.randint(2**62, ())), shape[0], device=device)
        inputs |= {"keys": keys} if case.draws else {"z": draw()}
    return inputs


def _truth(table: StepTable, row: int, inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """x' and D in float64, and how far an fp32 evaluation may be from each."""
    given = {name: value.double() if _is_float(value) else value for name, value in inputs.items()}
    expected = reference.solver_step(given.pop("x"), given.pop("f"), table, row, **given)
    # The same sum of absolute values: what each rounding is relative to.
    size = {name: value.double().abs() for name, value in inputs.items() if _is_float(value)}
    k = {name: abs(value) for name, value in table.row(row).items()}
    f = size["f"]
    if "f_uncond" in size:
        f = size["f_uncond"] + abs(inputs["guidance"]) * (f + size["f_uncond"])
    z = size.get("z", torch.zeros_like(f))
    if drawn := k["d"] != 0 and "z" not in size:
        z = noise.normal(inputs["keys"], row + 1, f.shape[1:]).double().abs()
    data = k["p"] * size["x"] + k["q"] * f
    x_next = k["a"] * size["x"] + k["b"] * f + k["e"] * data + k["c"] * size.get("history", 0) + k["d"] * z
    bounds = [ROUNDINGS * EPS * x_next + drawn * k["d"] * NORMAL_ERROR, DATA_ROUNDINGS * EPS * data]
    return list(expected), bounds


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _assert_within(ours: Tensor | None, expected: Tensor, bound: Tensor) -> None:
    assert ours is not None
    assert ours.dtype == torch.float32
    assert ours.shape == expected.shape
    excess = (ours.double() - expected).abs() - bound
    assert (excess <= 0).all(), f"{excess.nan_to_num(nan=torch.inf).max():.3g} beyond a bound of {bound.max():.3g}"


def _launch(table: StepTable, row: int, inputs: dict[str, Any], **outputs: Any) -> None:
    x = inputs["x"]
    given = {name: value for name, value in inputs.items() if name not in ("x", "f")}
    uses_data = float(table.e[row]) != 0
    ops.dispatch.kernel("solver_step", x.device).solver_step(
        x,
        inputs["f"],
        ops.device_table(table, x.device),
        row,
        clip=table.clip,
        uses_data=uses_data,
        **given,
        **outputs,
    )


@pytest.mark.usefixtures("tiles_as_on_a_gpu")
@pytest.mark.parametrize(("batch", "shape"), SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_is_the_row_and_touches_nothing_else(
    device: torch.device, case: Case, batch: int, shape: tuple[int, ...]
) -> None:
    table, row = case.table(), int(torch.randint(3, ()))
    inputs = _inputs(case, (batch, *shape), device)
    n = inputs["x"].numel()
    # A guard of NaN, a multiple of 16 bytes long, lies on both sides of each output.
    buffers = [torch.full((n + 256,), NAN, device=device) for _ in range(2)]
    out, data = (buffer[64 : 64 + n].view(batch, *shape) for buffer in buffers)
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    _launch(table, row, inputs, out=out, data=data)
    for ours, expected, bound in zip((out, data), *_truth(table, row, inputs), strict=True):
        _assert_within(ours, expected, bound)
    for buffer in buffers:
        assert torch.cat([buffer[:64], buffer[64 + n :]]).isnan().all()
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
    # In place: the state becomes x', and the history D.
    places = {"out": inputs["x"], "data": inputs.get("history", torch.full_like(out, NAN))}
    _launch(table, row, inputs, **places)
    assert torch.equal(places["out"], out)
    assert torch.equal(places["data"], data)


@pytest.mark.parametrize("case", [CASES["noise"], CASES["everything"]], ids=["noise", "everything"])
def test_a_sample_of_more_than_2_16_elements(device: torch.device, case: Case) -> None:
    table, inputs = case.table(), _inputs(case, (1, 2**16 + 17), device)
    out = torch.full_like(inputs["x"], NAN)
    _launch(table, 2, inputs, out=out)
    expected, bounds = _truth(table, 2, inputs)
    _assert_within(out, expected[0], bounds[0])


@pytest.mark.parametrize("case", [CASES["noise"], CASES["everything"]], ids=["noise", "everything"])
def test_a_grid_with_its_axes_exchanged(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    tile = importlib.import_module("fastsde.kernels.tile")
    table, inputs = case.table(), _inputs(case, (3, 4099), triton_device)
    outputs = [torch.full_like(inputs["x"], NAN) for _ in range(2)]
    _launch(table, 0, inputs, out=outputs[0])
    monkeypatch.setattr(tile, "GRID_AXIS_1", 1)  # instead of samples of 2^27 elements
    assert tile.tiling(3, 4099).constants["ROWS_FIRST"] is False
    _launch(table, 0, inputs, out=outputs[1])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_operation_takes_what_is_not_contiguous(device: torch.device, case: Case) -> None:
    table, inputs = case.table(), _inputs(case, (4, 6, 5), device)
    strided = {
        name: value.flip(0).mT.contiguous().mT.flip(0) if _is_float(value) else value for name, value in inputs.items()
    }
    if "keys" in inputs:
        strided["keys"] = torch.stack([inputs["keys"], inputs["keys"]], dim=-1)[..., 0]
    assert not any(value.is_contiguous() for value in strided.values() if isinstance(value, Tensor))
    x, f = strided.pop("x"), strided.pop("f")
    for ours, expected, bound in zip(
        ops.solver_step(x, f, table, 1, **strided), *_truth(table, 1, inputs), strict=True
    ):
        _assert_within(ours, expected, bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_operation_takes_any_float(device: torch.device, dtype: torch.dtype) -> None:
    case = CASES["everything"]
    table, inputs = case.table(), _inputs(case, (3, 5), device)
    inputs = {name: value.to(dtype) if _is_float(value) and name != "x" else value for name, value in inputs.items()}
    expected, bounds = _truth(table, 0, inputs)
    ours = ops.solver_step(table=table, row=0, **inputs)
    for value, exact, bound in zip(ours, expected, bounds, strict=True):
        _assert_within(value, exact, 2 * bound)  # float64 is rounded to fp32 first


def test_the_fused_step_stores_data_on_demand_and_steps_in_place(device: torch.device) -> None:
    case = CASES["clip"]
    table, inputs = case.table(), _inputs(case, (3, 7), device)
    expected, bounds = _truth(table, 2, inputs)
    x = inputs["x"]
    out, data = ops.fused_step(table=table, row=2, store_data=False, **inputs)
    assert data is None
    _assert_within(out, expected[0], bounds[0])
    in_place, data = ops.fused_step(table=table, row=2, out=x, **inputs)
    assert in_place is x
    assert torch.equal(x, out)
    _assert_within(data, expected[1], bounds[1])


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (0, 2, 3), (2, 0, 3)], ids=str)
def test_nothing_becomes_nothing(device: torch.device, shape: tuple[int, ...]) -> None:
    case = CASES["everything"]
    inputs = _inputs(case, shape, device)
    for ours in ops.solver_step(table=case.table(), row=0, **inputs):
        assert ours.shape == shape
        assert ours.dtype == torch.float32


@pytest.mark.parametrize("prediction", ["score", "eps", "x0", "v"])
@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_rows_of_every_solver(device: torch.device, solver: str, prediction: str) -> None:
    clip = 1.0 if solver in ("ddpm", "ddim", "dpm_solver_pp_2m") else None
    table = solvers.build(solver, SDE, 5, prediction=prediction, clip=clip)
    for row in (0, 2, 3, 4):
        terms = "".join(name for name in "cd" if table.row(row)[name])
        inputs = _inputs(Case(terms, clip), (3, 11), device)
        ours = ops.solver_step(table=table, row=row, **inputs)
        for value, expected, bound in zip(ours, *_truth(table, row, inputs), strict=True):
            _assert_within(value, expected, bound)


def test_a_row_ignores_what_its_table_does_not_use(device: torch.device) -> None:
    # Rows without c or d are compiled without these terms: what is given for them is not even read.
    table, inputs = Case("abpq").table(), _inputs(Case("ab"), (3, 5), device)
    nothing = torch.full((3, 5), NAN, device=device)
    ours = ops.solver_step(table=table, row=0, history=nothing, z=nothing, **inputs)
    for value, expected, bound in zip(ours, *_truth(table, 0, inputs), strict=True):
        _assert_within(value, expected, bound)


def test_a_clip_does_not_hide_what_is_not_finite(device: torch.device) -> None:
    case = CASES["clip"]
    table, inputs = case.table(), _inputs(case, (1, 4), device)
    inputs["f"][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for ours, theirs in zip(
        ops.solver_step(table=table, row=0, **inputs), reference.solver_step(table=table, row=0, **inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ours.isnan().tolist() == [[True, False, False, False]]  # D, clamped to the clip where f is infinite


@pytest.mark.parametrize(("batch", "shape"), [(300, (63,)), pytest.param(2, (5000,), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("case", [CASES["noise"], CASES["everything"]], ids=["noise", "everything"])
def test_a_counter_walks_the_table(triton_device: torch.device, case: Case, batch: int, shape: tuple[int, ...]) -> None:
    rows, device = 3, triton_device
    kernel = importlib.import_module("fastsde.kernels.solver_step")
    table, inputs = case.table(rows), _inputs(case, (batch, *shape), device)
    slots = kernel.counter_slots(batch, inputs["x"][0].numel())
    assert slots > 1
    guarded = torch.zeros(slots + 16, dtype=torch.int64, device=device)
    counter, time = guarded[:slots], torch.full((batch + 16,), NAN, device=device)
    by_number = dict(inputs)
    inputs |= {name: inputs[name].clone() for name in ("x", "history") if name in inputs}
    for row in range(rows):
        # The very same call each time, as a captured graph makes it: state and history change in place.
        places = {"out": inputs["x"], "data": inputs.get("history")}
        _launch(table, 0, inputs, counter=counter, time=time[:batch], **places)
        x, history = (torch.full_like(inputs["x"], NAN) for _ in range(2))
        _launch(table, row, by_number, out=x, data=history)
        by_number |= {"x": x} | ({"history": history} if "history" in inputs else {})
        assert torch.equal(inputs["x"], x)
        assert (counter == row + 1).all()
        assert (time[:batch] == table.time[min(row + 1, rows - 1)].float().item()).all()
    assert not x.isnan().any()
    assert not guarded[slots:].any()
    assert time[batch:].isnan().all()


def test_a_row_is_added_to_the_counter(triton_device: torch.device) -> None:
    kernel = importlib.import_module("fastsde.kernels.solver_step")
    case, device = CASES["noise"], triton_device
    table, inputs = case.table(5), _inputs(case, (3, 5), device)
    outputs = [torch.full_like(inputs["x"], NAN) for _ in range(2)]
    counter = torch.full((kernel.counter_slots(3, 5),), 2, device=device)
    _launch(table, 1, inputs, counter=counter, out=outputs[0])
    assert (counter == 3).all()
    _launch(table, 3, inputs, out=outputs[1])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("steps", [20])
@pytest.mark.parametrize("solver", ["euler_maruyama", "dpm_solver_pp_2m"])
def test_a_trajectory_of_fused_steps_is_the_sample(device: torch.device, solver: str, steps: int) -> None:
    # On N(0, 1) data the score is -x at all times: rounding neither grows nor cancels.
    table, keys = solvers.build(solver, SDE, steps), noise.sample_keys(3, 5, device=device)
    x, history = noise.normal(keys, 0, (7,)), None
    for row in range(steps):
        x, history = ops.fused_step(x, -x, table, row, history=history, keys=keys)
    expected = reference.sample(lambda x, t: -x, (5, 7), table, keys, dtype=torch.float64)
    per_row = 4 * EPS * ROUNDINGS + NORMAL_ERROR * float(table.d.max())
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=steps * 4 * per_row)


# What is not finite -------------------------------------------------------------------------------------------------


def _status(device: torch.device, case: Case, spoil: str | None, value: float, shape: tuple[int, ...]) -> int:
    """The status after row 2 of a table, with one value of ``spoil`` that is not finite."""
    table, inputs = case.table(5), _inputs(case, shape, device)
    if spoil is not None:
        inputs[spoil].view(-1)[-1] = value
    status = ops.new_status(device)
    with np.errstate(invalid="ignore"):  # the interpreter's NumPy warns of inf - inf
        _launch(table, 2, inputs, out=torch.full_like(inputs["x"], NAN), status=status)
    return int(status)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), pytest.param((2, 5000), marks=pytest.mark.slow), (600, 3)], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, pytest.param(-torch.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("spoil", "kind"), [("f", 0), ("f_uncond", 0), ("x", 1), ("history", 1)])
def test_what_is_not_finite_is_noted_with_its_row(
    device: torch.device, spoil: str, kind: int, value: float, shape: tuple[int, ...]
) -> None:
    case = Case("abcd", guidance=2.0)
    assert _status(device, case, spoil, value, shape) == 2 * 2 + kind
    assert status.STATUS_KINDS[kind] == ("the network returned", "the state became")[kind]
    assert _status(device, case, None, 0.0, shape) == status.FINITE


def test_the_first_row_that_is_not_finite_stays(device: torch.device) -> None:
    case, status = CASES["noise"], ops.new_status(device)
    table, inputs = case.table(5), _inputs(case, (3, 5), device)
    bad = inputs | {"f": torch.full_like(inputs["f"], torch.nan)}
    for row, given in enumerate([inputs, inputs, bad, bad, inputs]):
        _launch(table, row, given, out=torch.empty_like(inputs["x"]), status=status)
    with pytest.raises(reference.NonFiniteError, match=f"the network returned .* row 2, at time {table.time[2]:g}"):
        ops.check_status(status, table)
    ops.check_status(ops.new_status(device), table)
