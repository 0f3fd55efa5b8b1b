"""The request for a batch of samples: everything that an engine is given besides the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import noise, ops
from .adaptive import AdaptiveProblem
from .conditions import rows_of
from .guidance import Guidance, Weights
from .inverse import Problem
from .randomness import Seed, seed_of
from .recorder import Recorder
from .reference import NoiseFunction, RowHook
from .solvers import StepTable
from .validation import check_keys

__all__ = ["Conditions", "Request", "make_keys", "options_of"]

Conditions = tuple[Mapping[str, Any], Mapping[str, Any] | None]


@dataclass(frozen=True, eq=False)
class Request:
    """A batch to draw.

    Args:
        shape: ``(B, *shape)``.
        table: the solver.
        keys: int64 ``[B, 2]``, one key per sample.
        x_init: the initial state, which an engine may write to; by default the draw of step 0 times ``prior_std``.
        noise: ``(row, x) -> z`` instead of the draw of step ``row + 1``, or None.
        model_kwargs: further arguments of the network.
        guidance: the weights of guidance between ``model_kwargs`` and ``uncond_kwargs``, or None.
        dtype: the dtype of the state.
        callback: called as ``callback(row, time, x)`` after each row, or None.
        differentiable: whether gradients flow through the samples.
        adaptive: the problem of an adaptive solver, which takes the place of the table, or None.
        recorder: keeps states, updates the progress bar and runs the callback; made by the sampler.
        problem: known values and corrections, or None; an engine resolves it by `fastsde.engines.corrected`.
        hooks: called as the callback is, before the recorder.
    """

    shape: tuple[int, ...]
    table: StepTable
    keys: Tensor
    x_init: Tensor | None = None
    prior_std: float = 1.0
    noise: NoiseFunction | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    guidance: Weights | None = None
    uncond_kwargs: Mapping[str, Any] | None = None
    dtype: torch.dtype = torch.float32
    callback: RowHook | None = None
    differentiable: bool = False
    adaptive: AdaptiveProblem | None = None
    recorder: Recorder | None = None
    problem: Problem | None = None
    hooks: tuple[RowHook, ...] = ()

    @property
    def conditions(self) -> Conditions:
        """The arguments of the network's call, and those of the unconditional call or None."""
        return self.model_kwargs, None if self.guidance is None else self.uncond_kwargs or {}

    def conditions_of(self, row: int) -> tuple[Mapping[str, Any], Mapping[str, Any] | None, Any]:
        """The `conditions` in a row, and the network of the unconditional call, if it is another one."""
        if self.guidance is None or not self.guidance.guided[row]:
            return self.model_kwargs, None, None
        return *self.conditions, self.guidance.network

    def networks(self, network: Any) -> list[Any]:
        """The networks that are called, given the first: the second is that of the unconditional call, if another."""
        other = None if self.guidance is None else self.guidance.network
        return [network] if other is None else [network, other]

    @property
    def after_row(self) -> RowHook | None:
        """What is done after each row, in order: the hooks, and the recorder if it has anything to do."""
        hooks: list[RowHook] = [*self.hooks]
        if self.recorder is not None and self.recorder.is_busy:
            hooks.append(self.recorder)
        return hooks[0] if len(hooks) == 1 else _in_turn(hooks) if hooks else None

    @property
    def options(self) -> list[str]:
        """The names of the options in use that not every backend supports."""
        used = {
            "noise": self.noise is not None,
            "callback": self.callback is not None,
            "model_kwargs": bool(self.model_kwargs),
        }
        return [
            *(name for name, is_used in used.items() if is_used),
            *options_of(self.table, self.guidance, self.differentiable),
            *([] if self.problem is None else self.problem.options),
        ]

    @property
    def needs_gradients(self) -> bool:
        """Whether the network is differentiated."""
        return self.problem is not None and bool(self.problem.corrections)

    def probe(self) -> Request:
        """Returns a request for the first row only, to be timed."""
        return replace(self, table=self.table.head(1), x_init=None, noise=None, recorder=None)

    def start(self, normal: Callable[..., Tensor] = ops.normal) -> Tensor:
        """Returns the initial state, after the recorder has stored it.

        Args:
            normal: the function that draws it: `fastsde.ops.normal`, or the reference's.
        """
        x = self.x_init
        if x is None:
            x = normal(self.keys, 0, self.shape[1:]).to(self.dtype)
            x = x if self.prior_std == 1 else x * self.prior_std
        if self.recorder is not None:
            self.recorder.start(x)
        return x

    def part(self, part: slice, **changes: Any) -> Request:
        """Returns the request for some of the samples."""
        uncond = self.uncond_kwargs
        return replace(
            self,
            shape=(len(range(self.shape[0])[part]), *self.shape[1:]),
            keys=self.keys[part],
            # A copy: a network that works in place must not write to the caller's tensor.
            x_init=None if self.x_init is None else self.x_init[part].to(self.dtype, copy=True),
            model_kwargs=rows_of(self.model_kwargs, part),
            guidance=None if self.guidance is None else self.guidance.part(part),
            uncond_kwargs=None if uncond is None else rows_of(uncond, part),
            problem=None if self.problem is None else self.problem.part(part),
            **changes,
        )


def options_of(table: StepTable, guidance: Guidance | Weights | None, differentiable: bool) -> list[str]:
    """Returns the names of a sampler's own options in use that not every backend supports."""
    used = {
        "guidance": guidance is not None,
        "rescaled guidance": guidance is not None and guidance.rescale != 0,
        "Langevin rows": table.has_langevin,
        "differentiable": differentiable,
    }
    return [name for name, is_used in used.items() if is_used]


def _in_turn(hooks: Sequence[RowHook]) -> RowHook:
    """Returns a hook that runs several, each with the state that the one before leaves."""

    def run(row: int, time: float, x: Tensor) -> Tensor:
        for hook in hooks:
            replaced = hook(row, time, x)
            x = x if replaced is None else replaced
        return x

    return run


def make_keys(
    keys: Tensor | Sequence[int] | None, n: int, seed: Seed, first_sample: int, device: torch.device, plain: bool
) -> Tensor:
    """Returns the keys of ``n`` samples, int64 ``[n, 2]``: from one seed, or from ``keys``, given as keys or seeds.

    Args:
        plain: whether to make them by the reference instead of a kernel.
    """
    if keys is None:
        make = noise.sample_keys if plain else ops.sample_keys
        return make(seed_of(seed), n, first_sample, device=device)
    if seed != 0 or first_sample != 0:
        raise ValueError(f"keys replace seed and first_sample: got seed={seed} and first_sample={first_sample} too")
    if isinstance(keys, Tensor) and keys.ndim == 2:
        return check_keys(keys, n, device)
    if not isinstance(keys, (Tensor, Sequence, np.ndarray)):
        raise TypeError(f"keys must be a tensor or a sequence of seeds, got {type(keys).__name__}")
    seeds = keys.tolist() if isinstance(keys, Tensor) else list(keys)
    if len(seeds) != n:
        raise ValueError(f"keys must have one key or seed for each of the {n} samples, got {len(seeds)}")
    bits = [noise.int64_bits(f"keys[{i}]", value) for i, value in enumerate(seeds)]
    pairs = torch.tensor([[seed, 0] for seed in bits], dtype=torch.int64, device="cpu").reshape(n, 2)
    return noise.fold_in(pairs, 0).to(device)
