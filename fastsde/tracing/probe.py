"""The tensor that records: a `Probe` has a shape and a dtype, and in place of data the value that it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import TraceError
from .values import Joined, Mover, Positions, Value

__all__ = ["Memory", "Probe"]


class Memory:
    """What a tensor's storage holds. Writes to separate ranges of it, as into a buffer of states, stay apart.

    Args:
        value: what it holds.
        mover: of the tape.
    """

    __slots__ = ("_mover", "_pieces", "_value", "version")

    def __init__(self, value: Value | Joined, mover: Mover) -> None:
        self._value, self._mover, self.version = value, mover, 0
        self._pieces: dict[tuple[int, int], Value] = {}  # over the value, none overlaps another

    @property
    def numel(self) -> int:
        return self._value.numel

    @property
    def joined(self) -> Joined | None:
        """Its parts, if it is made of parts."""
        if not self._pieces:
            return self._value if isinstance(self._value, Joined) else None
        base, parts, at = self._mover.flattened(self._value), [], 0
        for (start, stop), piece in sorted(self._pieces.items(), key=lambda item: item[0]):
            if start > at:
                parts.append(self._range(base, at, start))
            parts.append(piece)
            at = stop
        if at < self.numel:
            parts.append(self._range(base, at, self.numel))
        return Joined([(part, (part.numel,)) for part in parts], 0)

    def _range(self, value: Value, start: int, stop: int) -> Value:
        if not value.terms and not isinstance(value.const, Tensor):
            return Value(stop - start, {}, value.const)
        positions, _ = self._mover.moves(("range", start, stop, value.numel), (value.numel,), lambda i: i[start:stop])
        return self._mover.gather(value, positions)

    def read(self, positions: Positions | None) -> Value:
        """Returns the value at positions."""
        if self._pieces:
            if positions is not None and positions.first is not None:
                piece = self._pieces.get((positions.first, positions.first + len(positions)))
                if piece is not None:
                    return piece
            whole = self.joined
            assert whole is not None
            self._value, self._pieces = self._mover.flattened(whole), {}
        if isinstance(self._value, Joined):
            if positions is not None and self._value.dim == 0 and positions.first is not None:
                at = 0
                for part, _ in self._value.parts:
                    if at == positions.first and part.numel == len(positions):
                        return part
                    at += part.numel
            self._value = self._mover.flattened(self._value)
        return self._mover.gather(self._value, positions)

    def write(self, positions: Positions | None, value: Value) -> None:
        """Writes a value to positions."""
        self.version += 1
        if positions is None:
            self._value, self._pieces = value, {}
            return
        if positions.first is not None:
            start, stop = positions.first, positions.first + len(positions)
            overlaps = any(start < b and a < stop for a, b in self._pieces if (a, b) != (start, stop))
            if not overlaps:
                self._pieces[start, stop] = value
                return
        whole = self.read(None)
        self._value, self._pieces = self._mover.scatter(whole, positions, value), {}


class Probe(Tensor):
    """A tensor without data that stands for an affine value: chosen positions of a memory."""

    tape: Any  # the `Tape` that it belongs to
    memory: Memory
    positions: Positions | None
    _read: tuple[int, Value] | None

    @staticmethod
    def __new__(
        cls, tape: Any, memory: Memory, shape: Sequence[int], dtype: torch.dtype, positions: Positions | None = None
    ) -> Probe:
        probe: Probe = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=tape.device)
        probe.tape, probe.memory, probe.positions, probe._read = tape, memory, positions, None
        return probe

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WHOLE:  # their parts reshape in place
            probe = next(each for each in args if isinstance(each, Probe))
            return probe.tape.opaque(func, args, kwargs or {}, TraceError(func.__name__, "a quantile of the state"))
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TraceError(
            str(func),
            "a traced tensor is used after its trace has ended: something kept a state of the loop",
            instead="reset what the loop keeps, such as a scheduler, at its beginning",
        )

    @property
    def value(self) -> Value:
        if self._read is None or self._read[0] != self.memory.version:
            self._read = (self.memory.version, self.memory.read(self.positions))
        return self._read[1]

    @property
    def whole(self) -> Value | Joined:
        """Its value, in parts where it is made of parts."""
        if self.positions is None:
            joined = self.memory.joined
            if joined is not None:
                return joined
        return self.value

    def write(self, value: Value) -> None:
        self.memory.write(self.positions, value)

    def moved(self, positions: Positions | None, shape: Sequence[int]) -> Probe:
        """Returns a probe of positions of this one, in the same memory."""
        inner = self.tape.mover.compose(positions, self.positions, self.memory.numel)
        return Probe(self.tape, self.memory, shape, self.dtype, inner)

    def __repr__(self) -> str:  # type: ignore[override]
        self.tape.host_read(self)
        return "Probe"

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        self.tape.host_read(self)

    numpy = tolist = __array__ = data_ptr = __format__ = __str__ = _refuse

    def __deepcopy__(self, memo: Any) -> Any:
        return self.clone()


_WHOLE = {torch.quantile, Tensor.quantile, torch.nanquantile, torch.median, Tensor.median}
