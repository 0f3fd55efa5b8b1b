"""Networks as programs (`fastsde.lowering`), kept with the network until something in it changes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .. import ops
from ..dynamo import untraced
from ..lowering import Lowered, NotLowered, Vectors, described, is_shared, lower
from ..notices import first_line
from ..request import Request
from .capture import CaptureError
from .fingerprint import modules_of
from .network import Network

__all__ = ["CALL_FAILS", "numbers_of", "program_of"]

# Modules whose work a program does not have. They are looked for first: recording a large network takes long.
_OTHERS = (
    nn.modules.conv._ConvNd,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_PARAMETERS = 8_000_000
_PROGRAMS = 16  # kept per network
CALL_FAILS = "a call of it fails"  # how that reason starts


@untraced
def program_of(
    network: Network, sample_shape: Sequence[int], times: Tensor, request: Request | None, trusts: Collection[type]
) -> tuple[Lowered, Any] | str:
    """Returns a network as a program, and the program as the kernel reads it; or why there is none.

    Args:
        times: fp32 ``[K]``, of the table.
        request: whose conditions and guidance the program is to have; without one it has none.
        trusts: which kinds of earlier results are taken without a look at whether the network has changed since:
            ``str`` for reasons, ``tuple`` for programs.
    """
    dtype, network = network.dtype, network.in_fp32()
    conditions = _conditions(request)
    key = (dtype, *_key(network, sample_shape, request, conditions))
    kept = network.kept.programs
    if key in kept:
        state, found = kept[key]
        is_sure = isinstance(found, str) or found[0].is_checked
        if is_sure and (type(found) in trusts or state.is_run_as(network.state())):
            kept.move_to_end(key)
            return found  # type: ignore[no-any-return]
    made = _made(network, dtype, sample_shape, times, request, conditions)
    if isinstance(made, str) and made.startswith(CALL_FAILS):
        return made
    kept[key] = (network.state(), made)
    while len(kept) > _PROGRAMS:
        kept.popitem(last=False)
    return made


def numbers_of(network: Network, request: Request) -> tuple[Any, Vectors]:
    """Returns the program of a request as the kernel reads it, and its numbers at the present weights.

    Raises:
        CaptureError: if the network is no program any more.
    """
    times = request.table.time.to(torch.float32).to(request.keys.device)
    for _ in range(2):  # once more if numbers that Python code reads have changed
        found = program_of(network, request.shape[1:], times, request, trusts=())
        if isinstance(found, str):
            break
        lowered, packed = found
        vectors = lowered.vectors(times, request.shape[0], _conditions(request))
        if vectors is not None:
            return packed, vectors
        network.kept.programs.clear()
    raise CaptureError(found if isinstance(found, str) else "it reads numbers in Python that change in each call")


def _conditions(request: Request | None) -> tuple[Mapping[str, Any], ...]:
    if request is None:
        return ({},)
    model_kwargs, uncond_kwargs = request.conditions
    if not request.shape[0]:  # conditions of no sample: any one will do, to run nothing
        model_kwargs = {name: _one(value) for name, value in model_kwargs.items()}
        uncond_kwargs = None if uncond_kwargs is None else {name: _one(value) for name, value in uncond_kwargs.items()}
    return (model_kwargs,) if uncond_kwargs is None else (model_kwargs, uncond_kwargs)


def _one(value: Any) -> Any:
    return value.new_zeros((1, *value.shape[1:])) if isinstance(value, Tensor) else value


def _key(network: Network, sample_shape: Sequence[int], request: Request | None, conditions: Any) -> tuple[Any, ...]:
    leaves, spec = tree_flatten(conditions) if any(conditions) else ([], len(conditions))
    kinds = [(leaf.shape[1:], leaf.dtype, is_shared(leaf)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    autocast = torch.is_autocast_enabled(network.device.type)
    guidance = None if request is None else request.guidance
    where = network.device, ops.has_native(network.device)
    return where, network.form(), tuple(sample_shape), str(spec), repr(kinds), guidance, autocast


def _made(
    network: Network,
    dtype: torch.dtype,
    sample_shape: Sequence[int],
    times: Tensor,
    request: Request | None,
    conditions: Any,
) -> tuple[Lowered, Any] | str:
    """Returns a program of a network in fp32, packed for products in a dtype, or why there is none."""
    reason = _unsuitable(network, sample_shape)
    if reason is not None:
        return reason
    if not network.state().is_whole:
        return "it holds parts whose changes cannot be seen"
    guidance, plain = None if request is None else request.guidance, network.plain()

    def call(x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any], *others: Mapping[str, Any]) -> Tensor:
        f = plain(x, t, **model_kwargs)
        if guidance is None:
            return f
        f_uncond = plain(x, t, **others[0])
        return f_uncond + guidance * (f - f_uncond)

    sizes = [size for module in modules_of(network.model) for each in module.parameters() for size in each.shape]
    try:
        with plain.unchanged():
            for _ in range(2):  # the first call may fill caches
                before = network.state()
                lowered = lower(call, sample_shape, times, conditions, sizes=sizes)
                if before.is_run_as(network.state()):
                    break
            else:
                return "a call of it changes what it holds"
    except NotLowered as error:
        return described(error, network.model)
    except Exception as error:  # the network's own, which the caller sees when it runs
        return f"{CALL_FAILS}: {first_line(error)}"
    program = lowered.program
    widest, (_, most) = max(program.widths), ops.mlp_limits(network.device)
    if widest > most:
        return f"it has {widest} units side by side, more than {most}"
    unknown = ops.unknown_instruction(program.names, network.device)
    if unknown is not None:
        return f"its kernel on {network.device.type} has no {unknown}"
    return lowered, ops.pack_program(program, network.device, dtype)


def _unsuitable(network: Network, sample_shape: Sequence[int]) -> str | None:
    max_dim, _ = ops.mlp_limits(network.device)
    if math.prod(sample_shape) > max_dim:
        return f"it runs samples of up to {max_dim} elements"
    count = 0
    for model in modules_of(network.model):
        if any(torch.nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
            return f"{CALL_FAILS}: its lazy layers have no weights yet"
        if isinstance(model, torch.jit.ScriptModule):
            return "it is TorchScript"
        count += sum(parameter.numel() for parameter in model.parameters())
        for name, module in model.named_modules():
            if isinstance(module, _OTHERS):
                return f"{type(module).__name__}{f' ({name})' if name else ''}: a program has no such layer"
    return f"it has {count:,} parameters, more than {_PARAMETERS:,}" if count > _PARAMETERS else None
