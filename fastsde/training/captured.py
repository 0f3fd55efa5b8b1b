"""Training steps as CUDA graphs, dozens of them in one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..distributed import Ranks
from ..engines import capture
from ..engines.chunks import MAX_CHUNK, chunks_of_fixed_lengths
from ..engines.mixed_precision import LowPrecisionCopy
from .steps import Work, rates_of

__all__ = ["CapturedSteps", "can_capture"]

_WARM_UPS = 3


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
        self._copy = None if work.autocast is None else LowPrecisionCopy(work.model, work.autocast)
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
        self._recording = capture.Recording(device)
        self._graphs: dict[int, Callable[[], None]] = {}
        self._warm_ups = 0

    def chunks(self, count: int) -> list[int]:
        first = min(count, _WARM_UPS - self._warm_ups)
        return [1] * first + chunks_of_fixed_lengths(count - first)

    def take(self, first: int, count: int) -> Tensor:
        """As `Steps.take`.

        Raises:
            CaptureError: if the steps cannot be captured; none of them has then been taken.
        """
        if count not in self._graphs:
            _detach_from_other_graphs(self._work.model)
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
        """Writes what differs in each replay to device memory, without waiting for the device."""
        rates = rates_of(self._work.config, first, count)
        if self._work.device.type == "cuda":
            rates = rates.pin_memory()  # PyTorch does not reuse this memory before the copy has run
        self._rates[:count].copy_(rates, non_blocking=True)
        self._first.fill_(first)

    def _steps(self, count: int) -> None:
        config, size = self._work.config, self._work.config.batch_size
        ops.data_order(self._keys[:size], self._first, len(self._work.dataset), self._index[:count, :size])
        coefficients = ops.step_coefficients(config.objective, self._keys, 0, count, counter=self._first)
        for i in range(count):
            self._losses[i] = self._step(i, coefficients[i, :size])

    def _step(self, i: int, coefficients: Tensor) -> Tensor:
        work, size = self._work, self._work.config.batch_size
        given: dict[str, Any] = {"index": self._index[i, :size], "counter": self._first, **work.scaling}
        drawn = (work.dataset.x, self._keys[:size], i, coefficients)
        self._clear_gradients()
        x_in, tau, _ = ops.perturb(*drawn, dtype=work.autocast, **given)
        with torch.autocast(x_in.device.type, dtype=work.autocast, enabled=work.autocast is not None):
            f = self._network(x_in, tau)
        loss = ops.dsm_loss(f, *drawn, **given)
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
        averages: list[Tensor] = list(ema.parameters())
        steps: list[Tensor] = list(torch._foreach_sub([each.detach() for each in model.parameters()], averages))
        torch._foreach_mul_(steps, weight)
        torch._foreach_add_(averages, steps)
