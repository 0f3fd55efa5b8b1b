"""The eager engine: the reference's trajectory with as few and as cheap PyTorch calls per row as possible.

Where the kernels run, a row is the network, one fused kernel, and the times. Elsewhere zero terms are skipped, D is
computed only in rows that use it, and the noise of several rows is drawn at once. The samples are the reference's up to
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import noise, ops, reference
from ..guidance import Weights
from ..reference import check_finite, evaluate
from ..request import Request
from ..solvers import StepTable
from .corrected import Corrected, corrected
from .network import Network

__all__ = ["FiniteCheck", "run"]

# Rows of noise are drawn together while they have at most this many elements (each costs 60 operations on a tensor of
# int64 blocks, which stay in the L2 cache at this size); at a hundred elements that is 20 times as fast as row by row.
_NOISE_ELEMENTS = 1 << 15


def run(network: Network, request: Request) -> Tensor:
    """Runs `fastsde.reference.sample` faster, with the same result and errors."""
    x = request.start().contiguous()
    run_network, request = corrected(network, request)
    rows = _fused if x.dtype == torch.float32 and ops.has_kernels(x.device) else _plain
    return rows(run_network, x, request)


def _fused(network: Network | Corrected, x: Tensor, request: Request) -> Tensor:
    """Runs the rows by the fused kernel, which also detects values that are not finite.

    On a GPU these are reported only at the end, since reading the result waits for the device. Each state is a new
    tensor, so a callback may keep it.
    """
    table, noise_function, after_row = request.table, request.noise, request.after_row
    # OpenMP's threads spin for milliseconds after a step, and would slow the network's own.
    threads = 1 if network.has_own_threads else None
    step = ops.Stepper(table, x, request.keys, request.guidance, threads)
    slots = [x, *(torch.zeros_like(x) for _ in range(1, table.slots))]
    network_input, size, dtype, device = reference.network_input(slots, table, 0), (len(x),), x.dtype, x.device
    for row in range(len(table)):
        k = table.row(row)
        t = torch.full(size, k.time, dtype=dtype, device=device)
        f, f_uncond = evaluate(network, network_input, t, *request.conditions_of(row))
        z = noise_function(row, slots[0]) if noise_function is not None and k.has_noise else None
        slots, network_input = step(row, slots, f, f_uncond, z)
        replaced = None if after_row is None else after_row(row, k.time, slots[0])
        if replaced is not None:
            slots[0] = replaced.contiguous()
            network_input = _next_input(slots, table, row)
    step.finish()
    return slots[0]


def _next_input(slots: Sequence[Tensor], table: StepTable, row: int) -> Tensor:
    """Returns the network's input in the row after ``row``."""
    return slots[0] if row + 1 == len(table) else reference.network_input(slots, table, row + 1)


def _plain(network: Network | Corrected, x: Tensor, request: Request) -> Tensor:
    """Runs the rows by PyTorch's own operations."""
    table, noise_function, after_row = request.table, request.noise, request.after_row
    drawn = iter(()) if noise_function is not None else _noise_rows(request.keys, table, x.shape[1:])
    finite = FiniteCheck([k.time for k in map(table.row, range(len(table)))], x.device)
    slots = [x, *(torch.zeros_like(x) for _ in range(1, table.slots))]
    network_input = reference.network_input(slots, table, 0)
    for row in range(len(table)):
        k = table.row(row)
        t = torch.full((len(x),), k.time, dtype=x.dtype, device=x.device)
        outputs = evaluate(network, network_input, t, *request.conditions_of(row))
        for f in outputs:
            if f is not None:
                finite("the network returned", f, row)
        z = None
        if k.has_noise:
            z = next(drawn) if noise_function is None else noise_function(row, slots[0])
        slots = _step(slots, _guided(*outputs, request.guidance, x.dtype, row), z, table, row)
        finite("the state became", slots[0], row)
        replaced = None if after_row is None else after_row(row, k.time, slots[0])
        slots[0] = slots[0] if replaced is None else replaced
        network_input = _next_input(slots, table, row)
    finite.finish()
    return slots[0]


def _guided(f: Tensor, f_uncond: Tensor | None, weights: Weights | None, dtype: torch.dtype, row: int) -> Tensor:
    """Returns the network's output in the dtype of the state, with guidance if the row has any."""
    f = f.to(dtype)
    if f_uncond is None or weights is None:
        return f
    return reference.guided(f, f_uncond, weights.of_row(row), weights.rescale)


def _step(slots: Sequence[Tensor], f: Tensor, z: Tensor | None, table: StepTable, row: int) -> list[Tensor]:
    """Computes one row. New slots are new tensors, unseen by the network or a callback, or old slots that move."""
    k, terms = table.row(row), table.terms(row)
    data = None
    if terms.has_data:
        data = _sum((*k.p, k.q), (*slots, f))
        if table.clip is not None:
            data.clamp_(-table.clip, table.clip)
    if k.snr > 0:
        assert data is not None
        assert z is not None
        data, z = reference.langevin_terms(data, z, k.snr, k.eps_max)
    new = list(slots)
    for slot, source in terms.moved:
        new[slot] = slots[source]
    for slot in terms.computed:
        new[slot] = _sum((*k.A[slot], k.b[slot], k.e[slot], k.d[slot]), (*slots, f, data, z))
    return new


def _sum(coefficients: Sequence[float], terms: Sequence[Tensor | None]) -> Tensor:
    """Returns the sum in new memory, without the terms whose coefficient is zero."""
    used = [(c, term) for c, term in zip(coefficients, terms, strict=True) if c != 0 and term is not None]
    if not used:
        return torch.zeros_like(terms[0])  # type: ignore[arg-type]  # a slot
    total = torch.mul(used[0][1], used[0][0])
    for coefficient, term in used[1:]:
        total.add_(term, alpha=coefficient)
    return total


def _noise_rows(keys: Tensor, table: StepTable, shape: Sequence[int]) -> Iterator[Tensor]:
    """Yields the noise of each row that has any, in order, drawn for several such rows at once."""
    most = max(1, _NOISE_ELEMENTS // max(4, 4 * len(keys) * -(-math.prod(shape) // 4)))
    noisy = (table.d != 0).any(dim=1).tolist()
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

    If deferred, it costs one kernel per value: the largest magnitude, which is NaN or infinity if any element is.
    """

    _WHAT = ("the network returned", "the state became")  # in their order within a row

    def __init__(self, times: Sequence[float], device: torch.device, deferred: bool | None = None) -> None:
        self._times = times
        deferred = device.type != "cpu" if deferred is None else deferred
        shape = (len(times), len(self._WHAT))
        self._magnitudes = torch.zeros(shape, dtype=torch.float32, device=device) if deferred else None

    def __call__(self, what: str, value: Tensor, row: int) -> None:
        if self._magnitudes is None:
            check_finite(what, value, row, self._times[row])
        elif value.numel():
            place = self._magnitudes[row, self._WHAT.index(what)]
            if value.dtype == torch.float64:  # the magnitude may be too large for fp32; times 0 it is 0 or NaN
                place.copy_(torch.linalg.vector_norm(value, math.inf).mul_(0))
            else:
                torch.linalg.vector_norm(value, math.inf, dtype=torch.float32, out=place)

    def finish(self) -> None:
        """Raises for the first value that was not finite, if the check was deferred."""
        if self._magnitudes is None:
            return
        for row, what in torch.isfinite(self._magnitudes).logical_not().nonzero().tolist():
            check_finite(self._WHAT[what], self._magnitudes[row], row, self._times[row])
