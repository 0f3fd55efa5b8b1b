"""Affine values: what each element of a traced tensor is, as a sum over nodes.

A `Value` is ``sum of coefficient * node[positions] + const`` for a number of elements in flat order. Coefficients and
constants are floats, or flat float64 tensors where they differ from element to element. ``positions`` say which element
of the node each element reads; None means its own. So a loop that never moves elements costs no memory per element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

__all__ = ["Coefficient", "Joined", "Key", "Mover", "Node", "Positions", "Value", "added", "flat", "is_zero", "scaled"]

Coefficient = float | Tensor


class Positions:
    """Which element of a source each element of a result reads; `Mover` makes one object of equal ones."""

    __slots__ = ("first", "idx")

    def __init__(self, idx: Tensor) -> None:
        self.idx = idx
        # The first position, where the positions are neighbours in order: then they are a range of the source.
        is_range = len(idx) > 0 and bool((idx[1:] - idx[:-1] == 1).all())
        self.first = int(idx[0]) if is_range else None

    def __len__(self) -> int:
        return len(self.idx)


class Node:
    """A named value. Nodes are numbered in the order in which the loop makes them.

    Args:
        kind: "noise", "input" (the initial state), "output" (of the network), "affine", "clamp" or "opaque".
        epoch: how many network calls came before.
        shape: the shape of the tensor that it stands for.
        value: of an affine node, or the argument of a clamp.
        bounds: of a clamp.
        label: the number of a draw, the (call, leaf) of an output.
        made_by: of an opaque node, the operation and the number of its output.
    """

    __slots__ = ("bounds", "epoch", "kind", "label", "made_by", "order", "shape", "value")

    def __init__(self, kind: str, epoch: int, shape: Sequence[int], **options: Any) -> None:
        self.kind, self.epoch, self.shape = kind, epoch, tuple(shape)
        self.value: Value | None = options.get("value")
        self.bounds: tuple[float, float] | None = options.get("bounds")
        self.label: Any = options.get("label")
        self.made_by: Any = options.get("made_by")
        self.order: float = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def children(self) -> list[Node]:
        """The nodes that it is computed from."""
        if self.made_by is not None:
            return [node for value in self.made_by[0].operands for node in value.nodes()]
        return self.value.nodes() if self.value is not None else []

    def __repr__(self) -> str:
        return f"<{self.kind} {'' if self.label is None else self.label} @{self.epoch}>"


Key = tuple[Any, Optional[Positions]]  # noqa: UP045 (evaluated at import, in Python 3.10 too)


class Value:
    """sum of coefficient * node[positions] over ``terms``, plus ``const``, for ``numel`` elements."""

    __slots__ = ("const", "numel", "terms")

    def __init__(self, numel: int, terms: dict[Key, Coefficient] | None = None, const: Coefficient = 0.0) -> None:
        self.numel, self.terms, self.const = numel, {} if terms is None else terms, const

    def nodes(self) -> list[Any]:
        return [node for node, _ in self.terms]

    @property
    def is_atom(self) -> bool:
        """Whether it is one node as it is."""
        if len(self.terms) != 1 or not is_zero(self.const):
            return False
        ((_, c),) = self.terms.items()
        return not isinstance(c, Tensor) and c == 1


@dataclass(eq=False)
class Joined:
    """Values concatenated along a dimension. It stays apart as long as nobody needs its elements one by one."""

    parts: list[tuple[Value, tuple[int, ...]]]
    dim: int

    @property
    def numel(self) -> int:
        return sum(value.numel for value, _ in self.parts)

    def nodes(self) -> list[Any]:
        return [node for value, _ in self.parts for node in value.nodes()]


def flat(c: Coefficient, numel: int) -> Tensor:
    """Returns a coefficient with one number per element."""
    return c if isinstance(c, Tensor) else torch.full((numel,), c, dtype=torch.float64, device="cpu")


def uniform(c: Coefficient) -> Coefficient:
    """Returns a coefficient as a float if all of its elements are equal."""
    if not isinstance(c, Tensor) or not len(c):
        return c
    first = c[0]
    return float(first) if bool((c == first).all()) else c


def is_zero(c: Coefficient) -> bool:
    return not bool(c.any()) if isinstance(c, Tensor) else c == 0


def scaled(v: Value, k: Coefficient) -> Value:
    """Returns k v, without the terms that become zero."""
    if not isinstance(k, Tensor):
        if k == 1:
            return v
        if k == 0:
            return Value(v.numel)
        return Value(v.numel, {key: c * k for key, c in v.terms.items()}, v.const * k)
    terms = {key: uniform(c * k) for key, c in v.terms.items()}
    return Value(v.numel, {key: c for key, c in terms.items() if not is_zero(c)}, uniform(v.const * k))


def added(v: Value, w: Value) -> Value:
    """Returns v + w."""
    terms = dict(v.terms)
    for key, c in w.terms.items():
        old = terms.get(key)
        if old is None:
            terms[key] = c
            continue
        total = uniform(old + c)
        if is_zero(total):
            del terms[key]
        else:
            terms[key] = total
    const = v.const + w.const
    return Value(v.numel, terms, uniform(const) if isinstance(const, Tensor) else const)


class Mover:
    """Moves the elements of values. What a move does to positions is computed once per operation and shape."""

    def __init__(self) -> None:
        self._known: dict[bytes, Positions] = {}
        self._moves: dict[Any, Any] = {}
        self._composed: dict[tuple[Positions, Positions], Positions | None] = {}

    def intern(self, idx: Tensor, source: int) -> Positions | None:
        """Returns the positions of an index into ``source`` elements; None if every element reads itself."""
        idx = idx.reshape(-1).contiguous()
        if len(idx) == source and torch.equal(idx, torch.arange(source, device="cpu")):
            return None
        return self._known.setdefault(idx.numpy().tobytes(), Positions(idx))

    def moves(self, key: Any, shape: Sequence[int], move: Callable[[Tensor], Any]) -> Any:
        """Returns the positions and shape of what ``move`` makes of a tensor of a shape, or a list of such pairs."""
        try:
            return self._moves[key]
        except (KeyError, TypeError) as missing:
            numel = math.prod(shape)
            moved = move(torch.arange(numel, device="cpu").reshape(tuple(shape)))
            if isinstance(moved, Tensor):
                found: Any = (self.intern(moved, numel), tuple(moved.shape))
            else:
                found = [(self.intern(each, numel), tuple(each.shape)) for each in moved]
            if isinstance(missing, KeyError):
                self._moves[key] = found
            return found

    def compose(self, outer: Positions | None, inner: Positions | None, source: int) -> Positions | None:
        """Returns the positions of reading ``outer`` of what reads ``inner`` of ``source`` elements."""
        if outer is None:
            return inner
        if inner is None:
            return outer
        key = (outer, inner)
        if key not in self._composed:
            self._composed[key] = self.intern(inner.idx[outer.idx], source)
        return self._composed[key]

    def gather(self, v: Value, positions: Positions | None) -> Value:
        """Returns the elements of a value at positions."""
        if positions is None:
            return v
        numel = len(positions)
        const = v.const if not isinstance(v.const, Tensor) else uniform(v.const[positions.idx])
        out = Value(numel, {}, const)
        for (node, inner), c in v.terms.items():
            moved = self.compose(positions, inner, node.numel)
            if isinstance(c, Tensor):
                c = c[positions.idx]
                if is_zero(c):
                    continue
                moved, c = self._shared(moved, c, node.numel), uniform(c)
            key = (node, moved)
            out.terms[key] = out.terms[key] + c if key in out.terms else c
        return out

    def _shared(self, positions: Positions | None, c: Tensor, source: int) -> Positions | None:
        """Where a coefficient is zero the position is free: chooses it so that equal terms are found to be equal."""
        used = c != 0
        if bool(used.all()):
            return positions
        own = torch.arange(len(c), device="cpu")
        idx = own if positions is None else positions.idx
        if len(c) == source and torch.equal(idx[used], own[used]):
            return None
        return self.intern(torch.where(used, idx, torch.zeros_like(idx)), source)

    def concat(self, values: Sequence[Value]) -> Value:
        """Returns values one after the other."""
        total = sum(v.numel for v in values)
        const = uniform(torch.cat([flat(v.const, v.numel) for v in values])) if values else 0.0
        layers: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        start = 0
        for v in values:
            stop = start + v.numel
            for (node, positions), c in v.terms.items():
                mine = layers.setdefault(node, [])
                layer = next((each for each in mine if not bool(each[0][start:stop].any())), None)
                if layer is None:
                    layer = _no_terms(total)
                    mine.append(layer)
                weight, index = layer
                weight[start:stop] = flat(c, v.numel)
                index[start:stop] = torch.arange(v.numel, device="cpu") if positions is None else positions.idx
            start = stop
        out = Value(total, {}, const)
        for node, pairs in layers.items():
            for weight, index in pairs:
                key = (node, self._shared(self.intern(index, node.numel), weight, node.numel))
                old = out.terms.get(key)
                out.terms[key] = uniform(weight if old is None else weight + old)
        return out

    def flattened(self, v: Value | Joined) -> Value:
        """Returns a joined value as one."""
        if isinstance(v, Value):
            return v
        whole = self.concat([value for value, _ in v.parts])
        shapes = tuple(shape for _, shape in v.parts)

        def move(idx: Tensor) -> Tensor:
            pieces = torch.split(idx, [math.prod(shape) for shape in shapes])
            return torch.cat([piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)], dim=v.dim)

        positions, _ = self.moves(("join", shapes, v.dim), (whole.numel,), move)
        return self.gather(whole, positions)

    def scatter(self, v: Value, positions: Positions | None, w: Value) -> Value:
        """Returns ``v`` with ``w`` at positions."""
        if positions is None:
            return w
        keep = torch.ones(v.numel, dtype=torch.float64, device="cpu")
        keep[positions.idx] = 0
        kept = scaled(Value(v.numel, v.terms, 0.0), uniform(keep))
        const = flat(v.const, v.numel).clone()
        const[positions.idx] = flat(w.const, w.numel)
        out = Value(v.numel, dict(kept.terms), uniform(const))
        for (node, inner), c in w.terms.items():
            weight, index = _no_terms(v.numel)
            weight[positions.idx] = flat(c, w.numel)
            index[positions.idx] = torch.arange(w.numel, device="cpu") if inner is None else inner.idx
            key = (node, self._shared(self.intern(index, max(node.numel, 1)), weight, node.numel))
            old = out.terms.get(key)
            out.terms[key] = uniform(weight if old is None else weight + old)
        return out


def _no_terms(numel: int) -> tuple[Tensor, Tensor]:
    """Returns coefficients of zero, and positions."""
    return (
        torch.zeros(numel, dtype=torch.float64, device="cpu"),
        torch.zeros(numel, dtype=torch.int64, device="cpu"),
    )
