"""The divergence of a network's output with respect to x: exact, or by Hutchinson's estimator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import noise
from ..engines import Network
from ..validation import check_int
from ..vocabulary import TRACES

__all__ = ["DEQUANTISATION_STEP", "EXACT_ELEMENTS", "PROBE_STEP", "Divergence", "probes_of"]

EXACT_ELEMENTS = 32  # up to so many elements of a sample, "auto" is exact

# Steps of stream 4. Step 0 draws labels (`fastsde.conditions`).
DEQUANTISATION_STEP = 1
PROBE_STEP = 2  # and on, one for each probe

_AT_ONCE = 32  # products that are vectorised together


def probes_of(trace: str, probes: int, elements: int) -> int:
    """Returns the number of probes for samples with so many elements, 0 for the exact trace.

    Raises:
        ValueError, TypeError: for an unknown trace, less than one probe, or probes that an exact trace does not take.
    """
    if trace not in TRACES:
        raise ValueError(f"trace must be one of {', '.join(TRACES)}, got {trace!r}")
    check_int("probes", probes, 1)
    if trace == "exact" and probes != 1:
        raise ValueError(f"probes are of trace='hutchinson': leave them out for the exact trace, got {probes}")
    return 0 if trace == "exact" or (trace == "auto" and elements <= EXACT_ELEMENTS) else probes


class Divergence:
    """A network's output f(x, t) with its divergence tr(df/dx), by vector-Jacobian products e^T (df/dx).

        exact         sum of e^T (df/dx) e over the unit vectors e
        Hutchinson    mean of e^T (df/dx) e over probes e of random signs, for which E[e e^T] = 1

    (Hutchinson 1990; FFJORD, Grathwohl et al. 2019, arXiv:1810.01367, eq. 8.) The same probes serve the whole
    trajectory of a sample, so that the estimate is that of one integral. On CPUs a product in reverse mode takes half
    the time of one in forward mode; several are vectorised by ``vmap``, or taken one by one if the network refuses it.

    Args:
        network: only gradients with respect to x are computed; those of its weights stay as they are.
        keys: the keys of the samples, int64 ``[B, 2]``.
        shape: the shape of one sample.
        probes: how many probes to average over; 0 for the exact trace.
        may_be_native: whether a native kernel may take its place (`fastsde.likelihood.native`).

    Attributes:
        signs: the probes, fp32 ``[probes, B, *shape]``, or None.
    """

    def __init__(
        self, network: Network, keys: Tensor, shape: Sequence[int], probes: int, may_be_native: bool = False
    ) -> None:
        self.network, self.keys, self._shape = network, keys, tuple(shape)
        self.elements, self.probes, self.may_be_native = math.prod(shape), probes, may_be_native
        steps = torch.arange(PROBE_STEP, PROBE_STEP + probes, device=keys.device)
        self.signs = noise.signs(keys, steps, shape, noise.STREAM_OTHER) if probes else None
        self._vectorises = True

    def __call__(
        self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any], samples: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns f in the dtype of x ``[b, *shape]``, and its divergence float64 ``[b]``.

        Args:
            x, t: ``[b, *shape]`` and ``[b]``.
            samples: the indices int64 ``[b]`` of the samples, if these are not all.

        Raises:
            ValueError: if autograd does not follow the network.
        """
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            f = self.network(x, t, **kwargs)
            if not f.requires_grad and f.numel():
                raise ValueError(
                    "model must be differentiable with respect to x for a likelihood, got an output without a "
                    "gradient: does it run under torch.no_grad or torch.inference_mode, or detach x?"
                )
            total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
            batches = [range(i, min(i + _AT_ONCE, self._count)) for i in range(0, self._count, _AT_ONCE)]
            for batch in batches if f.numel() else ():
                vectors = self._vectors(batch, f, samples)
                products = self._products(f, x, vectors, batch is not batches[-1])
                total += (products * vectors)[:, :, None].flatten(2).sum(2, dtype=torch.float64).sum(0)
        return f.detach().to(x.dtype), total / max(self.probes, 1)

    @property
    def _count(self) -> int:
        return self.probes or self.elements

    def _vectors(self, batch: range, f: Tensor, samples: Tensor | None) -> Tensor:
        """Returns some of the unit vectors or probes, ``[P, b, *shape]``, like f."""
        if self.signs is None:
            unit = torch.eye(self.elements, dtype=f.dtype, device=f.device)[batch.start : batch.stop]
            return unit.reshape(len(batch), 1, *self._shape).expand(len(batch), *f.shape)
        signs = self.signs[batch.start : batch.stop].to(f.dtype)
        return signs if samples is None else signs[:, samples]

    def _products(self, f: Tensor, x: Tensor, vectors: Tensor, keep: bool) -> Tensor:
        """Returns e^T (df/dx) for each vector e, ``[P, b, *shape]``.

        Args:
            keep: whether more products of the same output follow.
        """
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        if self._vectorises and len(vectors) > 1:
            try:
                (products,) = torch.autograd.grad(f, x, vectors, retain_graph=True, is_grads_batched=True, **options)
                return products
            except RuntimeError:  # an operation without a rule for vmap, which the loop does not need
                self._vectorises = False
        each = []
        for i, vector in enumerate(vectors):
            (product,) = torch.autograd.grad(f, x, vector, retain_graph=keep or i + 1 < len(vectors), **options)
            each.append(product)
        return torch.stack(each)
