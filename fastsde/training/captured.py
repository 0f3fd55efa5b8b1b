"""Training steps as CUDA graphs, dozens of them in one launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import noise, ops
from ..data.streamed import StreamedDataset
from ..distributed import Ranks
from ..engines import capture
from ..engines.chunks import MAX_CHUNK, chunks_of_fixed_lengths
from ..engines.mixed_precision import LowPrecisionCopy
from ..randomness import generator_of
from ..reference import (
    averaged,
    clip_gradient,
    condition_draws,
    copy_buffers,
    drop_conditions,
    flip_images,
    load_batch,
    sample_losses,
)
from .batches import Batch, batches_of
from .steps import Work, checked, pieces, rates_of

__all__ = ["CapturedSteps", "can_capture"]

_WARM_UPS = 3
_RING = 5  # the most steps of a launch of streamed data
_NO_INDEX = torch.empty(0, dtype=torch.int64)  # streamed batches know their own positions


def can_capture(device: torch.device, here: Ranks) -> bool:
    """Returns whether steps can be captured: on one GPU."""
    return here.world == 1 and capture.can_record(device) and ops.has_triton(device)


class CapturedSteps:
    """Whole steps as CUDA graphs: gather, noising, network, loss, backward, Adam and the moving average.

    The first steps are taken without a graph, which warms up what is then captured; any other thread that captures also
    takes one such step first. The number of the first step, the learning rates and the decays are written to device
    memory before each replay; a graph begins with the data order of its steps.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        # Pieces of a batch add their gradients in fp32.
        copies = work.autocast is not None and work.config.accumulation == 1 and LowPrecisionCopy.fits(work.model)
        self._copy = LowPrecisionCopy(work.model, work.autocast) if copies and work.autocast is not None else None
        self._network = work.as_called(work.model if self._copy is None else self._copy.network)
        config, device = work.config, work.device
        # Rows of a multiple of 16 bytes: for any other row a kernel would be compiled again, during a capture.
        width = config.batch_size + config.batch_size % 2
        self._keys = ops.sample_keys(config.seed, width, device=device)
        self._first = torch.zeros(1, dtype=torch.int64, device=device)
        self._index = torch.zeros((MAX_CHUNK, width), dtype=torch.int64, device=device)
        self._rates = torch.zeros((MAX_CHUNK, 2), dtype=torch.float32, device=device)
        self._losses = torch.zeros(MAX_CHUNK, dtype=torch.float32, device=device)
        self._one = torch.ones((), dtype=torch.float32, device=device)  # the gradient of a loss
        for group in work.optimizer.param_groups:
            group["lr"] = torch.zeros((), dtype=torch.float32, device=device)
        self._numbers = torch.arange(MAX_CHUNK, dtype=torch.int64, device=device)
        self._ring = _Ring(work, _RING) if isinstance(work.dataset, StreamedDataset) else None
        self._recording = capture.Recording(device)
        self._graphs: dict[int, Callable[[], None]] = {}
        self._warm_ups = 0
        self._generator = generator_of(device)
        self._draws = False  # whether the network draws random numbers of its own

    def chunks(self, count: int) -> list[int]:
        first = min(count, _WARM_UPS - self._warm_ups)
        lengths = [1] * first + chunks_of_fixed_lengths(count - first)
        if self._ring is None:
            return lengths
        return [min(_RING, each) for each in lengths for _ in range(-(-each // _RING))]

    def take(self, first: int, count: int) -> Tensor:
        """As `Steps.take`.

        Raises:
            CaptureError: if the steps cannot be captured; none of them has then been taken.
        """
        if self._draws and count > 1:  # what a step draws must not depend on how many others it is launched with
            return torch.cat([self.take(step, 1) for step in range(first, first + count)])
        with self._work.seeded(first):
            return self._take(first, count)

    def _take(self, first: int, count: int) -> Tensor:
        if count not in self._graphs:
            _detach_from_other_graphs(self._work.model)
        if self._warm_ups < _WARM_UPS or (count not in self._graphs and not self._recording.is_warm):
            self._write(first, count)
            before = self._generator.get_state()
            self._recording.warm_up(lambda: self._steps(count))
            self._draws = self._draws or not torch.equal(before, self._generator.get_state())
            self._warm_ups += 1
        else:
            if count not in self._graphs:
                self._graphs[count] = self._recording.record(lambda: self._steps(count))
            self._write(first, count)
            self._graphs[count]()
        return self._losses[:count].clone()

    def _write(self, first: int, count: int) -> None:
        """Writes what differs in each replay to device memory, without waiting for the device."""
        rates = rates_of(self._work.config, first, count)
        if self._work.device.type == "cuda":
            rates = rates.pin_memory()  # PyTorch does not reuse this memory before the copy has run
        self._rates[:count].copy_(rates, non_blocking=True)
        self._first.fill_(first)
        if self._ring is not None:
            self._ring.fill(first, count)

    def _steps(self, count: int) -> None:
        work, config, size = self._work, self._work.config, self._work.config.batch_size
        keys, n = self._keys[:size], len(work.dataset)
        if self._ring is None:
            ops.data_order(keys, self._first, n, self._index[:count, :size])
        coefficients = u = None
        if work.importance is None:
            coefficients = ops.step_coefficients(config.objective, self._keys, 0, count, counter=self._first)[:, :size]
        if work.dropout or config.flip:
            u = condition_draws(keys, self._first + self._numbers[:count])
        for i in range(count):
            here = coefficients[i] if coefficients is not None else self._important(i)
            self._losses[i] = self._step(i, here, None if u is None else u[i])

    def _important(self, i: int) -> Tensor:
        """Returns the coefficients of step i, which depend on the losses of the steps before."""
        assert self._work.importance is not None
        keys = self._keys[: self._work.config.batch_size]
        return self._work.importance.coefficients(keys, self._first + i)

    def _step(self, i: int, coefficients: Tensor, u: Tensor | None) -> Tensor:
        work, config, size = self._work, self._work.config, self._work.config.batch_size
        data, values = work.data() if self._ring is None else self._ring.of(i)
        index: Tensor | None = self._index[i, :size] if self._ring is None else None
        conditions = {name: value if index is None else value[index] for name, value in values.items()}
        if u is not None:
            conditions = drop_conditions(conditions, work.nulls, u[:, 0], work.dropout)
            if config.flip:
                data, index = flip_images(data if index is None else data[index], u[:, 1]), None
        self._clear_gradients()
        losses = [
            self._backward(i, rows, coefficients[rows], data, index, conditions)
            for rows in pieces(size, config.accumulation)
        ]
        if work.importance is not None:
            work.importance.move()
        if self._copy is not None:
            self._copy.hand_over()
        clip_gradient(work.model, config.clip_norm)
        for group in work.optimizer.param_groups:
            group["lr"].copy_(self._rates[i, 0])
        work.optimizer.step()
        if work.ema is not None:
            _move(work.ema, work.model, self._rates[i, 1])
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _backward(
        self,
        i: int,
        rows: slice,
        coefficients: Tensor,
        data: Tensor,
        index: Tensor | None,
        conditions: Mapping[str, Tensor],
    ) -> Tensor:
        """Adds the gradient of some rows of a batch, and returns their part of its loss."""
        work, size = self._work, self._work.config.batch_size
        given: dict[str, Any] = {"counter": self._first, **work.scaling}
        if index is None:
            data = data[rows]
        else:
            given["index"] = index[rows]
        drawn = (data, self._keys[:size][rows], i, coefficients)
        x_in, tau, _ = ops.perturb(*drawn, dtype=work.autocast, **given)
        with torch.autocast(x_in.device.type, dtype=work.autocast, enabled=work.autocast is not None):
            f = checked(self._network)(x_in, tau, **{name: value[rows] for name, value in conditions.items()})
        if work.importance is not None:
            # The kernel keeps no losses of samples; the noise is drawn again, as in the kernel.
            keys, step = self._keys[:size][rows], self._first + i
            z = noise.normal(keys, step, data.shape[1:], noise.STREAM_TRAINING_NOISE)[0]
            x_0 = load_batch(data, given.get("index"), **work.scaling)
            each = sample_losses(f.float(), x_0, coefficients, z)
            work.importance.add(each.detach())
            loss = each.mean()
        else:
            loss = ops.dsm_loss(f, *drawn, **given)
        share = (rows.stop - rows.start) / size
        loss = loss * share if share != 1 else loss
        torch.autograd.backward(loss, self._one)
        return loss.detach()

    def _clear_gradients(self) -> None:
        if self._copy is None:
            self._work.optimizer.zero_grad(set_to_none=True)
        else:
            self._copy.refresh()


class _Ring:
    """Static memory for the batches of a launch of streamed data, which a graph reads.

    Args:
        steps: the most steps of a launch.
    """

    def __init__(self, work: Work, steps: int) -> None:
        config = work.config
        self._batches = batches_of(work.dataset, list(work.conditions), config, work.device, slice(config.batch_size))
        self._steps, self._memory = steps, list[Batch]()

    def fill(self, first: int, count: int) -> None:
        """Copies the batches of ``count`` steps from ``first`` on."""
        for i in range(count):
            batch = self._batches.take(first + i, _NO_INDEX)
            if not self._memory:
                self._memory = [
                    Batch(torch.zeros_like(batch.x_0), {k: torch.zeros_like(v) for k, v in batch.conditions.items()})
                    for _ in range(self._steps)
                ]
            here = self._memory[i]
            here.x_0.copy_(batch.x_0)
            for name, value in batch.conditions.items():
                here.conditions[name].copy_(value)

    def of(self, i: int) -> Batch:
        """Returns the batch of the i-th step of the launch."""
        return self._memory[i]


def _detach_from_other_graphs(model: nn.Module) -> None:
    """Makes the next backward pass independent of autograd graphs that somebody still holds, such as that of a loss.

    Such a graph keeps the node that adds to a parameter's gradient, and the node keeps the stream that was current when
    it was made, which a recording must not wait for. PyTorch makes a new node after the dtype of the data has changed.
    For that moment the parameters are empty, and hooks on the old node are lost; those on a parameter are not.
    """
    for parameter in model.parameters():
        data = parameter.data
        parameter.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
        parameter.data = data


def _move(ema: nn.Module, model: nn.Module, weight: Tensor) -> None:
    """Does what `fastsde.reference.ema_update` does, with ``weight`` = 1 - decay on the device."""
    with torch.no_grad():
        averages, weights = averaged(ema, model)
        steps: list[Tensor] = list(torch._foreach_sub(weights, averages))
        torch._foreach_mul_(steps, weight)
        torch._foreach_add_(averages, steps)
    copy_buffers(ema, model)
