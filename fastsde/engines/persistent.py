"""The persistent engine: the whole trajectory of a small network in one launch, by the kernel ``mlp_sampler``.

It runs any network that is lowered to a program (`fastsde.lowering`): on the CPU in fp32, on a GPU in fp32 or bf16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops, tf32
from ..lowering import Vectors
from ..reference import NonFiniteError
from ..request import Request
from . import eager
from .network import Network
from .programs import CALL_FAILS, numbers_of, program_of

__all__ = ["pays", "run", "unavailable_reason"]

_FP32_WIDTH = 64
_COMPILE_S = 20.0


def unavailable_reason(
    network: Network,
    sample_shape: Sequence[int],
    device: torch.device,
    times: Tensor | None = None,
    request: Request | None = None,
    is_asked_for: bool = True,
) -> str | None:
    """Returns why the engine cannot run a network on samples of a shape on a device, or None if it can.

    Args:
        times: fp32 ``[K]``, of the table.
        request: whose conditions the network is given, if they are known.
        is_asked_for: whether no other engine may run it. A network that could not run is then looked at again; and one
            that cannot be called without conditions is not refused before they are known.
    """
    dtypes = (torch.float32,) if ops.has_native(device) else (torch.float32, torch.bfloat16)
    if network.dtype not in dtypes:
        return f"on {device.type} it runs networks in {' or '.join(map(str, dtypes))}, not in {network.dtype}"
    times = torch.ones(1, dtype=torch.float32, device=device) if times is None else times
    found = program_of(network, sample_shape, times, request, trusts=(tuple,) if is_asked_for else (tuple, str))
    if not isinstance(found, str) or (is_asked_for and found.startswith(CALL_FAILS)):
        return None  # the call itself raises the network's error
    return found


def pays(network: Network, sample_shape: Sequence[int], times: Tensor, request: Request | None) -> bool:
    """Returns whether "auto" picks the engine for a network that it can run. On a GPU it does not for wide values in
    fp32, whose weights do not stay on the chip, nor for programs that take long to compile. The number of samples must
    not matter, or a sample would depend on its batch by more than the rounding of one precision.

    Args:
        times, request: as for `unavailable_reason`.
    """
    if ops.has_native(network.device):
        return True
    found = program_of(network, sample_shape, times, request, trusts=(tuple, str))
    if isinstance(found, str):
        return False
    lowered, packed = found
    if packed.compile_seconds(_precision(network, network.device)) > _COMPILE_S:
        return False
    return network.dtype == torch.bfloat16 or max(lowered.program.widths) <= _FP32_WIDTH


def _precision(network: Network, device: torch.device) -> str:
    if network.dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if tf32.may_multiply(convolutions=False, device=device) else "fp32"


def run(network: Network, request: Request) -> Tensor:
    """Runs `fastsde.reference.sample` for a small network. The plan excludes requests that need the host between rows.

    Raises:
        NonFiniteError: if the network's output or the state becomes NaN or infinite.
    """
    batch, dim = request.shape[0], math.prod(request.shape[1:])
    recorder, draws = request.recorder, request.x_init is None and request.prior_std == 1  # drawn by the launch
    x_init = None if draws else request.start().reshape(batch, dim)
    states, every = (None, 1) if recorder is None else (recorder.states, recorder.every)
    kept = None if states is None else states.new_empty((len(states), batch, dim))
    packed, vectors = _numbers(network, request)
    out = ops.launch_mlp_sampler(
        packed,
        request.table,
        request.keys,
        vectors=vectors,
        x_init=x_init,
        precision=_precision(network, request.keys.device),
        every=every,
        states=kept,
        progress=None if recorder is None or recorder.bar.disable else recorder.bar.update,
    )
    # The largest magnitude takes one kernel, and is NaN or infinity if any element is; isfinite would take seven.
    if out.numel() and not math.isfinite(torch.linalg.vector_norm(out, math.inf).item()):
        _raise(network, request, int(torch.isfinite(out).all(dim=1).logical_not().nonzero()[0]))
    if states is not None and kept is not None:
        states.copy_(kept.reshape(states.shape))
    return out.reshape(request.shape)


def _numbers(network: Network, request: Request) -> tuple[Any, Vectors]:
    try:
        return numbers_of(network, request)
    except Exception:
        eager.run(network, request.probe())  # raises the network's own error, with its arguments, if it was that
        raise


def _raise(network: Network, request: Request, bad: int) -> None:
    """Runs a bad sample again, row by row, so that the error gives the row and the time."""
    eager.run(network, request.part(slice(bad, bad + 1), recorder=None))
    raise NonFiniteError(f"sample {bad} became NaN or infinity")
