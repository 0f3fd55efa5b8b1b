"""The step of a solver, and the keys and the draw of its initial state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import noise, reference
from ..dynamo import guard_identity
from ..reference import non_finite
from ..solvers import StepTable
from ..validation import check_instance, check_int, check_keys, check_number, check_shape, check_tensor
from . import library
from .dispatch import contiguous, has_kernels, is_plain, kernel, needs_grad

__all__ = [
    "check_status",
    "counted_step",
    "device_table",
    "fused_step",
    "new_status",
    "normal",
    "sample_keys",
    "solver_step",
    "step_counter",
]


def device_table(table: StepTable, device: torch.device) -> Tensor:
    """The table as the kernels read it, fp32 ``[K, 8]`` on the device; made once."""
    guard_identity(table)
    return table.on(device)


def fused_step(
    x: Tensor,
    f: Tensor,
    table: StepTable,
    row: int,
    *,
    history: Tensor | None = None,
    z: Tensor | None = None,
    keys: Tensor | None = None,
    f_uncond: Tensor | None = None,
    guidance: float | None = None,
    store_data: bool = True,
    status: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`solver_step` by its kernel, for an fp32 state where `has_kernels` holds. Arguments are trusted.

    Args:
        store_data: whether D is stored and returned.
        status: a `new_status`, which the kernel notes in what is not finite.
        out: where x' goes: contiguous, and possibly ``x`` itself.
    """
    k = table.row(row)
    x, f, f_uncond = contiguous(x, f, f_uncond)
    history, z, keys = contiguous(history if k["c"] else None, z if k["d"] else None, keys if k["d"] else None)
    out = torch.empty_like(x) if out is None else out
    data = torch.empty_like(x) if store_data else None
    kernel("solver_step", x.device).solver_step(
        x,
        f,
        device_table(table, x.device),
        row,
        history=history,
        z=z,
        keys=keys,
        f_uncond=f_uncond,
        guidance=guidance,
        clip=table.clip,
        uses_data=k["e"] != 0,
        status=status,
        out=out,
        data=data,
    )
    return out, data


def counted_step(
    x: Tensor,
    f: Tensor,
    rows: Tensor,
    counter: Tensor,
    *,
    time: Tensor,
    status: Tensor,
    history: Tensor | None,
    keys: Tensor | None,
    f_uncond: Tensor | None,
    guidance: float | None,
    clip: float | None,
    uses_data: bool,
) -> None:
    """`fused_step` in place, of the row that a counter on the device stands at: the same launch for every row.

    Args:
        rows: a `device_table`.
        counter: a `step_counter`, moved on by one.
        time: fp32 ``[B]``, set to the time of the next row.
        status: a `new_status`.
        history, keys: None where no row of the table has c, or d.
        uses_data: whether a row has e.
    """
    f, f_uncond = contiguous(f, f_uncond)
    given = {"history": history, "keys": keys, "f_uncond": f_uncond, "guidance": guidance}
    kernel("solver_step", x.device).solver_step(
        x,
        f,
        rows,
        0,
        clip=clip,
        uses_data=uses_data,
        counter=counter,
        time=time,
        status=status,
        out=x,
        data=history,
        **given,
    )


def step_counter(batch: int, size: int, device: torch.device) -> Tensor:
    """A counter for `counted_step` on samples of ``size`` elements, at row 0."""
    return torch.zeros(kernel("solver_step", device).counter_slots(batch, size), dtype=torch.int64, device=device)


def new_status(device: torch.device) -> Tensor:
    """What the step notes in that the state or the network's output is not finite: int32 ``[1]``."""
    from ..kernels.status import FINITE

    return torch.full((1,), FINITE, dtype=torch.int32, device=device)


def check_status(status: Tensor, table: StepTable) -> None:
    """Waits for the device and raises `NonFiniteError` for the first row with a value that was not finite."""
    from ..kernels.status import FINITE, STATUS_KINDS

    value = int(status)
    if value != FINITE:
        row, kind = divmod(value, 2)
        raise non_finite(STATUS_KINDS[kind], row, float(table.time[row]))


def sample_keys(seed: int, n: int, first_sample: int = 0, *, device: torch.device | str = "cpu") -> Tensor:
    """`fastsde.noise.sample_keys`: one launch where the kernel runs.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    device = torch.device(device)
    if not has_kernels(device):
        return noise.sample_keys(seed, n, first_sample, device=device)
    given = (noise.int64_bits("seed", seed), check_int("n", n, 0), noise.int64_bits("first_sample", first_sample))
    if is_plain():  # past torch.library, whose first call imports the compiler
        return library.launch_sample_keys(*given, device)
    keys: Tensor = torch.ops.fastsde.sample_keys(*given, device)
    return keys


def normal(keys: Tensor, step: int, shape: Sequence[int], stream: int = noise.STREAM_SAMPLING) -> Tensor:
    """`fastsde.noise.normal` of one step: one launch where the kernel runs.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    keys = check_keys(keys, len(check_tensor("keys", keys)), keys.device)
    check_int("step", step, 0, 2**28), check_int("stream", stream, 0, 16), check_shape("shape", shape)
    if not has_kernels(keys.device):
        return noise.normal(keys, step, shape, stream)
    if is_plain(keys):  # past torch.library, whose first call imports the compiler
        return library.launch_normal(keys, step, stream, shape)
    drawn: Tensor = torch.ops.fastsde.normal(keys, step, stream, list(shape))
    return drawn


def solver_step(
    x: Tensor,
    f: Tensor,
    table: StepTable,
    row: int,
    *,
    history: Tensor | None = None,
    z: Tensor | None = None,
    keys: Tensor | None = None,
    f_uncond: Tensor | None = None,
    guidance: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastsde.reference.solver_step` for x fp32 or float64 and f of any floating-point dtype.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    check_tensor("x", x, floating=True)
    if x.ndim < 1 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64 [B, *shape], got {x.dtype} {list(x.shape)}")
    check_instance("table", table, StepTable)
    row = len(range(check_int("row", row, 0, len(table))))  # in compiled code an int may be a symbol, but no length is
    check_tensor("f", f, shape=x.shape, device=x.device, floating=True)
    options: dict[str, Any] = {"history": history, "z": z, "f_uncond": f_uncond}
    for name, value in options.items():
        if value is not None:
            options[name] = check_tensor(name, value, shape=x.shape, device=x.device, floating=True).to(x.dtype)
    guard_identity(table)
    k = table.row(row)
    if z is None and k["d"] != 0:
        if keys is None:
            raise ValueError(f"z or keys must be given for row {row}, where d is {k['d']:g}, got neither")
        keys = check_keys(keys, len(x), x.device)
    if history is None and k["c"] != 0:
        raise ValueError(f"history must be given for row {row}, where c is {k['c']:g}, got None")
    if (f_uncond is None) != (guidance is None):
        raise ValueError("f_uncond and guidance go together: give both or neither")
    if guidance is not None:
        check_number("guidance", guidance)
    if x.dtype == torch.float32 and has_kernels(x.device) and not needs_grad(x, f, *options.values()):
        columns = device_table(table, x.device)
        given = (options["history"] if k["c"] else None, options["z"] if k["d"] else None, keys if k["d"] else None)
        guided = (options["f_uncond"], guidance)
        result: tuple[Tensor, Tensor] = torch.ops.fastsde.solver_step(
            x, f, columns, row, *given, *guided, table.clip, k["e"] != 0
        )
        return result
    return reference.solver_step(x, f, table, row, keys=keys, guidance=guidance, **options)
