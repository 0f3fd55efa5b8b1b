"""The persistent engine: the whole trajectory of an MLP in one launch, by the kernel ``mlp_sampler``.

On the CPU it runs MLPs in fp32 alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..models.mlp import MLP, linear_layers, unknown_layer
from ..reference import NoiseFunction, NonFiniteError
from ..solvers import StepTable
from . import eager
from .network import Network
from .recorder import Recorder

__all__ = ["pays", "sample", "unavailable_reason"]

_FP32_WIDTH = 64


def unavailable_reason(network: Network, sample_shape: Sequence[int], device: torch.device) -> str | None:
    """Why the engine cannot run a network on samples of a shape on a device; None where it can."""
    layers = linear_layers(network.model)
    if layers is None:
        reason = "it runs MLPs alone: Sequentials of Linear layers and activations between them"
        strange = unknown_layer(network.model)
        return reason if strange is None else f"{reason}, got {strange}"
    dtypes = (torch.float32,) if ops.has_native(device) else (torch.float32, torch.bfloat16)
    if network.dtype not in dtypes:
        return f"on {device.type} it runs networks in {' or '.join(map(str, dtypes))}, not in {network.dtype}"
    dim, widths = layers[0][-1].out_features, [linear.out_features for linear in layers[0]]
    max_dim, max_width = ops.mlp_limits(device)
    if layers[0][0].in_features != dim + 1 or dim > max_dim or max(widths) > max_width:
        return f"it runs MLPs of x and t with up to {max_dim} data and {max_width} hidden units"
    unknown = ops.unknown_activation(layers[1], device)
    if unknown is not None:
        return f"its kernel on {device.type} does not implement the activation {unknown}"
    fits = math.prod(sample_shape) == dim if isinstance(network.model, MLP) else tuple(sample_shape) == (dim,)
    return None if fits else f"the network takes samples of {dim} elements, not of shape {list(sample_shape)}"


def pays(network: Network, device: torch.device) -> bool:
    """Returns whether "auto" takes the engine: on a GPU not for wide layers in fp32, whose weights do not stay on the
    chip and which take long to compile. The number of samples must not matter, or a sample would depend on its batch by
    more than the roundings of one precision.
    """
    if ops.has_native(device):
        return True
    linears, _ = linear_layers(network.model) or ([], [])
    return network.dtype == torch.bfloat16 or all(linear.out_features <= _FP32_WIDTH for linear in linears)


def _packed(network: Network) -> Any:
    """How the kernel reads the network's parameters; made anew where they are others than before."""
    linears, activations = linear_layers(network.model) or ([], [])
    tensors = [tensor for linear in linears for tensor in (linear.weight, linear.bias) if tensor is not None]
    identity = (activations, [(id(t), t.data_ptr(), t.shape, t.stride()) for t in tensors])
    name = f"packed in {network.dtype}"
    known, packed = network.cache.get(name, (None, None))
    if known != identity:
        packed = ops.pack_mlp(linears, activations, network.dtype)
        network.cache[name] = (identity, packed)
    return packed


def _precision(network: Network, device: torch.device) -> str:
    if network.dtype == torch.bfloat16:
        return "bf16"
    # PyTorch's newer switches, which also tell what the older ones were set to; the older fail once a newer is used.
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends)
    precision = next((switch.fp32_precision for switch in switches if switch.fp32_precision != "none"), "ieee")
    return "tf32" if device.type == "cuda" and precision == "tf32" else "fp32"


def sample(
    model: Network,
    shape: Sequence[int],
    table: StepTable,
    keys: Tensor,
    *,
    x_init: Tensor | None = None,
    noise_function: NoiseFunction | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    after_row: Recorder | None = None,
) -> Tensor:
    """`fastsde.reference.sample` for an MLP. What needs the host between rows is not there: the sampler sees to that.

    Raises:
        NonFiniteError: where the network returns NaN or infinity, or the state becomes so.
    """
    batch, dim = shape[0], math.prod(shape[1:])
    states, every = (None, 1) if after_row is None else (after_row.states, after_row.every)
    kept = None if states is None else states.new_empty((len(states), batch, dim))
    out = ops.launch_mlp_sampler(
        _packed(model),
        table,
        keys,
        x_init=None if x_init is None else x_init.reshape(batch, dim),
        precision=_precision(model, keys.device),
        every=every,
        states=kept,
        progress=None if after_row is None else after_row.bar.update,
    )
    # The largest magnitude is one kernel, and NaN and infinity pass through it; isfinite would be seven.
    if out.numel() and not math.isfinite(torch.linalg.vector_norm(out, math.inf).item()):
        bad = torch.isfinite(out).all(dim=1).logical_not()
        _raise(model, shape, table, keys, x_init, int(bad.nonzero()[0]))
    if states is not None and kept is not None:
        states.copy_(kept.reshape(states.shape))
    return out.reshape(*shape)


def _raise(
    model: Network, shape: Sequence[int], table: StepTable, keys: Tensor, x_init: Tensor | None, bad: int
) -> None:
    """Runs a bad sample again, row by row, to tell the row and the time."""
    one = slice(bad, bad + 1)
    eager.sample(model, (1, *shape[1:]), table, keys[one], x_init=None if x_init is None else x_init[one])
    raise NonFiniteError(f"sample {bad} became NaN or infinity")
