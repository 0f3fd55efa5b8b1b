"""The batches of a run: gathered from memory, or loaded ahead by other processes."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from .. import ops, reference
from ..conditions import Condition
from ..data.dataset import Dataset
from ..data.streamed import StreamedDataset
from ..engines.inspection import check_call
from ..models import MLP, UNet
from ..randomness import preserved, seed_everywhere
from .config import TrainConfig

__all__ = ["Batch", "Batches", "batches_of", "conditions_of"]

_STEPS_AHEAD = 64  # whose positions are drawn at once
_SIZES = {"label": "classes", "condition": "condition"}  # the attribute of a network that gives a condition's size


class Batch(NamedTuple):
    """What a step is taken on: data ``[B, *shape]`` as stored, and conditions ``[B, ...]`` by name, on the device."""

    x_0: Tensor
    conditions: dict[str, Tensor]


class Batches(Protocol):
    """Gives the batches of consecutive steps."""

    def take(self, step: int, index: Tensor) -> Batch:
        """Returns the batch of a step, whose positions in the data are ``index``."""


def conditions_of(model: nn.Module, dataset: Dataset | StreamedDataset) -> dict[str, Condition]:
    """Returns the conditions of a data set that a network takes: those that its ``forward`` has arguments for.

    Raises:
        ValueError: if the network cannot be called with x, t and these, or one of this package's networks takes a
            condition that the data do not have, or another number of classes.
    """
    try:
        arguments: Mapping[str, Any] = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # it has none that Python can read
        arguments = {}
    takes_all = any(each.kind == each.VAR_KEYWORD for each in arguments.values())
    named = [name for name, each in arguments.items() if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = [name for name, each in arguments.items() if each.kind in positional][:2]  # x and t
    is_own = isinstance(model, (MLP, UNet))
    sizes = {name: getattr(model, name_of_size, 0) for name, name_of_size in _SIZES.items()} if is_own else {}
    found = {
        name: each
        for name, each in dataset.described.items()
        if sizes.get(name, 1) and (takes_all or (name in named and name not in first))
    }
    try:
        check_call(model, "conditions", found)
    except TypeError as error:  # the network and the data do not fit
        raise ValueError(str(error)) from error
    for name, size in sizes.items():
        if size:
            _check_size(name, size, found)
    return found


def _check_size(name: str, size: int, found: Mapping[str, Condition]) -> None:
    """Raises ValueError unless the data have a condition that fits one of this package's networks."""
    if name not in found:
        raise ValueError(f"the data must have the condition {name!r} that the model takes, got {list(found)}")
    has = found[name]
    expected = Condition(classes=size) if name == "label" else Condition(shape=(size,))
    if (has.classes, has.shape) != (expected.classes, expected.shape):
        words = f"{has.classes} classes" if has.classes else f"values of shape {list(has.shape)}"
        raise ValueError(f"the model takes a {name!r} of {size}, the data have one of {words}")
    if name == "label" and has.null is not None and has.null > size:
        raise ValueError(f"the null of the condition 'label' must be at most {size} for the model, got {has.null}")


class _Memory:
    """Gathers from a data set on the device."""

    def __init__(self, dataset: Dataset, names: Sequence[str]) -> None:
        self._x, self._conditions = dataset.x, {name: dataset.conditions[name] for name in names}

    def take(self, step: int, index: Tensor) -> Batch:
        """As `Batches.take`."""
        return Batch(self._x[index], {name: value[index] for name, value in self._conditions.items()})


class _Places:
    """The (step, position in the batch, position in the data) of each sample, a batch at a time, from a step on."""

    def __init__(self, config: TrainConfig, part: slice, n: int, first: int) -> None:
        self._config, self._part, self._n, self._first = config, part, n, first

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        keys = ops.sample_keys(self._config.seed, self._config.batch_size, device="cpu")[self._part]
        positions = range(self._config.batch_size)[self._part]
        for start in range(self._first, self._config.steps, _STEPS_AHEAD):
            steps = torch.arange(start, min(start + _STEPS_AHEAD, self._config.steps), device="cpu")
            for step, index in zip(steps.tolist(), reference.data_order(keys, steps, self._n).tolist(), strict=True):
                yield [(step, position, each) for position, each in zip(positions, index, strict=True)]


class _Seeded(TorchDataset[Any]):
    """Items of a data set, each after the generators of Python, NumPy and PyTorch were seeded by its place in the run.

    So random crops and the like are the same in a resumed run, however many processes load the data.
    """

    def __init__(self, dataset: StreamedDataset, seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __getitems__(self, places: list[tuple[int, int, int]]) -> list[Batch]:
        """Returns the items of a batch, each a batch without its first axis."""
        with preserved():
            return [self._item(*place) for place in places]

    def _item(self, step: int, position: int, index: int) -> Batch:
        seed_everywhere(self._seed, step, position)
        return Batch(*self._dataset.item(index))


class _Streamed:
    """Loads batches ahead of the steps, in other processes if there are any, and copies them to a GPU meanwhile."""

    def __init__(
        self, dataset: StreamedDataset, names: Sequence[str], config: TrainConfig, device: torch.device, part: slice
    ) -> None:
        self._dataset, self._names, self._config, self._part = dataset, list(names), config, part
        self._device, self._next = device, -1
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._loaded: Iterator[Any] = iter(())
        self._ahead: Batch | None = None

    def take(self, step: int, index: Tensor) -> Batch:
        """As `Batches.take`."""
        if step != self._next:
            self._loaded = iter(self._loader(step))
            self._ahead = self._load()
        assert self._ahead is not None
        batch, self._next = self._ahead, step + 1
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in (batch.x_0, *batch.conditions.values()):
                tensor.record_stream(current)
        self._ahead = self._load()  # the next one: its copy runs beside this step
        return batch

    def _load(self) -> Batch | None:
        """Starts to copy the next batch to the device; None after the last one."""
        loaded = next(self._loaded, None)
        if loaded is None:
            return None
        x_0, conditions = loaded
        with torch.cuda.stream(self._stream):  # no stream is no context
            there = {name: conditions[name].to(self._device, non_blocking=True) for name in self._names}
            return Batch(x_0.to(self._device, non_blocking=True), there)

    def _loader(self, first: int) -> DataLoader[Any]:
        places = _Places(self._config, self._part, len(self._dataset), first)
        return DataLoader(
            _Seeded(self._dataset, self._config.seed),
            batch_sampler=places,
            num_workers=self._config.workers,
            pin_memory=self._stream is not None,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # else PyTorch's own is drawn from
        )


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others


def batches_of(
    dataset: Dataset | StreamedDataset, names: Sequence[str], config: TrainConfig, device: torch.device, part: slice
) -> Batches:
    """Returns the batches of a run.

    Args:
        names: the conditions to take.
        part: which rows of each batch to load.
    """
    if isinstance(dataset, StreamedDataset):
        return _Streamed(dataset, names, config, device, part)
    return _Memory(dataset, names)
