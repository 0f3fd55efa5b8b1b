"""The network's output where each sample has a time of its own, as adaptive steps need it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..conditions import rows_of
from ..lowering import Vectors
from ..models.mlp import is_sequential
from ..reference import evaluate, guided
from ..request import Conditions, Request
from ..solvers import StepTable
from . import eager
from .capture import CaptureError
from .network import Network
from .programs import numbers_of

__all__ = ["Output"]


class Output:
    """The network's output with guidance, called as ``output(x, t, samples)``.

    A small network on the CPU runs natively, like a trajectory of one row (`_ByProgram`).

    Args:
        request: whose conditions and guidance the network is given.
    """

    def __init__(self, network: Network, request: Request) -> None:
        self._network, self._request = network, request
        self._samples: Tensor | None = None
        self._conditions: Conditions = request.conditions
        self._program = _ByProgram.find(network, request)

    def __call__(self, x: Tensor, t: Tensor, samples: Tensor) -> Tensor:
        """Returns the output ``[b, *shape]`` in x's dtype, which may be overwritten by the next call.

        Args:
            x: ``[b, *shape]``.
            t: float64 ``[b]``.
            samples: which samples of the request these are, int64 ``[b]``.
        """
        if self._program is not None:
            return self._program(x, t, samples)
        if samples is not self._samples:
            given, uncond = self._request.conditions
            self._samples = samples
            self._conditions = rows_of(given, samples), None if uncond is None else rows_of(uncond, samples)
        f, f_uncond = evaluate(self._network, x, t.to(x.dtype), *self._conditions)
        weights = self._request.guidance
        return guided(f.to(x.dtype), f_uncond, None if weights is None else weights.scale[samples])


class _Joint(nn.Module):
    """A network of (x, t) side by side, ``[B, d + 1]``, which returns its output and t side by side.

    In a program all samples of a row share its time; here each has its own, as one more element of its state.
    """

    def __init__(self, model: nn.Module, shape: torch.Size) -> None:
        super().__init__()
        self.model, self.shape = model, tuple(shape)

    def forward(self, y: Tensor, _: Tensor, **kwargs: Any) -> Tensor:
        x, t = y[:, :-1].reshape(len(y), *self.shape), y[:, -1]
        f = self.model(torch.cat((x, t[:, None]), -1)) if is_sequential(self.model) else self.model(x, t, **kwargs)
        return torch.cat((f.reshape(len(y), math.prod(self.shape)), y[:, -1:]), 1)


class _ByProgram:
    """A small network's output by the native kernel of whole trajectories (`fastsde.engines.persistent`)."""

    def __init__(self, packed: Any, vectors: Vectors, request: Request) -> None:
        self._packed, self._vectors, self._request = packed, vectors, request
        self._samples: Tensor | None = None
        self._now = vectors

    @classmethod
    def find(cls, network: Network, request: Request) -> _ByProgram | None:
        """Returns the network's output by a program, or None if it has none."""
        can_run = network.is_optimized and network.compiler is None and network.dtype == torch.float32
        if not (can_run and ops.has_native(network.device) and isinstance(network.model, nn.Module)):
            return None
        varies = request.guidance is not None and request.guidance.number is None
        if varies or not request.shape[0]:
            return None
        size = math.prod(request.shape[1:])
        joint = network.inside(_Joint, request.shape[1:])
        one = torch.ones(1, dtype=torch.float64, device="cpu")
        call = Request(
            (request.shape[0], size + 1),
            StepTable(one, a=0 * one, b=one),  # the next state is the output
            request.keys,
            model_kwargs=request.model_kwargs,
            guidance=request.guidance,
            uncond_kwargs=request.uncond_kwargs,
        )
        try:
            return cls(*numbers_of(joint, call), call)
        except CaptureError:
            return None
        except Exception:
            eager.run(network, request.probe())  # raises the network's own error, with its arguments, if it was that
            raise

    def __call__(self, x: Tensor, t: Tensor, samples: Tensor) -> Tensor:
        if samples is not self._samples:
            self._samples, self._now = samples, replace(self._vectors, given=self._vectors.given[samples])
        y = torch.cat((x.reshape(len(x), -1), t.to(x.dtype)[:, None]), 1)
        keys = self._request.keys[: len(x)]  # nothing is drawn
        out = ops.launch_mlp_sampler(self._packed, self._request.table, keys, vectors=self._now, x_init=y)
        return out[:, :-1].reshape(x.shape)
