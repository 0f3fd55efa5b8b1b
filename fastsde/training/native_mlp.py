"""Steps of a small network by a native CPU kernel, dozens at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..data import Dataset
from ..distributed import Ranks
from ..lowering import NotLowered, Source, lower
from ..models.hooks import has_gradient_hooks
from ..objective import Coefficients
from ..reference import MOST_ROWS
from .steps import Work, checked, rates_of

__all__ = ["NativeSteps", "can_run_natively"]

_ADAM_KINDS = ("exp_avg", "exp_avg_sq")
# The most steps in a native call, the approximate products of weights and samples, and the rows of coefficients, which
# are made before it: Ctrl-C takes effect between two calls, within about a second. Beyond the width the weights leave
# the cache, and PyTorch is faster.
_NATIVE_STEPS, _NATIVE_PRODUCTS, _NATIVE_ROWS, _NATIVE_WIDTH = 500, 1e10, 1 << 22, 1024


def can_run_natively(work: Work, here: Ranks) -> bool:
    """Returns whether the native kernel can take the steps: of a small network in fp32 on the CPU, in one process.

    It has no conditions, flips, clipping, weight decay, importance sampling of times, or hooks on gradients, and its
    data are in memory.
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
    if has_gradient_hooks(model):
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
