"""Ways to take training steps: one by one, or dozens at once by a native kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from .. import distributed, models, ops
from ..conditions import Condition
from ..data import Dataset
from ..data.streamed import StreamedDataset
from ..distributed import Ranks
from ..engines.inspection import check_output
from ..lowering import NotLowered, Source, lower
from ..models import UNet
from ..objective import Coefficients
from ..randomness import generator_of, seeded
from ..reference import (
    MOST_ROWS,
    Draws,
    clip_gradient,
    condition_draws,
    denoise,
    drop_conditions,
    dsm_loss,
    ema_update,
    flip_images,
    load_batch,
    sample_losses,
    training_draws,
)
from .batches import Batch, batches_of
from .config import TrainConfig
from .importance import ImportanceTimes
from .native_unet import NativeUNet, can_train

__all__ = ["EagerSteps", "NativeSteps", "Steps", "Work", "can_run_natively", "checked", "pieces", "rates_of"]

# Random numbers are drawn ahead, for as many steps at once as have at most about this many elements.
_DRAW_ELEMENTS = 1 << 17
_ADAM_KINDS = ("exp_avg", "exp_avg_sq")
# The most steps in a native call, the approximate products of weights and samples, and the rows of coefficients, which
# are made before it: Ctrl-C takes effect between two calls, within about a second. Beyond the width the weights leave
# the cache, and PyTorch is faster.
_NATIVE_STEPS, _NATIVE_PRODUCTS, _NATIVE_ROWS, _NATIVE_WIDTH = 500, 1e10, 1 << 22, 1024


@dataclass
class Work:
    """What is trained, on which data and device, and whether native kernels may compute the network."""

    config: TrainConfig
    model: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer
    dataset: Dataset | StreamedDataset
    device: torch.device
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    importance: ImportanceTimes | None = None
    native: bool = True

    def as_called(self, model: nn.Module) -> Any:
        """Returns the model, or a module that computes the same from the same weights, as a step calls it."""
        if self.config.compile:
            return torch.compile(model)
        return NativeUNet(cast(UNet, model)) if self.native and can_train(model) else model

    def seeded(self, step: int, rank: int = 0) -> AbstractContextManager[None]:
        """Seeds PyTorch's generator for a step, which a network of the user's may draw from, as dropout does."""
        if type(self.model) in (models.MLP, models.UNet):
            return nullcontext()
        return seeded(generator_of(self.device), self.config.seed, step, rank, 1)

    @property
    def scaling(self) -> dict[str, Any]:
        """The scale and shift of the data, as arguments of the functions of a step."""
        return {"scale": self.dataset.scale, "shift": self.dataset.shift}

    @property
    def nulls(self) -> dict[str, float]:
        """The values of "no condition"."""
        return {name: each.null for name, each in self.conditions.items() if each.null is not None}

    def data(self) -> Batch:
        """Returns all data in memory, with the conditions that the network takes."""
        assert isinstance(self.dataset, Dataset)
        return Batch(self.dataset.x, {name: self.dataset.conditions[name] for name in self.conditions})

    @property
    def dropout(self) -> float:
        """The share of samples whose conditions are dropped."""
        return self.config.condition_dropout if self.conditions else 0.0

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.config.precision == "bf16" else None


class Steps(Protocol):
    """Takes steps, some at once."""

    def chunks(self, count: int) -> list[int]:
        """Returns how many of the next ``count`` steps to take at once, in order."""

    def take(self, first: int, count: int) -> Tensor:
        """Takes the steps ``first`` to ``first + count - 1`` and returns their losses, fp32 ``[count]``."""


def can_run_natively(work: Work, here: Ranks) -> bool:
    """Returns whether the native kernel can take the steps: of a small network in fp32 on the CPU, in one process.

    It has no conditions, flips, clipping, weight decay or importance sampling of times, and its data are in memory.
    """
    config, model, shape, device = work.config, work.model, work.dataset.shape, work.device
    if config.compile or config.precision != "fp32" or here.world > 1 or not isinstance(work.dataset, Dataset):
        return False
    if len(work.dataset) > MOST_ROWS:
        return False
    if work.conditions or config.flip or config.clip_norm is not None or config.weight_decay or work.importance:
        return False
    if any(True for _ in model.buffers()) or not all(each.requires_grad for each in model.parameters()):
        return False
    if not ops.has_native(device, "mlp_training"):
        return False
    fit = all(max(each.shape, default=0) <= _NATIVE_WIDTH for each in model.parameters())
    plain = all(each.dtype == torch.float32 and each.is_contiguous() for each in model.parameters())
    return fit and plain and _native(model, shape) is not None


class _Native(NamedTuple):
    """A network in training as the native kernel takes it."""

    packed: Any
    sources: list[Source]
    constants: list[Tensor]

    def items(self, tensors: Mapping[int, Tensor]) -> list[Tensor | None]:
        """Returns the items in tensors by the ids of the parameters; None for an item without a gradient."""
        return [None if each.parameter is None else each.of(tensors[id(each.parameter)]) for each in self.sources]

    def weights(self) -> list[Tensor]:
        """Returns the items themselves."""
        return [
            constant if each.parameter is None else each.of(each.parameter)
            for each, constant in zip(self.sources, self.constants, strict=True)
        ]


def _native(model: nn.Module, shape: Sequence[int]) -> _Native | None:
    """Returns a network as the native kernel trains it, or None if it is no program of its own parameters."""
    sizes = [size for each in model.parameters() for size in each.shape]
    times = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float32, device="cpu")
    try:
        with torch.random.fork_rng(devices=[]):
            lowered = lower(checked(model), shape, times, sizes=sizes, time_is_input=True)
        sources, program = lowered.sources(), lowered.program
        vectors = lowered.vectors(times, 1, ())
        assert vectors is not None
        trains = [source.parameter is not None for source in sources]
        packed = ops.kernel("mlp_training", times.device).Packed(program, trains, len(vectors.matrices))
    except (NotLowered, ValueError, RuntimeError):  # of parameters that share memory
        return None
    return _Native(packed, sources, [*vectors.matrices, *(each.contiguous() for each in vectors.constants)])


class EagerSteps:
    """Takes the steps of `fastsde.reference.train_step` one by one, on this rank's part of each batch.

    On the CPU native kernels compute a `UNet` and its gradients (`fastsde.training.native_unet.NativeUNet`). With
    ``accumulation``, the part is cut further, and the gradients of its pieces are added.
    """

    def __init__(self, work: Work, here: Ranks) -> None:
        self._work, self._network = work, work.as_called(work.model)
        config, self._rank = work.config, here.rank
        self._part = distributed.shard(config.batch_size, here.rank, here.world)
        self._weight = distributed.loss_weight(config.batch_size, here.rank, here.world)
        if here.world > 1:
            devices = [work.device] if work.device.type == "cuda" else None
            self._network = nn.parallel.DistributedDataParallel(self._network, device_ids=devices)
        self._keys = ops.sample_keys(config.seed, config.batch_size, device=work.device)[self._part]
        self._batches = batches_of(work.dataset, list(work.conditions), config, work.device, self._part)
        self._draws: Iterator[Draws] = iter(())
        self._next = -1

    def chunks(self, count: int) -> list[int]:
        return [1] * count

    def take(self, first: int, count: int) -> Tensor:
        """As `Steps.take`; with several ranks, returns this rank's weighted losses."""
        if first != self._next:
            self._draws = self._drawn_ahead(first)
        losses = [self._step(step) for step in range(first, first + count)]
        self._next = first + count
        return torch.stack(losses)

    def _step(self, step: int) -> Tensor:
        work, config, draws = self._work, self._work.config, next(self._draws)
        for group in work.optimizer.param_groups:
            group["lr"] = config.learning_rate(step)
        if work.importance is not None:
            draws = draws._replace(coefficients=work.importance.coefficients(self._keys, step))
        x_0, conditions = self._batches.take(step, draws.data_index)
        x_0 = load_batch(x_0, None, **work.scaling)
        if work.dropout or config.flip:
            u = condition_draws(self._keys, step)
            conditions = drop_conditions(conditions, work.nulls, u[:, 0], work.dropout)
            x_0 = flip_images(x_0, u[:, 1]) if config.flip else x_0
        work.optimizer.zero_grad()
        with work.seeded(step, self._rank):
            losses = [
                self._backward(x_0, draws, conditions, rows, is_last=rows.stop == len(x_0))
                for rows in pieces(len(x_0), config.accumulation)
            ]
        if work.importance is not None:
            work.importance.move()
        clip_gradient(work.model, config.clip_norm)
        work.optimizer.step()
        if work.ema is not None:
            ema_update(work.ema, work.model, config.ema_decay_at(step))
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _backward(
        self, x_0: Tensor, draws: Draws, conditions: Mapping[str, Tensor], rows: slice, *, is_last: bool
    ) -> Tensor:
        """Adds the gradient of some rows of a batch, and returns their part of its loss."""
        # The ranks add their gradients once, with the last piece.
        waits = not is_last and isinstance(self._network, nn.parallel.DistributedDataParallel)
        with self._network.no_sync() if waits else nullcontext():
            loss = self._loss(x_0[rows], draws.of(rows), {name: each[rows] for name, each in conditions.items()})
            weight = self._weight * ((rows.stop - rows.start) / len(x_0))
            loss = loss * weight if weight != 1 else loss
            torch.autograd.backward(loss)
        return loss.detach()

    def _loss(self, x_0: Tensor, draws: Draws, conditions: Mapping[str, Tensor]) -> Tensor:
        work = self._work
        f = denoise(checked(self._network), x_0, draws, conditions, work.autocast)
        if work.importance is not None:
            losses = sample_losses(f, x_0, draws.coefficients, draws.z)
            work.importance.add(losses.detach())
            return losses.mean()
        return dsm_loss(f, x_0, None, 0, draws.coefficients, z=draws.z)

    def _drawn_ahead(self, first: int) -> Iterator[Draws]:
        """Yields the random numbers of each step from ``first`` on, drawn for several steps at once."""
        config, dataset = self._work.config, self._work.dataset
        ahead = max(1, _DRAW_ELEMENTS // (config.batch_size * max(4, math.prod(dataset.shape))))
        # Blocks start at multiples of their length, so that a resumed run draws in the same blocks.
        for start in range(first // ahead * ahead, config.steps, ahead):
            steps = torch.arange(start, min(start + ahead, config.steps), device=self._work.device)
            block = training_draws(self._keys, steps, len(dataset), dataset.shape, config.objective)
            for k in range(max(0, first - start), len(steps)):
                yield Draws(*(values[k] for values in block))


def checked(network: Any) -> Callable[..., Tensor]:
    """Returns a function that calls a network, and names what is wrong with its output or its conditions."""

    def call(x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        shape = x.shape  # a network may change x in place
        try:
            return check_output(network(x, t, **conditions), shape, x.device)
        except IndexError as error:
            given = [f"{name} {int(each.min())} .. {int(each.max())}" for name, each in conditions.items()]
            raise IndexError(
                f"the network failed with {', '.join(given) or 'no conditions'} (with condition_dropout, one more "
                f"label stands for none): {error}"
            ) from error

    return call


def pieces(n: int, count: int) -> list[slice]:
    """Returns the rows of a batch of n in ``count`` pieces, or in n if that is less."""
    count = min(count, n)
    return [slice(number * n // count, (number + 1) * n // count) for number in range(count)]


class NativeSteps:
    """Whole steps of a small network by a native CPU kernel: draws, network, loss, backward, Adam, the moving average.

    Raises:
        ValueError: if the kernel cannot train the network; see `can_run_natively`.
    """

    def __init__(self, work: Work) -> None:
        assert isinstance(work.dataset, Dataset)
        self._work, self._data, native = work, work.dataset, _native(work.model, work.dataset.shape)
        if native is None:
            raise ValueError(f"the native kernel cannot train a {type(work.model).__name__}")
        self._native = native
        self._keys = ops.sample_keys(work.config.seed, work.config.batch_size, device="cpu")
        size = (self._most, work.config.batch_size, len(Coefficients._fields))
        self._table = torch.empty(size, dtype=torch.float32, device="cpu")
        self._drawn = range(0)  # the steps whose coefficients the table has

    @property
    def _most(self) -> int:
        """The most steps that a call takes."""
        batch_size = self._work.config.batch_size
        products = batch_size * sum(each.numel() for each in self._work.model.parameters())
        return max(1, min(_NATIVE_STEPS, int(_NATIVE_PRODUCTS / products), _NATIVE_ROWS // batch_size))

    def chunks(self, count: int) -> list[int]:
        most = self._most
        return [min(most, count - first) for first in range(0, count, most)]

    def take(self, first: int, count: int) -> Tensor:
        """As `Steps.take`."""
        work, config, native = self._work, self._work.config, ops.kernel("mlp_training", self._keys.device)
        states = {
            id(source.parameter): self._state(source.parameter)
            for source in self._native.sources
            if source.parameter is not None
        }
        adam, of_ema = work.optimizer.param_groups[0], self._of_ema()
        with torch.no_grad():
            weights = self._native.weights()
            average, square = (
                self._native.items({key: state[kind] for key, state in states.items()}) for kind in _ADAM_KINDS
            )
            moving = None if of_ema is None else self._native.items(of_ema)
            losses: Tensor = native.mlp_training(
                native.Parameters(weights, average, square, moving),
                self._native.packed,
                self._data.x,
                self._keys,
                self._coefficients(first, count),
                **work.scaling,
                betas=adam["betas"],
                epsilon=adam["eps"],
                first=first,
                taken=int(next((int(state["step"]) for state in states.values()), 0)),
                rates=rates_of(config, first, count),
            )
        for state in states.values():
            state["step"] += count
        return losses

    def _of_ema(self) -> dict[int, Tensor] | None:
        """Returns the moving averages by the ids of the parameters."""
        work = self._work
        if work.ema is None:
            return None
        pairs = zip(work.model.parameters(), work.ema.parameters(), strict=True)
        return {id(parameter): average for parameter, average in pairs}

    def _coefficients(self, first: int, count: int) -> Tensor:
        """Returns the coefficients ``[count, B, 6]``, drawn along with later ones: waking the threads takes longest."""
        if not (first in self._drawn and first + count - 1 in self._drawn):
            self._drawn = range(first, first + len(self._table))
            drawn = ops.step_coefficients(
                self._work.config.objective, self._keys, first, len(self._table), out=self._table
            )
            self._table = drawn
        start = first - self._drawn.start
        return self._table[start : start + count]

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Returns Adam's state of a parameter, created as PyTorch does before the first step."""
        state: dict[str, Tensor] = self._work.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state |= {kind: torch.zeros_like(parameter, requires_grad=False) for kind in _ADAM_KINDS}
        return state


def rates_of(config: TrainConfig, first: int, count: int) -> Tensor:
    """Returns each step's learning rate, and 1 - the decay of the moving average: fp32 ``[count, 2]`` on the host."""
    steps = range(first, first + count)
    rates = [[config.learning_rate(step), 1 - config.ema_decay_at(step)] for step in steps]
    return torch.tensor(rates, dtype=torch.float32, device="cpu")
