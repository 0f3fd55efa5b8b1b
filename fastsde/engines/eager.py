"""The eager engine: the reference's trajectory with as few and as cheap PyTorch calls a row as it takes.

Where the kernels run, a row is the network, one fused kernel, and the times. Elsewhere zero terms are skipped, D is
computed only where a row uses it, and the noise of several rows is drawn in one go. The samples are the reference's up
to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import noise, ops
from ..reference import Model, NoiseFunction, RowHook, check_finite, evaluate
from ..solvers import StepTable

__all__ = ["FiniteCheck", "sample"]

# Rows of noise are drawn together while they have at most this many elements (each costs 60 operations on a tensor of
# int64 blocks, which stay in the L2 cache at this size); at a hundred elements that is 20 times as fast as row by row.
_NOISE_ELEMENTS = 1 << 15


def sample(
    model: Model,
    shape: Sequence[int],
    table: StepTable,
    keys: Tensor,
    *,
    x_init: Tensor | None = None,
    noise_function: NoiseFunction | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    after_row: RowHook | None = None,
) -> Tensor:
    """`fastsde.reference.sample`, faster. Arguments, result and errors are the same."""
    x = ops.normal(keys, 0, shape[1:]).to(dtype) if x_init is None else x_init.to(dtype)
    conditions = (model_kwargs or {}, None if guidance is None else uncond_kwargs or {})
    run = _fused if dtype == torch.float32 and ops.has_kernels(x.device) else _plain
    return run(model, x, table, keys, noise_function, conditions, guidance, after_row)


def _fused(
    model: Model,
    x: Tensor,
    table: StepTable,
    keys: Tensor,
    noise_function: NoiseFunction | None,
    conditions: tuple[Mapping[str, Any], Mapping[str, Any] | None],
    guidance: float | None,
    after_row: RowHook | None,
) -> Tensor:
    """Rows by the fused kernel, which also sees what is not finite. Each state is new: a callback may keep it.

    On a GPU that is looked at once, at the end, since it waits for the device.
    """
    at_once = x.device.type == "cpu"
    rows = [table.row(row) for row in range(len(table))]
    status, history = ops.new_status(x.device), None
    for row, k in enumerate(rows):
        t = torch.full((len(x),), k["time"], dtype=x.dtype, device=x.device)
        f, f_uncond = evaluate(model, x, t, *conditions)
        z = noise_function(row, x) if k["d"] != 0 and noise_function is not None else None
        x, history = ops.fused_step(
            x,
            f,
            table,
            row,
            history=history,
            z=z,
            keys=keys,
            f_uncond=f_uncond,
            guidance=guidance,
            store_data=_is_read(rows, row),
            status=status,
        )
        if at_once:
            ops.check_status(status, table)
        replaced = None if after_row is None else after_row(row, k["time"], x)
        x = x if replaced is None else replaced
    ops.check_status(status, table)
    return x


def _is_read(rows: Sequence[dict[str, float]], row: int) -> bool:
    """Whether the next row reads what this one stores."""
    return row + 1 < len(rows) and rows[row + 1]["c"] != 0


def _plain(
    model: Model,
    x: Tensor,
    table: StepTable,
    keys: Tensor,
    noise_function: NoiseFunction | None,
    conditions: tuple[Mapping[str, Any], Mapping[str, Any] | None],
    guidance: float | None,
    after_row: RowHook | None,
) -> Tensor:
    """Rows by PyTorch's own operations."""
    rows = [table.row(row) for row in range(len(table))]
    drawn = iter(()) if noise_function is not None else _noise_rows(keys, table, x.shape[1:])
    finite = FiniteCheck(rows, x.device)
    history = None
    for row, k in enumerate(rows):
        t = torch.full((len(x),), k["time"], dtype=x.dtype, device=x.device)
        outputs = evaluate(model, x, t, *conditions)
        for f in outputs:
            if f is not None:
                finite("the network returned", f, row)
        z = None
        if k["d"] != 0:
            z = next(drawn) if noise_function is None else noise_function(row, x)
        f = _guided(*outputs, guidance, x.dtype)
        x, history = _step(x, f, k, table.clip, history, z, _is_read(rows, row))
        finite("the state became", x, row)
        replaced = None if after_row is None else after_row(row, k["time"], x)
        x = x if replaced is None else replaced
    finite.finish()
    return x


def _guided(f: Tensor, f_uncond: Tensor | None, guidance: float | None, dtype: torch.dtype) -> Tensor:
    """The network's output in the dtype of the state, with classifier-free guidance where there is any."""
    f = f.to(dtype)
    if f_uncond is None or guidance is None:
        return f
    f_uncond = f_uncond.to(dtype)
    return f_uncond + guidance * (f - f_uncond)


def _step(
    x: Tensor, f: Tensor, k: dict[str, float], clip: float | None, history: Tensor | None, z: Tensor | None, store: bool
) -> tuple[Tensor, Tensor | None]:
    """One row. The result is a new tensor, which neither the network nor a callback has seen."""
    data = None
    if store or k["e"] != 0:
        data = torch.mul(x, k["p"]).add_(f, alpha=k["q"])
        if clip is not None:
            data.clamp_(-clip, clip)
    x = torch.mul(x, k["a"])
    for name, term in (("b", f), ("e", data), ("c", history), ("d", z)):
        if k[name] != 0 and term is not None:  # H is 0 in the first row
            x.add_(term, alpha=k[name])
    return x, data if store else None


def _noise_rows(keys: Tensor, table: StepTable, shape: Sequence[int]) -> Iterator[Tensor]:
    """The noise of each row that has any, in order, drawn for runs of such rows."""
    most = max(1, _NOISE_ELEMENTS // max(4, 4 * len(keys) * -(-math.prod(shape) // 4)))
    noisy = (table.d != 0).tolist()
    row = 0
    while row < len(noisy):
        end = row
        while end < len(noisy) and noisy[end] and end - row < most:
            end += 1
        if end > row:
            # Made on the device: copying a list of steps there would stall it.
            yield from noise.normal(keys, torch.arange(row + 1, end + 1, device=keys.device), shape)
        row = max(end, row + 1)


class FiniteCheck:
    """Raises for a value that is not finite: at once on the CPU, elsewhere at the end, without a stall.

    Deferred, it costs one kernel a value: the largest magnitude, which NaN and infinity pass through.
    """

    _WHAT = ("the network returned", "the state became")  # in the order of a row

    def __init__(self, rows: Sequence[dict[str, float]], device: torch.device, deferred: bool | None = None) -> None:
        self._rows = rows
        deferred = device.type != "cpu" if deferred is None else deferred
        shape = (len(rows), len(self._WHAT))
        self._magnitudes = torch.zeros(shape, dtype=torch.float32, device=device) if deferred else None

    def __call__(self, what: str, value: Tensor, row: int) -> None:
        if self._magnitudes is None:
            check_finite(what, value, row, self._rows[row]["time"])
        elif value.numel():
            place = self._magnitudes[row, self._WHAT.index(what)]
            if value.dtype == torch.float64:  # whose magnitude may be too large for fp32; times 0 it is 0 or NaN
                place.copy_(torch.linalg.vector_norm(value, math.inf).mul_(0))
            else:
                torch.linalg.vector_norm(value, math.inf, dtype=torch.float32, out=place)

    def finish(self) -> None:
        """Raises for the first value that was not finite, where the check was deferred."""
        if self._magnitudes is None:
            return
        for row, what in torch.isfinite(self._magnitudes).logical_not().nonzero().tolist():
            check_finite(self._WHAT[what], self._magnitudes[row], row, self._rows[row]["time"])
