"""The fused step of random tables of slots against float64, within the rounding of its operations (tests/tables.py)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from tables import Near, exact, guided, input_near, network, random_table, states_near, step_near
from tolerances import NORMAL_ERROR
from torch import Tensor

from fastsde import VPSDE, noise, ops, reference, solvers
from fastsde.kernels import status
from fastsde.solvers import StepTable, Terms

pytestmark = pytest.mark.usefixtures("poisoned")

NAN = float("nan")
SLOTS = (1, 2, 3, 5, 8)
FEW_SLOTS = [slots if slots in (1, 3) else pytest.param(slots, marks=pytest.mark.slow) for slots in SLOTS]
# Batch and sample shape: single elements, samples that share a tile and fill it exactly or not, several tiles.
SHAPES = [(1, ()), (3, (2,)), (300, (63,)), (3, (1, 28, 28)), (2, (5, 1001))]
SLOW_SHAPES = [(300, (1,)), (2, (2048,)), (3, (1000,))]
GRID = [
    *((slots, *shape) for slots in SLOTS for shape in SHAPES if slots in (1, 3) or shape in SHAPES[:2]),
    *(
        pytest.param(slots, *shape, marks=pytest.mark.slow)
        for slots in SLOTS
        for shape in SHAPES[2:]
        if slots not in (1, 3)
    ),
    *(pytest.param(3, *shape, marks=pytest.mark.slow) for shape in SLOW_SHAPES),
]


@dataclass(frozen=True)
class Options:
    """The arguments of a step besides its table."""

    clip: float | None = None
    dtype: torch.dtype = torch.float32
    guidance: float | None = None
    draws: bool = True  # or z is given


PLAIN = Options()
ALL = Options(0.5, torch.float16, -3)
OPTIONS = (PLAIN, Options(0.5, torch.bfloat16, 2.5, draws=False), ALL, Options(guidance=0.5, draws=False))


@dataclass
class Step:
    """A row and the tensors for it."""

    table: StepTable
    row: int
    slots: list[Tensor]
    f: Tensor
    given: dict[str, Any]  # f_uncond and guidance, z or keys

    @classmethod
    def of(
        cls, table: StepTable, row: int, shape: Sequence[int], device: torch.device, options: Options = PLAIN
    ) -> Step:
        def draw() -> Tensor:
            return torch.randn(*shape, device=device)

        given: dict[str, Any] = {}
        if options.guidance is not None:
            given = {"f_uncond": draw().to(options.dtype), "guidance": options.guidance}
        if table.row(row).has_noise:
            seed = int(torch.randint(2**62, ()))
            given |= {"keys": noise.sample_keys(seed, shape[0], device=device)} if options.draws else {"z": draw()}
        slots = [draw() for _ in range(table.slots)]
        return cls(replace(table, clip=options.clip), row, slots, draw().to(options.dtype), given)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.slots, self.f, *(each for each in self.given.values() if isinstance(each, Tensor))]

    def truth(self) -> list[Near]:
        f, z = exact(self.f), None
        if "f_uncond" in self.given:
            f = guided(f, exact(self.given["f_uncond"]), self.given["guidance"])
        if "z" in self.given:
            z = exact(self.given["z"])
        elif "keys" in self.given:
            z = exact(noise.normal(self.given["keys"], self.row + 1, self.f.shape[1:]), NORMAL_ERROR)
        return step_near([exact(slot) for slot in self.slots], f, self.table, self.row, z)

    def by_op(self) -> tuple[Tensor, ...]:
        return ops.solver_step(self.slots, self.f, self.table, self.row, **self.given)

    def launch(self, out: Sequence[Tensor | None], row: int | None = None, **options: Any) -> int:
        """Launches the kernel, and returns the status of row 0 for a native one."""
        module, x = ops.dispatch.kernel("solver_step", self.f.device), self.slots[0]
        given = {"terms": self.table.terms(self.row), "clip": self.table.clip, **self.given, **options}
        if (w := given.pop("guidance", None)) is not None:
            given["scale"] = x.new_full((len(x),), w)
        row = self.row if row is None else row
        rows = ops.device_table(self.table, x.device)
        found: int = module.solver_step(self.slots, self.f, rows, row, out=out, **given)
        return found


def chosen(slots: Sequence[Any], terms: Terms) -> list[Any]:
    """Returns the slots that are computed, and None for the others."""
    return [slot if i in terms.computed else None for i, slot in enumerate(slots)]


@pytest.mark.usefixtures("tiles_as_on_a_gpu")
@pytest.mark.parametrize(("slots", "batch", "shape"), GRID, ids=str)
def test_a_step_is_the_row_and_touches_nothing_else(
    main_device: torch.device, slots: int, batch: int, shape: tuple[int, ...]
) -> None:
    device, table = main_device, random_table(slots, 8, seed=batch)
    for row in range(2):
        step = Step.of(table, row, (batch, *shape), device, OPTIONS[(slots + batch + 2 * row) % 4])
        terms, n = table.terms(row), step.f.numel()
        # A guard of NaN, a multiple of 16 bytes long, lies on both sides of each output.
        buffers = [torch.full((n + 256,), NAN, device=device) for _ in range(slots + 1)]
        *out, network_input = (buffer[64 : 64 + n].view(batch, *shape) for buffer in buffers)
        before = [each.clone() for each in step.tensors]
        step.launch(chosen(out, terms), network_input=network_input if terms.has_input else None)
        expected = step.truth()
        for slot in range(slots):
            if slot in terms.computed:
                expected[slot].check(out[slot])
            else:
                assert out[slot].isnan().all()
        if terms.has_input:
            input_near(expected, table, row + 1).check(network_input)
        for buffer in buffers:
            assert torch.cat([buffer[:64], buffer[64 + n :]]).isnan().all()
        assert all(torch.equal(*pair) for pair in zip(before, step.tensors, strict=True))
        # In place: each output is the memory of an old slot.
        places = [step.slots[place] for place in terms.places]
        step.launch(chosen(places, terms))
        assert all(torch.equal(places[slot], out[slot]) for slot in terms.computed)
        moved = [(slot, source) for slot, source in enumerate(terms.sources) if source is not None]
        assert all(torch.equal(places[slot], before[source]) for slot, source in moved)


@pytest.mark.slow
@pytest.mark.parametrize("options", [PLAIN, ALL], ids=["plain", "all"])
def test_a_sample_of_more_than_2_16_elements(device: torch.device, options: Options) -> None:
    step = Step.of(random_table(2, seed=1), 0, (1, 2**16 + 17), device, options)
    for ours, expected in zip(step.by_op(), step.truth(), strict=True):
        expected.check(ours)


def test_a_grid_with_its_axes_exchanged(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = importlib.import_module("fastsde.kernels.tile")
    step = Step.of(random_table(3), 0, (3, 4099), triton_device, ALL)
    expected = step.by_op()
    monkeypatch.setattr(tile, "GRID_AXIS_1", 1)  # instead of samples of 2^27 elements
    assert tile.tiling(3, 4099).constants["ROWS_FIRST"] is False
    assert all(torch.equal(*pair) for pair in zip(step.by_op(), expected, strict=True))


def test_the_operation_takes_what_is_not_contiguous(device: torch.device) -> None:
    for slots, options in zip(SLOTS, (*OPTIONS, ALL), strict=True):
        step = Step.of(random_table(slots, seed=2), 0, (4, 6, 5), device, options)
        expected = step.truth()
        step.slots, step.f = [strided(slot) for slot in step.slots], strided(step.f)
        step.given = {name: strided(v) if isinstance(v, Tensor) else v for name, v in step.given.items()}
        assert not any(each.is_contiguous() for each in step.tensors)
        for ours, near in zip(step.by_op(), expected, strict=True):
            near.check(ours)


def strided(value: Tensor) -> Tensor:
    return torch.stack([value, value], dim=-1)[..., 0]


def test_the_operation_takes_any_float(device: torch.device) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        step = Step.of(random_table(3, seed=3), 1, (3, 5), device, Options(0.5, dtype, 2.0, draws=False))
        step.slots = [slot.to(dtype).float() if i else slot for i, slot in enumerate(step.slots)]
        expected = step.truth()
        step.slots[1:] = [slot.to(dtype) for slot in step.slots[1:]]
        for ours, near in zip(step.by_op(), expected, strict=True):
            Near(near.value, 2 * near.error).check(ours.float())  # float64 is rounded to fp32 first


def test_nothing_becomes_nothing(device: torch.device) -> None:
    for shape in ((0,), (0, 5), (3, 0), (0, 2, 3), (2, 0, 3)):
        for ours in Step.of(random_table(3), 0, shape, device, ALL).by_op():
            assert ours.shape == shape
            assert ours.dtype == torch.float32


@pytest.mark.slow
def test_rows_of_every_solver(main_device: torch.device) -> None:
    for solver in (name for name, kind in solvers.REGISTRY.items() if kind.is_affine):
        for prediction in solvers.PREDICTIONS:
            table = solvers.build(solver, VPSDE(), 5, prediction=prediction)
            for row in (0, 2, 3, 4):
                step = Step.of(table, row, (3, 11), main_device)
                for ours, expected in zip(step.by_op(), step.truth(), strict=True):
                    expected.check(ours)


def test_a_row_ignores_what_it_does_not_use(device: torch.device) -> None:
    for slots in SLOTS:
        table = random_table(slots, seed=2)
        table.A[0, :, -1] = table.p[0, -1] = table.q[0] = 0
        table.b[0] = table.d[0] = 0
        step = Step.of(table, 0, (3, 5), device, Options(clip=0.5))
        step.slots[-1] = step.f = step.given["z"] = torch.full((3, 5), NAN, device=device)
        for ours, expected in zip(step.by_op(), step.truth(), strict=True):
            expected.check(ours)


# Trajectories -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", SLOTS)
def test_a_stepper_goes_through_a_table(device: torch.device, slots: int) -> None:
    table, keys = random_table(slots, 7, seed=4, clip=1.5), noise.sample_keys(slots, 5, device=device)
    x = noise.normal(keys, 0, (7,)).contiguous()
    step, states = ops.Stepper(table, x, keys), states_near(table, keys, (7,))
    slots_now, start = [x, *(torch.zeros_like(x) for _ in range(1, slots))], x.clone()
    network_input = reference.network_input(slots_now, table, 0)
    for row in range(len(table)):
        f = network(network_input, torch.full((5,), table.row(row).time, device=device))
        slots_now, network_input = step(row, slots_now, f)
        states[row + 1].check(slots_now[0])
    step.finish()
    assert torch.equal(x, start)


@pytest.mark.parametrize(("batch", "shape"), [(300, (63,)), pytest.param(2, (5000,), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("slots", FEW_SLOTS)
def test_a_counter_walks_the_table(triton_device: torch.device, slots: int, batch: int, shape: tuple[int, ...]) -> None:
    device, rows = triton_device, 4
    table, keys = random_table(slots, rows, seed=5, clip=1.5), noise.sample_keys(1, batch, device=device)
    terms, states = table.terms(), states_near(table, keys, shape)
    module = importlib.import_module("fastsde.kernels.solver_step")
    programs = module.counter_slots(batch, states[0].value[0].numel())
    assert programs > 1
    guarded = torch.zeros(programs + 16, dtype=torch.int64, device=device)
    counter, time = guarded[:programs], torch.full((batch + 16,), NAN, device=device)
    time[:batch] = table.row(0).time
    buffers = [
        noise.normal(keys, 0, shape).contiguous(),
        *(torch.zeros(batch, *shape, device=device) for _ in range(1, slots)),
    ]
    network_input = reference.network_input(buffers, table, 0).clone()
    for row in range(rows):  # the same launch each time, except that the slots swap places
        f = network(network_input, time[:batch])
        places = [buffers[place] for place in terms.places]
        ops.counted_step(
            buffers,
            f,
            ops.device_table(table, device),
            counter,
            terms=terms,
            out=chosen(places, terms),
            network_input=network_input,
            time=time[:batch],
            status=(found := ops.new_status(device)),
            keys=keys if terms.has_noise else None,
            f_uncond=None,
            clip=table.clip,
        )
        buffers = places
        states[row + 1].check(buffers[0])
        assert int(found) == status.FINITE
        assert (counter == row + 1).all()
        assert (time[:batch] == table.row(min(row + 1, rows - 1)).time).all()
    assert not guarded[programs:].any()
    assert time[batch:].isnan().all()


def test_a_row_is_added_to_the_counter(triton_device: torch.device) -> None:
    module = importlib.import_module("fastsde.kernels.solver_step")
    step = Step.of(random_table(1, seed=1), 3, (3, 5), triton_device)
    outputs = [torch.full_like(step.f, NAN) for _ in range(2)]
    counter = torch.full((module.counter_slots(3, 5),), 2, device=triton_device)
    step.launch([outputs[0]], row=1, counter=counter)
    assert (counter == 3).all()
    step.launch([outputs[1]])
    assert torch.equal(*outputs)


# Values that are not finite -----------------------------------------------------------------------------------------


def test_a_clip_does_not_hide_what_is_not_finite(device: torch.device) -> None:
    zero, half = torch.zeros(1, 2, dtype=torch.float64), torch.full((1, 2), 0.5, dtype=torch.float64)
    table = StepTable(time=half[0, :1], A=zero[:, :, None].expand(1, 2, 2), p=half, q=half[0, :1], e=half)
    step = Step.of(table, 0, (1, 4), device, Options(clip=0.5))
    step.f[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for ours, theirs in zip(
        step.by_op(), reference.solver_step(step.slots, step.f, step.table, 0, **step.given), strict=True
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ours.isnan().tolist() == [[True, False, False, False]]  # half of D, clamped if f is infinite


def noted(device: torch.device, spoil: str | None, value: float, shape: tuple[int, ...]) -> int:
    """Returns the status after row 2 of a table, with one value of ``spoil`` that is not finite."""
    table = random_table(3, seed=6)
    table.A[2, 0], table.b[2, 0] = torch.tensor([0.5, -0.5, 0.25], dtype=torch.float64), 0.5
    step = Step.of(table, 2, shape, device, Options(guidance=2.0))
    if spoil is not None:
        spoilt = {"f": step.f, "f_uncond": step.given["f_uncond"], "slot 2": step.slots[2]}[spoil]
        spoilt.view(-1)[-1] = value
    out, status = chosen([torch.full_like(step.f, NAN) for _ in range(3)], table.terms(2)), ops.new_status(device)
    if ops.has_native(device):
        kind = step.launch(out)
        return 2 * 2 + kind if kind < 2 else int(status)
    with np.errstate(invalid="ignore"):  # the interpreter's NumPy warns about inf - inf
        step.launch(out, status=status)
    return int(status)


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "kind"), [("f", 0), ("f_uncond", 0), ("slot 2", 1)])
def test_what_is_not_finite_is_noted_with_its_row(device: torch.device, spoil: str, kind: int) -> None:
    assert status.STATUS_KINDS == ("the network returned", "the state became")
    for shape in ((1, 1), (3, 7), (600, 3), (2, 5000)):
        for value in (torch.nan, torch.inf, -torch.inf):
            assert noted(device, spoil, value, shape) == 2 * 2 + kind
        assert noted(device, None, 0.0, shape) == status.FINITE


def test_the_first_row_that_is_not_finite_stays(triton_device: torch.device) -> None:
    table, status = random_table(1, seed=1), ops.new_status(triton_device)
    for row, is_bad in enumerate([False, False, True, True, False]):
        step = Step.of(table, row, (3, 5), triton_device)
        step.f.fill_(torch.nan if is_bad else 1.0)
        step.launch([torch.empty_like(step.f)], status=status)
    with pytest.raises(reference.NonFiniteError, match=f"the network returned .* row 2, at time {table.time[2]:g}"):
        ops.check_status(status, table)
    ops.check_status(ops.new_status(triton_device), table)
