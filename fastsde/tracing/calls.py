"""How a traced loop calls its network.

What the loop gives the network besides the state is the same in all rows, or follows the row: a time, a sigma, a
condition. If one number follows the row, it is the table's time; if there are several, the table's time is the number
of the row, and they are looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from .program import Program
from .rows import Leaf, Part
from .tape import Call
from .values import Positions

__all__ = ["Argument", "Calls", "Item", "NotATable", "Output", "Place", "Selected", "calls_of", "per_sample"]


class NotATable(Exception):  # noqa: N818 (it then runs row by row)
    """The program is no table; the message says why."""


@dataclass(frozen=True)
class Output:
    """A part of what the network returns, and its weight in the row."""

    output: int
    positions: Positions | None
    weight: float


@dataclass
class Item:
    """Something that the network is given in each row.

    Args:
        values: one per row: a number, a float64 tensor, or for other constants anything.
        shape, dtype: of a tensor; the shape with the batch of the trace. None for a Python number or another constant.
        kind: "constant", "time" (the table's), "row" (looked up) or "condition" (a tensor with the batch first).
    """

    values: list[Any]
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    kind: str = "constant"
    name: str = ""
    is_weight: bool = False
    unique: list[Any] = field(default_factory=list)
    index: list[int] = field(default_factory=list)

    @property
    def is_number(self) -> bool:
        return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in self.values) and (
            self.shape is not None or len(set(map(type, self.values))) == 1  # Python numbers keep their type
        )


@dataclass
class Place:
    """A part of an argument: the state, moved and scaled, or an item alone."""

    shape: tuple[int, ...]
    has_state: bool
    index: Tensor | None = None  # per sample
    whole: Tensor | None = None  # of the whole traced batch, where it is not per sample
    scale: Item | None = None
    const: Item | None = None


@dataclass
class Argument:
    shape: tuple[int, ...]
    dtype: torch.dtype
    places: list[Place]
    dim: int


@dataclass
class Selected:
    """A part of an output: block i of the batch's blocks, elements of each sample, times a weight."""

    place: int
    block: int
    blocks: int
    index: Tensor | None
    whole: Tensor | None
    weight: Item


@dataclass
class Calls:
    """All calls of a table.

    Args:
        batch: B of the trace.
        time: the table's times.
        is_fixed: whether only the traced batch can be run, since elements of different samples mix.
        conditions: tensors with the batch first, given to the network as keyword arguments.
    """

    batch: int
    sample_shape: tuple[int, ...]
    spec: Any
    leaves: list[Item | Argument]
    selected: list[Selected]
    time: Tensor
    is_fixed: bool
    conditions: dict[str, Item]
    autocast: tuple[bool, torch.dtype] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the network is called as model(x, t) with t ``[B]`` in fp32, and its output is used as it is."""
        if len(self.leaves) != 2 or not self._returns_all or self.conditions or self.autocast is not None:
            return False
        x, t = self.leaves
        if not isinstance(x, Argument) or not isinstance(t, Item):
            return False
        takes_x = len(x.places) == 1 and x.places[0].has_state and _is_untouched(x.places[0])
        _, spec = tree_flatten(((0, 0), {}))
        takes_t = t.kind == "time" and t.shape == (self.batch,) and t.dtype == torch.float32
        return takes_x and takes_t and spec == self.spec and x.shape == (self.batch, *self.sample_shape)

    @property
    def is_concatenation(self) -> bool:
        """Whether the network is called as model(cat((x, t), -1)), and its output is used as it is."""
        if len(self.leaves) != 1 or not self._returns_all or len(self.sample_shape) != 1 or self.autocast is not None:
            return False
        leaf = self.leaves[0]
        _, spec = tree_flatten(((0,), {}))
        if not isinstance(leaf, Argument) or len(leaf.places) != 2 or leaf.dim != 1 or spec != self.spec:
            return False
        x, t = leaf.places
        is_time = not t.has_state and t.const is not None and t.const.kind == "time" and t.shape == (self.batch, 1)
        return x.has_state and _is_untouched(x) and is_time and leaf.dtype == torch.float32

    @property
    def _returns_all(self) -> bool:
        if len(self.selected) != 1:
            return False
        only = self.selected[0]
        return only.place == 0 and only.blocks == 1 and only.index is None and only.whole is None


def _is_untouched(place: Place) -> bool:
    return place.index is None and place.whole is None and place.scale is None and place.const is None


def calls_of(
    program: Program,
    arguments: Sequence[dict[int, Leaf]],
    shape: tuple[int, ...],
    outputs: Sequence[Sequence[Output]],
) -> Calls:
    """Returns how the network is called in all rows.

    Args:
        arguments: for each row, the network's arguments that the state enters.
        shape: ``(B, *shape)`` of the state.
        outputs: for each row, the parts of the outputs that it uses.

    Raises:
        NotATable: if the calls differ by more than values.
    """
    calls = program.calls
    first = calls[0]
    for call in calls:
        if call.network != first.network:
            raise NotATable("it calls several networks")
        if _way(call) != _way(first):
            raise NotATable("it calls its network in different ways")
    batch = shape[0] if shape else 1
    made = _Items(batch, len(calls), program.watched)
    leaves: list[Item | Argument] = []
    for i in range(len(first.leaves)):
        if i in first.states:
            leaves.append(made.argument([row[i] for row in arguments], torch.Size(shape).numel()))
        else:
            leaves.append(made.leaf([call.leaves[i] for call in calls]))
    selected = made.selected(outputs, [node.shape for node in first.outputs], first.places, torch.Size(shape).numel())
    time = made.time()
    return Calls(batch, shape[1:], first.spec, leaves, selected, time, made.is_fixed, made.conditions, first.autocast)


def _way(call: Call) -> tuple[Any, ...]:
    """Returns what must be equal in all rows: how the network is called, apart from values."""
    return call.spec, call.states, call.places, call.autocast, len(call.leaves)


class _Items:
    """Collects what follows the row, and decides what the table's time is."""

    def __init__(self, batch: int, rows: int, watched: frozenset[int]) -> None:
        self._batch, self._rows, self._watched = batch, rows, watched
        self._items: list[Item] = []
        self.is_fixed = False
        self.conditions: dict[str, Item] = {}

    def _add(self, item: Item) -> Item:
        self._items.append(item)
        return item

    def argument(self, leaves: Sequence[Leaf], numel: int) -> Argument:
        first = leaves[0]
        for leaf in leaves:
            if [_form(part) for part in leaf.parts] != [_form(part) for part in first.parts] or leaf.dim != first.dim:
                raise NotATable("it gives the state to its network in different ways")
        places = [self._place([leaf.parts[i] for leaf in leaves], numel) for i in range(len(first.parts))]
        return Argument(first.shape, first.dtype, places, first.dim)

    def _place(self, parts: Sequence[Part], numel: int) -> Place:
        first = parts[0]
        if first.input is None:
            item = self._add(Item([part.const for part in parts], first.shape))
            return Place(first.shape, False, const=item)
        place = Place(first.shape, True)
        if first.positions is not None:
            place.index = per_sample(first.positions.idx, self._batch, numel // max(1, self._batch))
            if place.index is None or first.shape[:1] != (self._batch,):
                place.index, place.whole, self.is_fixed = None, first.positions.idx, True
        elif first.shape[:1] != (self._batch,):
            place.whole, self.is_fixed = torch.arange(numel, device="cpu"), True
        if any(isinstance(part.scale, Tensor) or part.scale != 1 for part in parts):
            place.scale = self._add(Item([part.scale for part in parts], first.shape))
        if any(isinstance(part.const, Tensor) or part.const != 0 for part in parts):
            place.const = self._add(Item([part.const for part in parts], first.shape))
        return place

    def leaf(self, values: Sequence[Any]) -> Item:
        first = values[0]
        if isinstance(first, Tensor):
            same = all(isinstance(x, Tensor) and (x.shape, x.dtype) == (first.shape, first.dtype) for x in values)
            if not same:
                raise NotATable("it calls its network with tensors of different shapes")
            plain = [x if id(x) in self._watched else _number(x) for x in values]
            return self._add(Item(plain, tuple(first.shape), first.dtype))
        return self._add(Item(list(values)))

    def selected(
        self, outputs: Sequence[Sequence[Output]], shapes: Sequence[tuple[int, ...]], places: Sequence[int], numel: int
    ) -> list[Selected]:
        used = [row for row in outputs if row]
        if not used:
            raise NotATable("no row uses what the network returns")
        keys = [(each.output, each.positions) for each in used[0]]
        for row in used:
            if {(each.output, each.positions) for each in row} != set(keys):
                raise NotATable("its rows use different outputs of the network")
        found = []
        for output, positions in keys:
            weights = [
                next((e.weight for e in row if (e.output, e.positions) == (output, positions)), 0.0) for row in outputs
            ]
            item = self._add(Item(weights, is_weight=True))
            found.append(self._selected(positions, shapes[output], places[output], numel, item))
        return found

    def _selected(
        self, positions: Positions | None, shape: tuple[int, ...], place: int, numel: int, weight: Item
    ) -> Selected:
        total = torch.Size(shape).numel()
        if positions is None:
            if shape[:1] != (self._batch,):
                self.is_fixed = True
                return Selected(place, 0, 1, None, torch.arange(numel, device="cpu"), weight)
            return Selected(place, 0, 1, None, None, weight)
        idx, batch = positions.idx, self._batch
        if shape and batch and shape[0] % batch == 0:
            blocks, elements = shape[0] // batch, total // shape[0]
            block = int(idx[0]) // (batch * elements)
            index = per_sample(idx - block * batch * elements, batch, elements)
            if index is not None:
                is_all = len(index) == elements and torch.equal(index, torch.arange(elements, device="cpu"))
                return Selected(place, block, blocks, None if is_all else index, None, weight)
        self.is_fixed = True
        return Selected(place, 0, 1, None, idx, weight)

    def time(self) -> Tensor:
        """Decides what each item is, and returns the table's times."""
        varying = []
        for item in self._items:
            item.unique, item.index = _unique(item.values, self._watched)
            if len(item.unique) > 1:
                varying.append(item)
        lists = {tuple(map(float, item.values)) if item.is_number else None for item in varying}
        times = next(iter(lists)) if len(lists) == 1 else None
        is_time = times is not None and not any(item.is_weight for item in varying) and _fits(times)
        for item in varying:
            item.kind = "time" if is_time else "row"
        for item in self._items:
            self._as_condition(item)
        if is_time:
            return torch.tensor(times, dtype=torch.float64, device="cpu")
        return torch.arange(self._rows, dtype=torch.float64, device="cpu")

    def _as_condition(self, item: Item) -> None:
        """Makes a tensor whose samples differ an argument that is split with the batch."""
        if item.shape is None or item.dtype is None or all(isinstance(v, (int, float)) for v in item.unique):
            return
        if item.shape[:1] and self._batch and item.shape[0] % self._batch == 0:
            item.kind, item.name = "condition", f"condition_{len(self.conditions)}"
            self.conditions[item.name] = item


def _form(part: Part) -> Any:
    return part.shape, part.input, part.positions


def _number(x: Tensor) -> Any:
    """Returns the number that all elements of a tensor are, or the tensor."""
    if not x.numel():
        return x
    core = x
    for dim in range(x.ndim):
        if core.stride(dim) == 0:
            core = core.narrow(dim, 0, 1)
    first = core.flatten()[0]
    if x.is_complex() or not bool((core == first).all()):
        return x
    found = first.item()
    return x if isinstance(found, bool) else found


def _unique(values: Sequence[Any], watched: frozenset[int]) -> tuple[list[Any], list[int]]:
    unique: list[Any] = []
    index = []
    known: dict[Any, int] = {}
    for value in values:
        key = id(value) if isinstance(value, Tensor) else (type(value), value) if _is_plain(value) else id(value)
        if key not in known:
            compared = () if _is_plain(value) or id(value) in watched else unique
            same = next((i for i, x in enumerate(compared) if id(x) not in watched and _equal(value, x)), None)
            if same is None:
                same = len(unique)
                unique.append(value)
            known[key] = same
        index.append(known[key])
    return unique, index


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str, bytes, type(None), torch.dtype, torch.device))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    try:
        return bool(type(a) is type(b) and a == b)
    except Exception:  # an object's own comparison
        return a is b


def _fits(values: Sequence[float]) -> bool:
    """Returns whether numbers can be times, which engines round to fp32: integers must stay what they are."""
    exact = torch.tensor(values, dtype=torch.float64, device="cpu")
    are_integers = bool((exact == exact.round()).all())
    return bool(torch.isfinite(exact).all()) and (not are_integers or torch.equal(exact.float().double(), exact))


def per_sample(idx: Tensor, batch: int, elements: int) -> Tensor | None:
    """Returns the positions within a sample, if each sample reads itself, and all in the same way."""
    if not batch or len(idx) % batch:
        return None
    own = idx.reshape(batch, -1) - elements * torch.arange(batch, device="cpu")[:, None]
    first = own[0]
    if not bool((own == first).all()) or bool((first < 0).any()) or bool((first >= elements).any()):
        return None
    return first.clone()
