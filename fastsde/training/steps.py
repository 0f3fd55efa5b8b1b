"""Ways to take training steps: one by one, or dozens at once by a native kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import distributed, ops
from ..data import Dataset
from ..distributed import Ranks
from ..models.mlp import linear_layers
from ..objective import Coefficients
from ..reference import Draws, ema_update, train_step, training_draws
from .config import TrainConfig

__all__ = ["EagerSteps", "NativeSteps", "Steps", "Work", "can_run_natively", "rates_of"]

# Random numbers are drawn ahead, for as many steps at once as have at most about this many elements.
_DRAW_ELEMENTS = 1 << 17
_ADAM_KINDS = ("exp_avg", "exp_avg_sq")
# The most steps in a native call, the approximate products of weights and samples, and the rows of coefficients, which
# are made before it: Ctrl-C takes effect between two calls, within about a second. Beyond the width the weights leave
# the cache, and PyTorch is faster.
_NATIVE_STEPS, _NATIVE_PRODUCTS, _NATIVE_ROWS, _NATIVE_WIDTH = 500, 1e10, 1 << 22, 1024


@dataclass
class Work:
    """What is trained, and on which data and device."""

    config: TrainConfig
    model: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer
    dataset: Dataset
    device: torch.device

    def as_called(self, model: nn.Module) -> Any:
        """Returns the model, or a copy of it, as a step calls it."""
        return torch.compile(model) if self.config.compile else model

    @property
    def scaling(self) -> dict[str, Any]:
        """The scale and shift of the data, as arguments of the functions of a step."""
        return {"scale": self.dataset.scale, "shift": self.dataset.shift}

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.config.precision == "bf16" else None


class Steps(Protocol):
    """Takes steps, some at once."""

    def chunks(self, count: int) -> list[int]:
        """Returns how many of the next ``count`` steps to take at once, in order."""

    def take(self, first: int, count: int) -> Tensor:
        """Takes the steps ``first`` to ``first + count - 1`` and returns their losses, fp32 ``[count]``."""


def can_run_natively(config: TrainConfig, model: nn.Module, device: torch.device, here: Ranks) -> bool:
    """Returns whether the native kernel can take the steps: those of an MLP in fp32 on the CPU, in one process."""
    layers = linear_layers(model)
    if layers is None or config.compile or config.precision != "fp32" or here.world > 1:
        return False
    fit = max(max(each.shape) for each in model.parameters()) <= _NATIVE_WIDTH
    plain = all(each.dtype == torch.float32 and each.is_contiguous() for each in model.parameters())
    if not (fit and plain and ops.has_native(device, "mlp_training")):
        return False
    return bool(ops.kernel("mlp_training", device).takes(layers[1]))


class EagerSteps:
    """Runs `fastsde.reference.train_step` step by step, on this rank's part of each batch."""

    def __init__(self, work: Work, here: Ranks) -> None:
        self._work, self._network = work, work.as_called(work.model)
        batch_size = work.config.batch_size
        self._part = distributed.shard(batch_size, here.rank, here.world)
        self._weight = distributed.loss_weight(batch_size, here.rank, here.world)
        if here.world > 1:
            devices = [work.device] if work.device.type == "cuda" else None
            self._network = nn.parallel.DistributedDataParallel(self._network, device_ids=devices)
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
        work, config = self._work, self._work.config
        for group in work.optimizer.param_groups:
            group["lr"] = config.learning_rate(step)
        loss = train_step(
            self._network,
            work.optimizer,
            work.dataset.x,
            None,
            step,
            config.objective,
            **work.scaling,
            autocast=work.autocast,
            draws=next(self._draws),
            loss_weight=self._weight,
        )
        if work.ema is not None:
            ema_update(work.ema, work.model, config.ema_decay_at(step))
        return loss

    def _drawn_ahead(self, first: int) -> Iterator[Draws]:
        """Yields the random numbers of each step from ``first`` on, drawn for several steps at once."""
        config, dataset = self._work.config, self._work.dataset
        keys = ops.sample_keys(config.seed, config.batch_size, device=self._work.device)[self._part]
        ahead = max(1, _DRAW_ELEMENTS // (config.batch_size * max(4, math.prod(dataset.shape))))
        # Blocks start at multiples of their length, so that a resumed run draws in the same blocks.
        for start in range(first // ahead * ahead, config.steps, ahead):
            steps = torch.arange(start, min(start + ahead, config.steps), device=self._work.device)
            block = training_draws(keys, steps, len(dataset), dataset.shape, config.objective)
            for k in range(max(0, first - start), len(steps)):
                yield Draws(*(values[k] for values in block))


class NativeSteps:
    """Whole steps of an MLP by a native CPU kernel: draws, network, loss, backward, Adam and the moving average."""

    def __init__(self, work: Work) -> None:
        self._work = work
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
        weights, activations = _parameters(work.model)
        states = [None if each is None else self._state(each) for each in weights]
        average, square = ([None if state is None else state[kind] for state in states] for kind in _ADAM_KINDS)
        moving = None if work.ema is None else _parameters(work.ema)[0]
        adam = work.optimizer.param_groups[0]
        with torch.no_grad():
            losses: Tensor = native.mlp_training(
                native.Parameters(weights, average, square, moving),
                activations,
                work.dataset.x,
                self._keys,
                self._coefficients(first, count),
                **work.scaling,
                betas=adam["betas"],
                epsilon=adam["eps"],
                first=first,
                taken=int(next(state["step"] for state in states if state is not None)),
                rates=rates_of(config, first, count),
            )
        for state in states:
            if state is not None:
                state["step"] += count
        return losses

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


def _parameters(model: nn.Module) -> tuple[list[Any], list[str]]:
    """Returns the weight and the bias (or None) of each layer of an MLP, and the activations."""
    linears, activations = linear_layers(model) or ([], [])
    return [each for linear in linears for each in (linear.weight, linear.bias)], activations


def rates_of(config: TrainConfig, first: int, count: int) -> Tensor:
    """Returns each step's learning rate, and 1 - the decay of the moving average: fp32 ``[count, 2]`` on the host."""
    steps = range(first, first + count)
    rates = [[config.learning_rate(step), 1 - config.ema_decay_at(step)] for step in steps]
    return torch.tensor(rates, dtype=torch.float32, device="cpu")
