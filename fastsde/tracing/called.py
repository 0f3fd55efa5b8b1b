"""A network as a traced loop calls it, as a module that is called as model(x, t)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..models.mlp import is_sequential
from .calls import Argument, Calls, Item, Place, Selected
from .program import under

__all__ = ["Called", "conditions_of", "model_of"]


def model_of(calls: Calls, network: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the network as model(x, t, **conditions): itself, if the loop calls it so."""
    if calls.is_plain or (calls.is_concatenation and isinstance(network, nn.Sequential) and is_sequential(network)):
        return network
    return Called(network, calls)


class _Tables:
    """What a network looks numbers up in, on each device."""

    def __init__(self) -> None:
        self.kept: dict[Any, Tensor] = {}


class Called(nn.Module):
    """A network called as a traced loop calls it.

    Args:
        network: the network.
        calls: how the loop calls it.
    """

    def __init__(self, network: Callable[..., Any], calls: Calls) -> None:
        super().__init__()
        self.network = network
        self.training = False  # it has no mode of its own
        self._calls = calls
        self._tables = _Tables()

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        calls = self._calls
        batch = len(x)
        if calls.is_fixed and batch != calls.batch:
            raise ValueError(f"this loop mixes samples: it runs {calls.batch} of them as traced, not {batch}")
        leaves = []
        for leaf in calls.leaves:
            if isinstance(leaf, Argument):
                leaves.append(self._argument(leaf, x, t, conditions))
            else:
                leaves.append(self._item(leaf, x, t, conditions))
        args, kwargs = tree_unflatten(leaves, calls.spec)
        with under(calls.autocast, x.device):
            found, _ = tree_flatten(self.network(*args, **kwargs))
        total: Tensor | None = None
        for part in calls.selected:
            f = self._select(found[part.place], part, x)
            weight = self._item(part.weight, x, t, conditions)
            if len(calls.selected) > 1 or isinstance(weight, Tensor) or weight != 1:
                f = f.to(x.dtype) * weight  # the state's, however few bits the network's has
            total = f if total is None else total + f
        assert total is not None
        return total

    def _argument(self, leaf: Argument, x: Tensor, t: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        batch = len(x)
        parts = []
        for place in leaf.places:
            if not place.has_state:
                assert place.const is not None
                value = self._item(place.const, x, t, conditions, x.dtype)
                shape = _with_batch(place.shape, batch, self._calls.batch)
                parts.append(value.expand(shape) if isinstance(value, Tensor) else x.new_full(shape, value))
                continue
            parts.append(self._state(place, x, t, conditions))
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=leaf.dim)
        whole = whole.reshape(_with_batch(leaf.shape, batch, self._calls.batch))
        # The engine casts the state to the network's dtype; a loop in another precision gives it that.
        return whole if leaf.dtype == torch.float32 or x.dtype == torch.float64 else whole.to(leaf.dtype)

    def _state(self, place: Place, x: Tensor, t: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        batch = len(x)
        if place.whole is not None:
            part = x.reshape(-1)[self._on(place.whole, x)].reshape(place.shape)
        elif place.index is not None:
            part = x.reshape(batch, -1)[:, self._on(place.index, x)].reshape(batch, *place.shape[1:])
        else:
            part = x.reshape(batch, *place.shape[1:])
        if place.scale is not None:
            part = part * self._item(place.scale, x, t, conditions, x.dtype)
        if place.const is not None:
            part = part + self._item(place.const, x, t, conditions, x.dtype)
        return part

    def _select(self, f: Tensor, part: Selected, x: Tensor) -> Tensor:
        if part.whole is not None:
            return f.reshape(-1)[self._on(part.whole, x)].reshape(x.shape)
        if part.blocks > 1:
            f = f.reshape(part.blocks, len(x), *f.shape[1:])[part.block]
        if part.index is not None:
            f = f.reshape(len(x), -1)[:, self._on(part.index, x)]
        return f.reshape(x.shape)

    def _item(
        self, item: Item, x: Tensor, t: Tensor, conditions: Mapping[str, Any], dtype: torch.dtype | None = None
    ) -> Any:
        """Returns what an item is in the row of time ``t`` ``[B]``."""
        is_state = item.dtype is None and item.shape is not None  # part of an argument that has the state
        if item.kind == "condition":
            return self._condition(item, conditions[item.name], t)
        if item.kind == "constant":
            value = item.unique[0]
            if item.shape is None or (is_state and not isinstance(value, Tensor)):
                return value
            if isinstance(value, Tensor):
                return self._constant(item, value, x, dtype)
            return x.new_full(_with_batch(item.shape, len(x), self._calls.batch), value, dtype=item.dtype)
        value = t if item.kind == "time" else self._looked_up(item, x, t, dtype)
        if item.shape is None:
            return value if item.kind == "row" else type(item.values[0])(t[0].item())
        if item.kind == "row" and not item.is_number:
            return value
        return self._filled(item, value, x, dtype)

    def _filled(self, item: Item, value: Tensor, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Returns a tensor of an item's shape that is full of the one number ``value``, ``[B]`` or ``[1]``."""
        assert item.shape is not None
        value = value.to(item.dtype or dtype or x.dtype)
        shape = _with_batch(item.shape, len(x), self._calls.batch)
        if shape and shape[0] == len(value):
            value = value.reshape(len(value), *(1,) * (len(shape) - 1))
        else:
            value = value[:1].reshape((1,) * len(shape))
        return value if shape == tuple(value.shape) else value.expand(shape)

    def _looked_up(self, item: Item, x: Tensor, t: Tensor, dtype: torch.dtype | None) -> Any:
        if item.shape is None and not item.is_weight:
            return item.unique[item.index[int(t[0].item())]]
        row = t[:1].round().long()
        place = self._table(item, "index", lambda: torch.tensor(item.index, device="cpu"), x)[row]
        if item.is_number:
            return self._table(item, "unique", lambda: _numbers(item), x)[place]
        stacked = self._table(
            item, "unique", lambda: torch.stack([_tensor(v, item).to(x.device) for v in item.unique]), x
        )
        found = stacked.index_select(0, place)[0]
        return found.to(dtype or item.dtype).reshape(item.shape) if item.shape is not None else found

    def _condition(self, item: Item, value: Tensor, t: Tensor) -> Tensor:
        """Returns a condition ``[B, blocks, choices, ...]`` in the shape that the network is given."""
        assert item.shape is not None
        if value.shape[2] > 1:
            row = t[:1].round().long()
            place = self._table(item, "index", lambda: torch.tensor(item.index, device="cpu"), value)[row]
            value = value.index_select(2, place)
        value = value[:, :, 0].transpose(0, 1)
        return value.reshape(value.shape[0] * value.shape[1], *item.shape[1:])

    def _constant(self, item: Item, value: Tensor, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        own = item.dtype or dtype
        assert item.shape is not None
        found = self._table(item, ("constant", own), lambda: value.to(own) if own else value, x)
        if item.dtype is not None:
            return found
        found = found.reshape(item.shape)
        if len(x) == self._calls.batch or not item.shape:
            return found
        own_first = found[:1]
        if not bool((found == own_first).all()):
            raise ValueError(f"this loop gives each sample its own constants: it runs {self._calls.batch} as traced")
        return own_first.expand(len(x), *item.shape[1:])

    def _table(self, item: Item, what: Any, make: Callable[[], Tensor], x: Tensor) -> Tensor:
        return self._kept((id(item), what, x.device), lambda: make().to(x.device))

    def _on(self, index: Tensor, x: Tensor) -> Tensor:
        return self._kept((id(index), x.device), lambda: index.to(x.device))

    def _kept(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        kept = self._tables.kept
        if torch.compiler.is_exporting():  # its tensors are symbols
            return make()
        if key not in kept:
            kept[key] = make()
        return kept[key]


def conditions_of(calls: Calls, given: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Returns the conditions as keyword arguments ``[B, blocks, choices, ...]``.

    Args:
        given: tensors instead of those of the trace, by the id of these.
    """
    found = {}
    for name, item in calls.conditions.items():
        choices = [given.get(id(value), value) if isinstance(value, Tensor) else value for value in item.unique]
        device = next((x.device for x in choices if isinstance(x, Tensor)), None)
        stacked = torch.stack([_tensor(value, item).to(device) for value in choices])
        blocks = stacked.shape[1] // calls.batch
        split = stacked.reshape(len(choices), blocks, calls.batch, *stacked.shape[2:])
        found[name] = split.movedim(2, 0).transpose(1, 2)
    return found


def _numbers(item: Item) -> Tensor:
    """Returns the numbers of an item, in its dtype if it has one; of a combination's weights in float64."""
    return torch.tensor(item.unique, dtype=item.dtype or torch.float64, device="cpu")


def _tensor(value: Any, item: Item) -> Tensor:
    if isinstance(value, Tensor):
        return value
    assert item.shape is not None
    return torch.full(item.shape, value, dtype=item.dtype, device="cpu")


def _with_batch(shape: tuple[int, ...], batch: int, traced: int) -> tuple[int, ...]:
    """Returns a traced shape for another batch; the first dimension may be several blocks of it."""
    if not shape or batch == traced or not traced or shape[0] % traced:
        return shape
    return (shape[0] // traced * batch, *shape[1:])
