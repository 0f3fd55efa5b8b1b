"""What is trained, and training steps one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from .. import distributed, models, ops
from ..conditions import Condition
from ..data import Dataset
from ..data.streamed import StreamedDataset
from ..distributed import Ranks
from ..engines.inspection import check_output
from ..engines.unet_gradients import NativeUNet, has_native_gradients
from ..models import UNet
from ..randomness import generator_of, seeded
from ..reference import (
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

__all__ = ["EagerSteps", "Steps", "Work", "checked", "pieces", "rates_of"]

# Random numbers are drawn ahead, for as many steps at once as have at most about this many elements.
_DRAW_ELEMENTS = 1 << 17


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
        return NativeUNet(cast(UNet, model)) if self.native and has_native_gradients(model) else model

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


class EagerSteps:
    """Takes the steps of `fastsde.reference.train_step` one by one, on this rank's part of each batch.

    On the CPU native kernels compute a `UNet` and its gradients (`fastsde.engines.unet_gradients.NativeUNet`). With
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
            labels = {name: each for name, each in conditions.items() if not each.is_floating_point()}
            given = [f"{name} {int(each.min())} .. {int(each.max())}" for name, each in labels.items()]
            raise IndexError(
                f"the network failed with {', '.join(given) or 'no conditions'} (with condition_dropout, one more "
                f"label stands for none): {error}"
            ) from error

    return call


def pieces(n: int, count: int) -> list[slice]:
    """Returns the rows of a batch of n in ``count`` pieces, or in n if that is less."""
    count = min(count, n)
    return [slice(number * n // count, (number + 1) * n // count) for number in range(count)]


def rates_of(config: TrainConfig, first: int, count: int) -> Tensor:
    """Returns each step's learning rate, and 1 - the decay of the moving average: fp32 ``[count, 2]`` on the host."""
    steps = range(first, first + count)
    rates = [[config.learning_rate(step), 1 - config.ema_decay_at(step)] for step in steps]
    return torch.tensor(rates, dtype=torch.float32, device="cpu")
