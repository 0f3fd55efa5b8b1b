"""The reference as an engine."""

from __future__ import annotations

from torch import Tensor

from .. import noise, reference
from ..request import Request
from .network import Network

__all__ = ["run"]


def run(network: Network, request: Request) -> Tensor:
    """Runs `fastsde.reference.sample`."""
    return reference.sample(
        network,
        request.shape,
        request.table,
        request.keys,
        x_init=request.start(noise.normal),
        noise_function=request.noise,
        model_kwargs=request.model_kwargs,
        guidance=request.guidance,
        uncond_kwargs=request.uncond_kwargs,
        dtype=request.dtype,
        after_row=request.after_row,
        recompute=request.differentiable,
    )
