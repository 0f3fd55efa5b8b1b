"""The reference as an engine."""

from __future__ import annotations

from torch import Tensor

from .. import noise, reference
from ..request import Request
from .corrected import corrected
from .network import Network

__all__ = ["run"]


def run(network: Network, request: Request) -> Tensor:
    """Runs `fastsde.reference.sample`."""
    x = request.start(noise.normal)
    run_network, request = corrected(network, request, noise.normal)
    return reference.sample(
        run_network,
        request.shape,
        request.table,
        request.keys,
        x_init=x,
        noise_function=request.noise,
        model_kwargs=request.model_kwargs,
        guidance=request.guidance,
        uncond_kwargs=request.uncond_kwargs,
        dtype=request.dtype,
        after_row=request.after_row,
        recompute=request.differentiable,
    )
