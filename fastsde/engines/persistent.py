"""The persistent engine: the whole trajectory of a small network in one launch, by the kernel ``mlp_sampler``.

On the CPU it runs any network that is lowered to a program (`fastsde.lowering`), in fp32. On a GPU it runs MLPs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops, tf32
from ..models import Preconditioned
from ..models.mlp import MLP, unknown_layer
from ..reference import NonFiniteError
from ..request import Request
from . import eager
from .network import Network
from .programs import CALL_FAILS, numbers_of, program_of

__all__ = ["pays", "run", "unavailable_reason"]

_FP32_WIDTH = 64


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
    if not ops.has_native(device):
        return _no_mlp_reason(network, sample_shape, device, dtypes)
    if network.dtype not in dtypes:
        return _wrong_dtype(network, device, dtypes)
    times = torch.ones(1, dtype=torch.float32, device=device) if times is None else times
    found = program_of(network, sample_shape, times, request, trusts=(tuple,) if is_asked_for else (tuple, str))
    if not isinstance(found, str) or (is_asked_for and request is None and found.startswith(CALL_FAILS)):
        return None
    return found


def _wrong_dtype(network: Network, device: torch.device, dtypes: Sequence[torch.dtype]) -> str:
    return f"on {device.type} it runs networks in {' or '.join(map(str, dtypes))}, not in {network.dtype}"


def _no_mlp_reason(
    network: Network, sample_shape: Sequence[int], device: torch.device, dtypes: Sequence[torch.dtype]
) -> str | None:
    layers = network.layers
    if layers is None:
        reason = "it only runs MLPs: Sequentials of Linear layers and activations between them"
        if isinstance(network.model, Preconditioned):
            return f"{reason}, not EDM's preconditioning of them"
        strange = unknown_layer(network.model)
        return reason if strange is None else f"{reason}, got {strange}"
    if network.dtype not in dtypes:
        return _wrong_dtype(network, device, dtypes)
    linears, activations = layers
    dim, width = linears[-1].out_features, max(linear.out_features for linear in linears)
    max_dim, max_width = ops.mlp_limits(device)
    if linears[0].in_features != dim + 1 or dim > max_dim or width > max_width:
        return f"it runs MLPs of x and t with up to {max_dim} data and {max_width} hidden units"
    unknown = ops.unknown_activation(activations, device)
    if unknown is not None:
        return f"its kernel on {device.type} does not implement the activation {unknown}"
    fits = math.prod(sample_shape) == dim if isinstance(network.model, MLP) else tuple(sample_shape) == (dim,)
    return None if fits else f"the network takes samples of {dim} elements, not of shape {list(sample_shape)}"


def pays(network: Network) -> bool:
    """Returns whether "auto" picks the engine: on a GPU not for wide layers in fp32, whose weights do not stay on the
    chip and which take long to compile. The number of samples must not matter, or a sample would depend on its batch by
    more than the rounding of one precision.
    """
    if ops.has_native(network.device):
        return True
    linears, _ = network.layers or ([], [])
    return network.dtype == torch.bfloat16 or all(linear.out_features <= _FP32_WIDTH for linear in linears)


def _packed(network: Network) -> Any:
    """Returns the MLP's parameters as the Triton kernel reads them, packed again if they are not the same as before."""
    linears, activations = network.layers or ([], [])
    tensors = [tensor for linear in linears for tensor in (linear.weight, linear.bias) if tensor is not None]
    identity = (activations, [(id(t), t.data_ptr(), t.shape, t.stride()) for t in tensors])
    known, packed = network.kept.packed.get(network.dtype, (None, None))
    if known != identity:
        packed = ops.pack_mlp(linears, activations, network.dtype)
        network.kept.packed[network.dtype] = (identity, packed)
    return packed


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
    is_native = ops.has_native(request.keys.device)
    packed, vectors = numbers_of(network, request) if is_native else (_packed(network), None)
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


def _raise(network: Network, request: Request, bad: int) -> None:
    """Runs a bad sample again, row by row, so that the error gives the row and the time."""
    eager.run(network, request.part(slice(bad, bad + 1), recorder=None))
    raise NonFiniteError(f"sample {bad} became NaN or infinity")
