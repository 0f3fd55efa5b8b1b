"""Ways to take training steps: one after the other, or dozens of them at once, by a native kernel or as CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .. import distributed, ops
from ..data import Dataset
from ..distributed import Ranks
from ..models.mlp import linear_layers
from ..reference import Draws, ema_update, train_step, training_draws
from . import capture
from .chunks import MAX_CHUNK, chunks_of_fixed_lengths
from .mixed_precision import LowPrecisionCopy

if TYPE_CHECKING:
    from ..training import TrainConfig

__all__ = ["CapturedSteps", "EagerSteps", "NativeSteps", "Steps", "Work", "can_capture", "can_run_natively"]

# Random numbers are drawn ahead, for as many steps at once as keep a draw below this many elements.
_DRAW_ELEMENTS = 1 << 17
_WARM_UPS = 3
_ADAM_KINDS = ("exp_avg", "exp_avg_sq")
# A native call takes at most so many steps, and about so many products of weights and samples: between two calls,
# within about a second, Ctrl-C is heard. Beyond the width the weights leave the cache, and PyTorch is faster.
_NATIVE_STEPS, _NATIVE_PRODUCTS, _NATIVE_WIDTH = 500, 1e10, 1024


@dataclass
class Work:
    """What is trained, and on what."""

    config: TrainConfig
    model: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer
    dataset: Dataset
    device: torch.device

    def as_called(self, model: nn.Module) -> Any:
        """The model, or a copy of it, as a step calls it."""
        return torch.compile(model) if self.config.compile else model

    @property
    def scaling(self) -> dict[str, Any]:
        """What a network sees of the data, as the functions of a step take it."""
        return {"scale": self.dataset.scale, "shift": self.dataset.shift}

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.config.precision == "bf16" else None


class Steps(Protocol):
    """Takes steps, some at once."""

    def chunks(self, count: int) -> list[int]:
        """How many of the next ``count`` steps to take at once, in order."""

    def take(self, first: int, count: int) -> Tensor:
        """Takes the steps ``first`` to ``first + count - 1`` and returns their losses, fp32 ``[count]``."""


def can_capture(device: torch.device, here: Ranks) -> bool:
    """Whether steps can be captured: on one GPU."""
    return here.world == 1 and capture.can_record(device) and ops.has_triton(device)


def can_run_natively(config: TrainConfig, model: nn.Module, device: torch.device, here: Ranks) -> bool:
    """Whether the native kernel takes the steps: those of an MLP in fp32 on the CPU, in one process."""
    layers = linear_layers(model)
    if layers is None or config.compile or config.precision != "fp32" or here.world > 1:
        return False
    fit = max(max(each.shape) for each in model.parameters()) <= _NATIVE_WIDTH
    plain = all(each.dtype == torch.float32 and each.is_contiguous() for each in model.parameters())
    if not (fit and plain and ops.has_native(device, "mlp_training")):
        return False
    from ..kernels.cpu import mlp_training as native

    return bool(native.takes(layers[1], config.prediction, config.weighting))


class EagerSteps:
    """`fastsde.reference.train_step` for step after step, on this rank's part of each batch."""

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
        """As `Steps.take`; of several ranks, this one's weighted losses."""
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
            config.sde,
            **work.scaling,
            prediction=config.prediction,
            weighting=config.weighting,
            autocast=work.autocast,
            draws=next(self._draws),
            loss_weight=self._weight,
        )
        if work.ema is not None:
            ema_update(work.ema, work.model, config.ema_decay_at(step))
        return loss

    def _drawn_ahead(self, first: int) -> Iterator[Draws]:
        """The random numbers of each step from ``first`` on, drawn for several steps at once."""
        config, dataset = self._work.config, self._work.dataset
        keys = ops.sample_keys(config.seed, config.batch_size, device=self._work.device)[self._part]
        ahead = max(1, _DRAW_ELEMENTS // (config.batch_size * max(4, math.prod(dataset.shape))))
        # Blocks start at multiples of their length, so that a resumed run draws in the same blocks.
        for start in range(first // ahead * ahead, config.steps, ahead):
            steps = torch.arange(start, min(start + ahead, config.steps), device=self._work.device)
            block = training_draws(keys, steps, len(dataset), dataset.shape, config.t_min)
            for k in range(max(0, first - start), len(steps)):
                yield Draws(*(values[k] for values in block))


class NativeSteps:
    """Whole steps of an MLP by a kernel of the CPU: draws, network, loss, backward, Adam and the moving average."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._keys = ops.sample_keys(work.config.seed, work.config.batch_size, device="cpu")

    def chunks(self, count: int) -> list[int]:
        products = self._work.config.batch_size * sum(each.numel() for each in self._work.model.parameters())
        most = max(1, min(_NATIVE_STEPS, int(_NATIVE_PRODUCTS / products)))
        return [min(most, count - first) for first in range(0, count, most)]

    def take(self, first: int, count: int) -> Tensor:
        """As `Steps.take`."""
        from ..kernels.cpu.mlp_training import Parameters, mlp_training

        work, config = self._work, self._work.config
        weights, activations = _parameters(work.model)
        states = [None if each is None else self._state(each) for each in weights]
        average, square = ([None if state is None else state[kind] for state in states] for kind in _ADAM_KINDS)
        moving = None if work.ema is None else _parameters(work.ema)[0]
        adam = work.optimizer.param_groups[0]
        with torch.no_grad():
            losses: Tensor = mlp_training(
                Parameters(weights, average, square, moving),
                activations,
                work.dataset.x,
                self._keys,
                config.sde.beta_min,
                config.sde.beta_max,
                **work.scaling,
                t_min=config.t_min,
                prediction=config.prediction,
                weighting=config.weighting,
                betas=adam["betas"],
                epsilon=adam["eps"],
                first=first,
                taken=int(next(state["step"] for state in states if state is not None)),
                rates=_rates(config, first, count),
            )
        for state in states:
            if state is not None:
                state["step"] += count
        return losses

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """What Adam keeps of a parameter, as PyTorch makes it before the first step."""
        state: dict[str, Tensor] = self._work.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state |= {kind: torch.zeros_like(parameter, requires_grad=False) for kind in _ADAM_KINDS}
        return state


def _parameters(model: nn.Module) -> tuple[list[Any], list[str]]:
    """Weight and bias, or None, of each layer of an MLP, and the activations."""
    linears, activations = linear_layers(model) or ([], [])
    return [each for linear in linears for each in (linear.weight, linear.bias)], activations


def _rates(config: TrainConfig, first: int, count: int) -> Tensor:
    """Of each step the learning rate, and 1 - the decay of the moving average: fp32 ``[count, 2]`` on the host."""
    steps = range(first, first + count)
    rates = [[config.learning_rate(step), 1 - config.ema_decay_at(step)] for step in steps]
    return torch.tensor(rates, dtype=torch.float32, device="cpu")


class CapturedSteps:
    """Whole steps as CUDA graphs: gather, noising, network, loss, backward, Adam and the moving average.

    The first steps are taken as they are, which warms up what is then captured, as is one of each other thread that
    comes to capture some. The number of the first step, the learning rates and the decays lie in device memory, and are
    written there before each replay; a graph begins with the data order of its steps.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._copy = None if work.autocast is None else LowPrecisionCopy(work.model, work.autocast)
        self._network = work.as_called(work.model if self._copy is None else self._copy.network)
        config, device = work.config, work.device
        self._keys = ops.sample_keys(config.seed, config.batch_size, device=device)
        self._first = torch.zeros(1, dtype=torch.int64, device=device)
        # Rows of 16 bytes or a multiple: a kernel would be compiled anew, while it is captured, for one that is not.
        width = config.batch_size + config.batch_size % 2
        self._index = torch.zeros((MAX_CHUNK, width), dtype=torch.int64, device=device)
        self._rates = torch.zeros((MAX_CHUNK, 2), dtype=torch.float32, device=device)
        self._losses = torch.zeros(MAX_CHUNK, dtype=torch.float32, device=device)
        self._one = torch.ones((), dtype=torch.float32, device=device)  # the gradient of a loss
        for group in work.optimizer.param_groups:
            group["lr"] = torch.zeros((), dtype=torch.float32, device=device)
        self._recording = capture.Recording(device)
        self._graphs: dict[int, Callable[[], None]] = {}
        self._warm_ups = 0

    def chunks(self, count: int) -> list[int]:
        first = min(count, _WARM_UPS - self._warm_ups)
        return [1] * first + chunks_of_fixed_lengths(count - first)

    def take(self, first: int, count: int) -> Tensor:
        """As `Steps.take`.

        Raises:
            CaptureError: where the steps cannot be captured; none of them has then been taken.
        """
        if self._warm_ups < _WARM_UPS or (count not in self._graphs and not self._recording.is_warm):
            self._write(first, count)
            self._recording.warm_up(lambda: self._steps(count))
            self._warm_ups += 1
        else:
            if count not in self._graphs:
                self._graphs[count] = self._recording.record(lambda: self._steps(count))
            self._write(first, count)
            self._graphs[count]()
        return self._losses[:count].clone()

    def _write(self, first: int, count: int) -> None:
        """What is different in each replay, into device memory, without waiting for the device."""
        rates = _rates(self._work.config, first, count)
        if self._work.device.type == "cuda":
            rates = rates.pin_memory()  # PyTorch does not give this memory away before the copy has run
        self._rates[:count].copy_(rates, non_blocking=True)
        self._first.fill_(first)

    def _steps(self, count: int) -> None:
        config = self._work.config
        ops.data_order(self._keys, self._first, len(self._work.dataset), self._index[:count, : config.batch_size])
        for i in range(count):
            self._losses[i] = self._step(i)

    def _step(self, i: int) -> Tensor:
        work, config = self._work, self._work.config
        given: dict[str, Any] = {"index": self._index[i, : config.batch_size], "counter": self._first}
        given |= work.scaling
        self._clear_gradients()
        noising: dict[str, Any] = {"t_min": config.t_min, "dtype": work.autocast}
        x_t, t = ops.perturb(work.dataset.x, self._keys, i, config.sde, **noising, **given)
        with torch.autocast(x_t.device.type, dtype=work.autocast, enabled=work.autocast is not None):
            f = self._network(x_t, t)
        kinds: dict[str, Any] = {"prediction": config.prediction, "weighting": config.weighting}
        loss = ops.dsm_loss(f, work.dataset.x, t, self._keys, i, config.sde, **kinds, **given)
        torch.autograd.backward(loss, self._one)
        if self._copy is not None:
            self._copy.hand_over()
        for group in work.optimizer.param_groups:
            group["lr"].copy_(self._rates[i, 0])
        work.optimizer.step()
        if work.ema is not None:
            _move(work.ema, work.model, self._rates[i, 1])
        return loss.detach()

    def _clear_gradients(self) -> None:
        if self._copy is None:
            self._work.optimizer.zero_grad(set_to_none=True)
        else:
            self._copy.refresh()


def _move(ema: nn.Module, model: nn.Module, weight: Tensor) -> None:
    """`fastsde.reference.ema_update` with 1 - decay on the device."""
    with torch.no_grad():
        averages: list[Tensor] = list(ema.parameters())
        steps: list[Tensor] = list(torch._foreach_sub([each.detach() for each in model.parameters()], averages))
        torch._foreach_mul_(steps, weight)
        torch._foreach_add_(averages, steps)
