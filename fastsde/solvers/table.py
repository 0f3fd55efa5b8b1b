"""Solvers as tables: every solver is a float64 table, and the same affine step runs all of them.

The state is up to eight arrays of the sample's shape, the *slots* s[0], s[1], ...: a general linear method (Butcher,
"General linear methods", Acta Numerica 2006). Slot 0 starts as the draw from the prior, the others as zero, and slot 0
is the result. Row k of a `StepTable` runs the network once and takes one step (`fastsde.reference.solver_step`):

    f  = model(n.s, time[k])
    D  = p.s + q f                      clamped to [-clip, clip] if clip is set
    s' = A s + b f + e D + d z          z: this row's noise

A row whose ``snr`` r is above 0 is a *Langevin row*: D is a score g, and a step along it is as long as its norm and the
noise's say, for each sample (Song et al. 2021, arXiv:2011.13456, algorithms 4 and 5):

    eps = min(2 (r |z| / |g|)^2, eps_max),   s' = A s + e eps g + d sqrt(2 eps) z,   or s' = A s where g is 0

The prediction kind is folded into the coefficients when a table is built, so nothing downstream depends on it. Terms
that are zero in the whole table cost nothing, and a slot that takes over another one unchanged (the history of a
multistep method) is renamed rather than copied. To add a solver, write a function that returns a `StepTable`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..dynamo import constant
from ..validation import check_number
from .terms import Terms, kinds_of, live_terms, named_terms, terms_of, trajectory_terms_of

__all__ = ["MAX_SLOTS", "Row", "StepTable", "row_width"]

MAX_SLOTS = 8
"""The most slots that a table has."""
_LARGEST = torch.finfo(torch.float32).max


def row_width(slots: int) -> int:
    """Returns how many numbers a row of `StepTable.packed` has."""
    return 2 + 5 * slots + slots**2


class Row(NamedTuple):
    """A row of a `StepTable` as Python floats: time and q, one coefficient per slot, and for A one tuple per slot."""

    time: float
    q: float
    n: tuple[float, ...]
    p: tuple[float, ...]
    b: tuple[float, ...]
    e: tuple[float, ...]
    d: tuple[float, ...]
    A: tuple[tuple[float, ...], ...]
    snr: float = 0.0
    eps_max: float = _LARGEST

    @property
    def has_noise(self) -> bool:
        """Whether the row uses z."""
        return any(self.d)

    @property
    def reads_slot_0(self) -> bool:
        """Whether the network is called with slot 0 itself."""
        return self.n[0] == 1 and not any(self.n[1:])


@dataclass(frozen=True, eq=False, init=False)
class StepTable:
    """A solver: K rows, each one network call and one step of m slots s[0], ..., s[m - 1].

        f  = model(n.s, time[k])
        D  = p.s + q f                      clamped to [-clip, clip] if clip is set
        s' = A s + b f + e D + d z          z: this row's noise

    Slot 0 starts as the draw from the prior, the others as zero, and slot 0 is the result. A Langevin row, which is one
    whose ``snr`` is above 0, sizes its step by norms (`fastsde.reference.langevin_size`).

    ``StepTable(time, a, b, c, d, e, p, q, clip)``, with columns ``[K]``, is the short form for a table of one or two
    slots:

        f  = model(x, time[k])
        D  = p x + q f                      clamped to [-clip, clip] if clip is set
        x' = a x + b f + e D + c H + d z    H: the D of the previous row, 0 in the first

    All columns are float64 tensors on the CPU; those that are left out are zero.

    Args:
        time: ``[K]``, the times at which the network is called.
        a: ``[K]``, the weight of x in x'; only in the short form, which needs it.
        b: ``[K, m]``, or ``[K]`` in the short form: the weight of f.
        c: ``[K]``, the weight of H; only in the short form.
        d: ``[K, m]`` or ``[K]``, the weight of the noise.
        e: ``[K, m]`` or ``[K]``, the weight of D.
        p: ``[K, m]`` or ``[K]``, the weight of the slots in D.
        q: ``[K]``, the weight of f in D.
        clip: the bound of D, or None.
        n: ``[K, m]``, the network's input; by default slot 0.
        A: ``[K, m, m]``, the weight of each old slot in each new one.
        snr: ``[K]``, above 0 in Langevin rows, in which b is zero, and e and d of slot 0 are not. A table with such
            rows has no clip.
        eps_max: ``[K]``, the largest size of a step in Langevin rows; by default the largest number of fp32.

    Raises:
        TypeError: for a column that is not a float64 tensor.
        ValueError: for columns of different lengths, without rows or with values that are not finite, more than 8
            slots, a clip that is not positive, a row in which n is zero, or a Langevin row that is none.
    """

    time: Tensor
    n: Tensor
    p: Tensor
    q: Tensor
    A: Tensor
    b: Tensor
    e: Tensor
    d: Tensor
    snr: Tensor
    eps_max: Tensor
    clip: float | None = None

    def __init__(
        self,
        time: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        c: Tensor | None = None,
        d: Tensor | None = None,
        e: Tensor | None = None,
        p: Tensor | None = None,
        q: Tensor | None = None,
        clip: float | None = None,
        *,
        n: Tensor | None = None,
        A: Tensor | None = None,
        snr: Tensor | None = None,
        eps_max: Tensor | None = None,
    ) -> None:
        rows = _check_time(time)
        if A is None:
            if a is None:
                raise TypeError("StepTable takes a or A, got neither")
            if n is not None:
                raise TypeError("StepTable takes n only with A, got n without A: with a and c the network's input is x")
            given = {"a": a, "b": b, "c": c, "d": d, "e": e, "p": p, "q": q}
            columns = _two_slots({name: _check(name, column, (rows,)) for name, column in given.items()})
        else:
            if a is not None or c is not None:
                raise TypeError("StepTable takes either A, or a and c, got both")
            slots = _check_slots(A, rows)
            first = torch.eye(1, slots, dtype=torch.float64, device="cpu").expand(rows, slots)
            columns = {
                "A": _check("A", A, (rows, slots, slots)),
                "n": first if n is None else _check("n", n, (rows, slots)),
                "q": _check("q", q, (rows,)),
            }
            for name, column in (("p", p), ("b", b), ("e", e), ("d", d)):
                columns[name] = _check(name, column, (rows, slots))
            _check_inputs(columns["n"])
        if clip is not None:
            check_number("clip", clip, "a positive number or None", lambda clip: 0 < clip < math.inf)
        largest = torch.full((rows,), _LARGEST, dtype=torch.float64, device="cpu")
        columns["snr"] = _check("snr", snr, (rows,))
        columns["eps_max"] = largest if eps_max is None else _check("eps_max", eps_max, (rows,))
        _check_langevin(columns, clip)
        for name, value in {"time": time, **columns}.items():
            object.__setattr__(self, name, value.clone())  # later changes to the caller's tensors have no effect
        object.__setattr__(self, "clip", clip)

    def __repr__(self) -> str:
        clip = "" if self.clip is None else f", clip={self.clip:g}"
        first, last = float(self.time[0]), float(self.time[-1])
        return f"StepTable(rows={len(self)}, slots={self.slots}, time={first:g} .. {last:g}{clip})"

    def __len__(self) -> int:
        return len(self.time)

    @property
    def slots(self) -> int:
        """m, the number of slots of the state."""
        return self.A.shape[1]

    @cached_property
    def has_langevin(self) -> bool:
        """Whether any row is a Langevin row."""
        return bool(self.snr.any())

    @cached_property
    def langevin(self) -> Tensor:
        """snr and eps_max as the kernels read them, float64 ``[K, 2]``."""
        return torch.stack((self.snr, self.eps_max), dim=1)

    @cached_property
    def packed(self) -> Tensor:
        """All columns but `langevin` as the kernels read them, float64 ``[K, 2 + 5 m + m^2]``.

        They are time, q, n, p, b, e, d and A.
        """
        return torch.cat(
            (
                self.time[:, None],
                self.q[:, None],
                *(self.n, self.p, self.b, self.e, self.d),
                self.A.flatten(1),
            ),
            dim=1,
        )

    @cached_property
    def _rows(self) -> list[Row]:
        slots = self.slots
        rows = []
        for (time, q, *rest), langevin in zip(self.packed.tolist(), self.langevin.tolist(), strict=True):
            n, p, b, e, d, *A = (tuple(rest[i : i + slots]) for i in range(0, len(rest), slots))
            rows.append(Row(time, q, n, p, b, e, d, tuple(A), *langevin))
        return rows

    @constant
    def row(self, k: int) -> Row:
        """Returns the time and coefficients of row k as Python floats."""
        return self._rows[k]

    @cached_property
    def _kinds(self) -> list[tuple[int, ...]]:
        return [kinds_of(row) for row in self.packed.tolist()]

    @cached_property
    def _terms(self) -> Terms:
        return terms_of(self.packed, self.slots)

    @cached_property
    def _live_terms(self) -> list[Terms]:
        return live_terms(self.packed, self.slots)

    @constant
    def terms(self, k: int | None = None) -> Terms:
        """Returns what row k computes, except what no later row reads; or, without k, what any row computes."""
        return self._terms if k is None else self._live_terms[k]

    @cached_property
    def trajectory_terms(self) -> Terms:
        """`terms` of any row, for a kernel that runs all rows: without what no row reads, and with the n of row 0."""
        return trajectory_terms_of(self.packed, self.slots)

    @constant
    def kinds(self, k: int) -> tuple[int, ...]:
        """Returns ABSENT, ONE or ANY for each column of row k of `packed`, from which `terms` are made."""
        return self._kinds[k]

    @constant
    def sources(self, k: int) -> tuple[int | None, ...]:
        """Returns, for each new slot of row k, the old slot that it takes over unchanged, or None."""
        return named_terms(self.kinds(k), self.slots).sources

    @constant
    def on(self, device: torch.device) -> Tensor:
        """Returns `packed` in fp32 on a device; copied once."""
        copies = _on_devices.setdefault(self, {})
        if device not in copies:
            copies[device] = self.packed.to(device, torch.float32)
        return copies[device]

    def head(self, rows: int) -> StepTable:
        """Returns the table of the first rows."""
        names = ("time", "n", "p", "q", "A", "b", "e", "d", "snr", "eps_max")
        return replace(self, **{name: getattr(self, name)[:rows] for name in names})


_on_devices: WeakKeyDictionary[StepTable, dict[torch.device, Tensor]] = WeakKeyDictionary()  # not pickled


def _check_time(time: Tensor) -> int:
    if isinstance(time, Tensor) and (time.ndim != 1 or not len(time)):
        raise ValueError(f"StepTable.time must have shape [K] with K >= 1, got {list(time.shape)}")
    return len(_check("time", time, (len(time) if isinstance(time, Tensor) else 0,)))


def _check_slots(A: Tensor, rows: int) -> int:
    if not isinstance(A, Tensor):
        raise TypeError(f"StepTable.A must be a float64 tensor [K, m, m], got {type(A).__name__}")
    shape = list(A.shape)
    if A.ndim != 3:
        raise ValueError(f"StepTable.A must be a float64 tensor [K, m, m], got shape {shape}")
    if not 1 <= A.shape[1] <= MAX_SLOTS:
        raise ValueError(f"StepTable.A must be [K, m, m] with m from 1 to {MAX_SLOTS} slots, got {shape}")
    return A.shape[1]


def _check_inputs(n: Tensor) -> None:
    is_zero = (n == 0).all(dim=1)
    if is_zero.any():
        raise ValueError(f"StepTable.n must not be zero in all slots, got zeros in row {int(is_zero.nonzero()[0])}")


def _check_langevin(columns: Mapping[str, Tensor], clip: float | None) -> None:
    snr = columns["snr"]
    if (snr < 0).any():
        raise ValueError(f"StepTable.snr must be at least 0, got {float(snr.min()):g}")
    if not (columns["eps_max"] > 0).all():
        raise ValueError(f"StepTable.eps_max must be positive, got {float(columns['eps_max'].min()):g}")
    if not snr.any():
        return
    if clip is not None:
        raise ValueError(f"StepTable.clip must be None in a table with snr above 0, got {clip}")
    wrong = (snr > 0) & (columns["b"].any(dim=1) | (columns["e"][:, 0] == 0) | (columns["d"][:, 0] == 0))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"StepTable.snr may be above 0 only where b is zero, and e and d of slot 0 are not; see row {row}"
        )


def _check(name: str, column: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Returns the checked column, or zeros if it is not given."""
    if column is None and name != "time":
        return torch.zeros(shape, dtype=torch.float64, device="cpu")
    if not isinstance(column, Tensor) or column.dtype != torch.float64:
        kind = column.dtype if isinstance(column, Tensor) else type(column).__name__
        raise TypeError(f"StepTable.{name} must be a float64 tensor, got {kind}")
    if column.device.type != "cpu":
        raise ValueError(f"StepTable.{name} must be on the CPU, got {column.device}")
    if column.shape != shape:
        raise ValueError(
            f"StepTable.{name} must have shape {list(shape)} to match time [{shape[0]}], got {list(column.shape)}"
        )
    if not (finite := torch.isfinite(column.float())).all():
        row = int((~finite).nonzero()[0, 0])
        value = column[row][~finite[row]].flatten()[0].item()
        raise ValueError(f"StepTable.{name} must be finite in fp32, got {value} in row {row}")
    return column


def _two_slots(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the general form of x' = a x + b f + e D + c H + d z, H' = D; with one slot if no row uses H."""
    slots = 2 if columns["c"].any() else 1

    def first(name: str) -> Tensor:
        column = columns[name]
        return torch.stack((column, torch.zeros_like(column)), dim=1)[:, :slots]

    one, zero = torch.ones_like(columns["a"]), torch.zeros_like(columns["a"])
    keep = torch.stack((columns["a"], columns["c"], zero, zero), dim=1).reshape(-1, 2, 2)
    return {
        "n": torch.stack((one, zero), dim=1)[:, :slots],
        "p": first("p"),
        "q": columns["q"],
        "A": keep[:, :slots, :slots],
        "b": first("b"),
        "e": torch.stack((columns["e"], one), dim=1)[:, :slots],
        "d": first("d"),
    }
