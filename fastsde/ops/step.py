"""The step of a solver, and the keys and normals for its initial state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import noise, reference
from ..dynamo import guard_identity
from ..guidance import Weights
from ..kernels.status import FINITE, STATUS_KINDS
from ..reference import non_finite
from ..solvers import StepTable, Terms
from ..validation import check_instance, check_int, check_keys, check_number, check_shape, check_tensor
from . import operators
from .dispatch import contiguous, has_kernels, has_native, is_plain, kernel, needs_grad

__all__ = [
    "Stepper",
    "check_status",
    "counted_step",
    "device_table",
    "langevin_size",
    "new_status",
    "normal",
    "rescale_factor",
    "sample_keys",
    "solver_step",
    "step_counter",
]


def device_table(table: StepTable, device: torch.device) -> Tensor:
    """Returns the table as the kernels read it, fp32 ``[K, 2 + 5 m + m^2]`` on the device; copied once."""
    guard_identity(table)
    return table.on(device)


class Stepper:
    """Takes the steps of one table with the kernel `solver_step`, for fp32 states of one shape.

    The device must have kernels. What stays the same from row to row is prepared once. Arguments are not checked.

    Args:
        table: the table.
        x: a contiguous state that gives the shape and the device.
        keys: int64 ``[B, 2]``.
        guidance: the weights, for rows with an unconditional output.
        threads: how many of the CPU's may work, by default as many as PyTorch would use.
    """

    def __init__(
        self,
        table: StepTable,
        x: Tensor,
        keys: Tensor,
        guidance: Weights | None = None,
        threads: int | None = None,
    ) -> None:
        keys = keys.contiguous()
        self._table, self._keys = table, keys
        self._rescale = 0.0 if guidance is None else guidance.rescale
        self._weights: dict[str, Tensor | None] = {"scale": None, "rates": None, "factor": None}
        if guidance is not None:
            self._weights["scale"] = guidance.scale.contiguous()
            self._weights["rates"] = None if guidance.number is not None else guidance.rates_on(x.device)
            self._weights["factor"] = x.new_empty(len(x)) if guidance.rescale else None
        self._rows = device_table(table, x.device)
        self._langevin = table.langevin.to(x.device, torch.float32) if table.has_langevin else None
        self._sizes = x.new_empty(len(x), 2) if table.has_langevin else None
        self._status = None if has_native(x.device) else new_status(x.device)
        self._at_once = x.device.type == "cpu"
        module = kernel("solver_step", x.device)
        if self._status is None:
            options = {"keys": keys, "clip": table.clip, "threads": threads, **self._weights}
            self._native = module.Steps(self._rows, table.slots, x.shape, **options)
        else:
            self._launch = module.solver_step

    def __call__(
        self,
        row: int,
        slots: Sequence[Tensor],
        f: Tensor,
        f_uncond: Tensor | None = None,
        z: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Takes the step of a row.

        Returns:
            The new slots, in new memory except those that are renamed (slots that no later row reads are not computed,
            the old ones are returned in their place); and the network's input for the next row.

        Raises:
            NonFiniteError: on the CPU, if f or x' is not finite. On a GPU `finish` raises it.
        """
        terms = self._table.terms(row)
        if z is not None:
            z = z.to(torch.float32).contiguous()
        out: list[Tensor | None] = [None] * len(slots)
        new = list(slots)
        for slot, source in terms.moved:
            new[slot] = slots[source]
        for slot in terms.computed:
            new[slot] = out[slot] = torch.empty_like(slots[0])
        network_input = torch.empty_like(slots[0]) if terms.has_input else None
        if f_uncond is not None and self._weights["factor"] is not None:
            f, f_uncond = contiguous(f, f_uncond)
            rescale_factor(f, f_uncond, row, phi=self._rescale, **self._weights)
        sizes = self._sized(row, terms, slots, f, f_uncond, z) if self._langevin is not None else None
        if self._status is None:
            optional = {"z": z, "f_uncond": f_uncond, "sizes": sizes, "network_input": network_input}
            found = self._native(row, terms, slots, f, out=out, **optional)
            if found < len(STATUS_KINDS):
                raise non_finite(STATUS_KINDS[found], row, self._table.row(row).time)
        else:
            self._triton(row, terms, slots, f, f_uncond, z, sizes, out, network_input)
        return new, new[0] if network_input is None else network_input

    def _sized(
        self, row: int, terms: Terms, slots: Sequence[Tensor], f: Tensor, f_uncond: Tensor | None, z: Tensor | None
    ) -> Tensor | None:
        """Returns the sizes of the steps of a Langevin row, or None in other rows."""
        if self._table.row(row).snr == 0:
            return None
        f, f_uncond = contiguous(f, f_uncond)
        given = {"langevin": self._langevin, "terms": terms, "sizes": self._sizes, "z": z, "f_uncond": f_uncond}
        given |= self._weights if f_uncond is not None else {}
        langevin_size(slots, f, self._rows, row, keys=self._keys if z is None else None, **given)
        return self._sizes

    def _triton(
        self,
        row: int,
        terms: Terms,
        slots: Sequence[Tensor],
        f: Tensor,
        f_uncond: Tensor | None,
        z: Tensor | None,
        sizes: Tensor | None,
        out: Sequence[Tensor | None],
        network_input: Tensor | None,
    ) -> None:
        f, f_uncond = contiguous(f, f_uncond)
        self._launch(
            slots,
            f,
            self._rows,
            row,
            terms=terms,
            z=z if terms.has_noise else None,
            keys=self._keys if terms.has_noise and z is None else None,
            f_uncond=f_uncond,
            **(self._weights if f_uncond is not None else {}),
            sizes=sizes,
            clip=self._table.clip,
            status=self._status,
            out=out,
            network_input=network_input,
        )
        if self._at_once:
            self.finish()

    def finish(self) -> None:
        """Raises `NonFiniteError` for the first row with a value that was not finite; waits for a GPU."""
        if self._status is not None:
            check_status(self._status, self._table)


def rescale_factor(f: Tensor, f_uncond: Tensor, row: int, **given: Any) -> None:
    """Writes the factors of guidance that is rescaled, `fastsde.reference.rescale_factor`, to ``factor``.

    Arguments are those of the kernel ``guidance_rescale``; they are not checked.
    """
    kernel("guidance_rescale", f.device).rescale_factor(f, f_uncond, row, **given)


def langevin_size(slots: Sequence[Tensor], f: Tensor, rows: Tensor, row: int, **given: Any) -> None:
    """Writes the sizes of the steps of a Langevin row, `fastsde.reference.langevin_size`, to ``sizes``.

    Arguments are those of the kernel ``langevin_size``; they are not checked.
    """
    kernel("langevin_size", f.device).langevin_size(slots, f, rows, row, **given)


def counted_step(
    slots: Sequence[Tensor],
    f: Tensor,
    rows: Tensor,
    counter: Tensor,
    *,
    terms: Terms,
    out: Sequence[Tensor | None],
    network_input: Tensor | None,
    time: Tensor,
    status: Tensor,
    keys: Tensor | None,
    f_uncond: Tensor | None,
    scale: Tensor | None = None,
    rates: Tensor | None = None,
    factor: Tensor | None = None,
    sizes: Tensor | None = None,
    clip: float | None,
) -> None:
    """Takes the step of the row given by a counter on the device: the same launch for every row of a table.

    Args:
        slots: the state.
        f: the network's output.
        rows: a `device_table`.
        counter: a `step_counter`, advanced by one.
        terms: those of the whole table.
        out: where the new slots that are computed are written; each may be an old slot.
        network_input: where the next row's n.s is written, for tables that call the network with more than slot 0.
        time: fp32 ``[B]``, set to the time of the next row.
        status: a `new_status`.
        keys: None if no row of the table has noise.
        f_uncond: the unconditional output, or None.
        scale: as for the kernel, if there is an ``f_uncond``.
        rates: as for the kernel, if there is an ``f_uncond``.
        factor: as for the kernel, if there is an ``f_uncond``.
        sizes: as for the kernel, for a table with Langevin rows.
        clip: of the table.
    """
    f, f_uncond = contiguous(f, f_uncond)
    kernel("solver_step", f.device).solver_step(
        slots,
        f,
        rows,
        0,
        terms=terms,
        keys=keys,
        f_uncond=f_uncond,
        scale=scale,
        rates=rates,
        factor=factor,
        sizes=sizes,
        clip=clip,
        counter=counter,
        time=time,
        status=status,
        out=out,
        network_input=network_input,
    )


def step_counter(batch: int, size: int, device: torch.device) -> Tensor:
    """Returns a counter for `counted_step` on samples of ``size`` elements, at row 0."""
    return torch.zeros(kernel("solver_step", device).counter_slots(batch, size), dtype=torch.int64, device=device)


def new_status(device: torch.device) -> Tensor:
    """Returns an int32 ``[1]`` in which the step records that the state or the network's output is not finite."""
    return torch.full((1,), FINITE, dtype=torch.int32, device=device)


def check_status(status: Tensor, table: StepTable) -> None:
    """Waits for the device and raises `NonFiniteError` for the first row with a value that was not finite."""
    value = int(status)
    if value != FINITE:
        row, kind = divmod(value, 2)
        raise non_finite(STATUS_KINDS[kind], row, table.row(row).time)


def sample_keys(seed: int, n: int, first_sample: int = 0, *, device: torch.device | str = "cpu") -> Tensor:
    """Runs `fastsde.noise.sample_keys`, in one launch where the kernel runs.

    Raises:
        ValueError, TypeError: for an invalid argument; the message names it, the value given and what was expected.
    """
    device = torch.device(device)
    if not has_kernels(device):
        return noise.sample_keys(seed, n, first_sample, device=device)
    given = (noise.int64_bits("seed", seed), check_int("n", n, 0), noise.int64_bits("first_sample", first_sample))
    if is_plain():  # bypasses torch.library, whose first call imports the compiler
        return operators.launch_sample_keys(*given, device)
    keys: Tensor = torch.ops.fastsde.sample_keys(*given, device)
    return keys


def normal(keys: Tensor, step: int, shape: Sequence[int], stream: int = noise.STREAM_SAMPLING) -> Tensor:
    """Runs `fastsde.noise.normal` for one step, in one launch where the kernel runs.

    Raises:
        ValueError, TypeError: for an invalid argument; the message names it, the value given and what was expected.
    """
    keys = check_keys(keys, len(check_tensor("keys", keys)), keys.device)
    check_int("step", step, 0, 2**28), check_int("stream", stream, 0, 16), check_shape("shape", shape)
    if not has_kernels(keys.device):
        return noise.normal(keys, step, shape, stream)
    if is_plain(keys):  # bypasses torch.library, whose first call imports the compiler
        return operators.launch_normal(keys, step, stream, shape)
    drawn: Tensor = torch.ops.fastsde.normal(keys, step, stream, list(shape))
    return drawn


def solver_step(
    slots: Sequence[Tensor],
    f: Tensor,
    table: StepTable,
    row: int,
    *,
    z: Tensor | None = None,
    keys: Tensor | None = None,
    f_uncond: Tensor | None = None,
    guidance: float | Tensor | None = None,
    rescale: float = 0.0,
) -> tuple[Tensor, ...]:
    """Runs `fastsde.reference.solver_step` for fp32 or float64 slots and f of any floating-point dtype.

    Raises:
        ValueError, TypeError: for an invalid argument; the message names it, the value given and what was expected.
    """
    check_instance("table", table, StepTable)
    if not isinstance(slots, (list, tuple)):
        raise TypeError(f"slots must be a list or tuple of tensors, got {type(slots).__name__}")
    if len(slots) != table.slots:
        raise ValueError(f"slots must be the {table.slots} slots of the table, got {len(slots)}")
    x = check_tensor("slots[0]", slots[0], floating=True)
    if x.ndim < 1 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"slots[0] must be float32 or float64 [B, *shape], got {x.dtype} {list(x.shape)}")
    row = len(range(check_int("row", row, 0, len(table))))  # in compiled code an int may be symbolic, a length is not
    given = {f"slots[{i}]": slot for i, slot in enumerate(slots)} | {"f": f}
    given |= {name: value for name, value in (("z", z), ("f_uncond", f_uncond)) if value is not None}
    for name, value in given.items():
        check_tensor(name, value, shape=x.shape, device=x.device, floating=True)
    guard_identity(table)
    k = table.row(row)
    if z is None and any(k.d):
        if keys is None:
            raise ValueError(f"z or keys must be given for row {row}, which has noise, got neither")
        keys = check_keys(keys, len(x), x.device)
    if (f_uncond is None) != (guidance is None):
        raise ValueError("f_uncond and guidance go together: give both or neither")
    if isinstance(guidance, Tensor):
        guidance = check_tensor("guidance", guidance, shape=(len(x),), device=x.device, floating=True).to(x.dtype)
    elif guidance is not None:
        check_number("guidance", guidance)
    check_number("rescale", rescale, "in [0, 1]", lambda phi: 0 <= phi <= 1)
    slots = [slot.to(x.dtype) for slot in slots]
    z, f_uncond = (None if each is None else each.to(x.dtype) for each in (z, f_uncond))
    w = guidance if isinstance(guidance, Tensor) else None
    if x.dtype == torch.float32 and has_kernels(x.device) and not needs_grad(*slots, f, z, f_uncond, w):
        return _by_kernel(slots, f, table, row, z, keys, f_uncond, guidance, rescale)
    given = {"f_uncond": f_uncond, "guidance": guidance, "rescale": rescale}
    return reference.solver_step(slots, f, table, row, z=z, keys=keys, **given)


def _by_kernel(
    slots: Sequence[Tensor],
    f: Tensor,
    table: StepTable,
    row: int,
    z: Tensor | None,
    keys: Tensor | None,
    f_uncond: Tensor | None,
    guidance: float | Tensor | None,
    rescale: float,
) -> tuple[Tensor, ...]:
    rows, kinds = device_table(table, f.device), table.kinds(row)
    drawn = (z, keys if z is None else None) if any(table.row(row).d) else (None, None)
    scale = f.new_full((len(f),), guidance, dtype=torch.float32) if isinstance(guidance, (int, float)) else guidance
    k = table.row(row)
    given = (slots, f, rows, row, kinds, *drawn, f_uncond, scale, rescale, k.snr, k.eps_max, table.clip)
    # Bypasses torch.library, whose operations take some ten microseconds, unless a mode or subclass needs to see them.
    is_direct = is_plain(*slots, f, *drawn, f_uncond, scale)
    made = iter(operators.launch_solver_step(*given) if is_direct else torch.ops.fastsde.solver_step(*given))
    return tuple(next(made) if source is None else slots[source] for source in table.sources(row))
