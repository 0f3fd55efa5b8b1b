"""Networks as programs (`fastsde.lowering`), kept with the network until something in it changes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .. import ops
from ..dynamo import untraced
from ..guidance import Weights
from ..lowering import Lowered, NotLowered, Vectors, described, is_shared, lower
from ..notices import first_line
from ..request import Request
from ..solvers import StepTable
from .capture import CaptureError
from .fingerprint import Fingerprint, joined, modules_of
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
    network: Network,
    sample_shape: Sequence[int],
    times: Tensor,
    request: Request | None,
    trusts: Collection[type],
    time_is_input: bool = False,
) -> tuple[Lowered, Any] | str:
    """Returns a network as a program, and the program as the kernel reads it; or why there is none.

    Args:
        times: fp32 ``[K]``, of the table.
        request: whose conditions and guidance the program is to have; without one it has none.
        trusts: which kinds of earlier results are taken without a look at whether the network has changed since:
            ``str`` for reasons, ``tuple`` for programs.
        time_is_input: as for `fastsde.lowering.lower`.
    """
    if request is not None and request.guidance is not None and not _depends_on_time(request.guidance, request.table):
        return "its guidance has different weights in rows of one time"
    dtype, networks = network.dtype, _networks(network, request)
    conditions = _conditions(request)
    key = (dtype, time_is_input, *_key(networks, sample_shape, request, conditions))
    kept = networks[0].kept.programs
    if key in kept:
        state, found = kept[key]
        is_sure = isinstance(found, str) or found[0].is_checked
        if is_sure and (type(found) in trusts or state.is_run_as(_state(networks))):
            kept.move_to_end(key)
            return found  # type: ignore[no-any-return]
    made = _made(networks, dtype, sample_shape, times, request, conditions, time_is_input)
    if isinstance(made, str) and made.startswith(CALL_FAILS):
        return made
    kept[key] = (_state(networks), made)
    while len(kept) > _PROGRAMS:
        kept.popitem(last=False)
    return made


def numbers_of(network: Network, request: Request, time_is_input: bool = False) -> tuple[Any, Vectors]:
    """Returns the program of a request as the kernel reads it, and its numbers at the present weights.

    Args:
        time_is_input: as for `fastsde.lowering.lower`.

    Raises:
        CaptureError: if the network is no program any more.
    """
    times = request.table.time.to(torch.float32).to(request.keys.device)
    for _ in range(2):  # once more if numbers that Python code reads have changed
        found = program_of(network, request.shape[1:], times, request, (), time_is_input)
        if isinstance(found, str):
            break
        lowered, packed = found
        vectors = lowered.vectors(times, request.shape[0], _conditions(request))
        if vectors is not None:
            return packed, vectors
        network.kept.programs.clear()
    raise CaptureError(found if isinstance(found, str) else "it reads numbers in Python that change in each call")


def _networks(network: Network, request: Request | None) -> list[Network]:
    """Returns the networks of a request in fp32."""
    return [each.in_fp32() for each in ([network] if request is None else request.networks(network))]


def _state(networks: Sequence[Network]) -> Fingerprint:
    return joined([each.state() for each in networks])


def _conditions(request: Request | None) -> tuple[Mapping[str, Any], ...]:
    """Returns the arguments of each call, and with guidance that varies its weights.

    They are the times of the rows and the rates there, both the same for all samples, and each sample's scale.
    """
    if request is None:
        return ({},)
    model_kwargs, uncond_kwargs = request.conditions
    if not request.shape[0]:  # conditions of no sample: any one will do, to run nothing
        model_kwargs = {name: _one(value) for name, value in model_kwargs.items()}
        uncond_kwargs = None if uncond_kwargs is None else {name: _one(value) for name, value in uncond_kwargs.items()}
    if uncond_kwargs is None or request.guidance is None:
        return (model_kwargs,)
    if request.guidance.number is not None:
        return model_kwargs, uncond_kwargs
    return model_kwargs, uncond_kwargs, _weights(request.guidance, request.table)


def _by_time(guidance: Weights, table: StepTable) -> list[tuple[float, float, bool]]:
    """Returns the different times of a table, and the rate and whether there is no guidance at each, w = scale rate."""
    times = table.time.to(torch.float32).tolist()
    rows = zip(times, guidance.rates, guidance.guided, strict=True)
    return list(dict.fromkeys((time, rate if is_guided else 0.0, not is_guided) for time, rate, is_guided in rows))


def _depends_on_time(guidance: Weights, table: StepTable) -> bool:
    """Returns whether rows of the same time have the same weights."""
    found = _by_time(guidance, table)
    return len({time for time, _, _ in found}) == len(found)


def _weights(guidance: Weights, table: StepTable) -> dict[str, Tensor]:
    scale = guidance.scale if len(guidance.scale) else guidance.scale.new_zeros(1)
    times, rates, rest = torch.tensor(_by_time(guidance, table), dtype=torch.float64, device="cpu").to(scale).T
    each = {"times": times, "rates": rates, "rest": rest}
    return {"scale": scale, **{name: value.expand(len(scale), -1) for name, value in each.items()}}


def _weight(t: Tensor, scale: Tensor, times: Tensor, rates: Tensor, rest: Tensor) -> Tensor:
    """Returns w = scale rates + rest ``[B]`` at the times of a row."""
    at = (t[:, None] == times).to(rates.dtype)
    return scale * (at * rates).sum(1) + (at * rest).sum(1)


def _one(value: Any) -> Any:
    return value.new_zeros((1, *value.shape[1:])) if isinstance(value, Tensor) else value


def _key(
    networks: Sequence[Network], sample_shape: Sequence[int], request: Request | None, conditions: Any
) -> tuple[Any, ...]:
    leaves, spec = tree_flatten(conditions) if any(conditions) else ([], len(conditions))
    kinds = [(leaf.shape[1:], leaf.dtype, is_shared(leaf)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    device, others = networks[0].device, [weakref.ref(each) for each in networks[1:]]
    autocast = torch.is_autocast_enabled(device.type)
    number = None if request is None or request.guidance is None else request.guidance.number
    forms = tuple(each.form() for each in networks)
    where = device, ops.has_native(device)
    return where, forms, *others, tuple(sample_shape), str(spec), repr(kinds), number, autocast


def _made(
    networks: Sequence[Network],
    dtype: torch.dtype,
    sample_shape: Sequence[int],
    times: Tensor,
    request: Request | None,
    conditions: Any,
    time_is_input: bool,
) -> tuple[Lowered, Any] | str:
    """Returns a program of a network in fp32, packed for products in a dtype, or why there is none."""
    network = networks[0]
    reason = _unsuitable(networks, sample_shape)
    if reason is not None:
        return reason
    if not _state(networks).is_whole:
        return "it holds parts whose changes cannot be seen"
    number = None if request is None or request.guidance is None else request.guidance.number
    plain = [each.plain() for each in networks]

    def call(x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any], *others: Mapping[str, Any]) -> Tensor:
        f = plain[0](x, t, **model_kwargs)
        if not others:
            return f
        f_uncond = plain[-1](x, t, **others[0])
        w = _weight(t, **others[1]).reshape(-1, *[1] * (f.ndim - 1)) if number is None else number
        return f_uncond + w * (f - f_uncond)

    modules = [module for each in networks for module in modules_of(each.model)]
    sizes = [size for module in modules for each in module.parameters() for size in each.shape]
    try:
        with ExitStack() as stack:
            for each in plain:
                stack.enter_context(each.unchanged())
            for _ in range(2):  # the first call may fill caches
                before = _state(networks)
                lowered = lower(call, sample_shape, times, conditions, sizes=sizes, time_is_input=time_is_input)
                if before.is_run_as(_state(networks)):
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


def _unsuitable(networks: Sequence[Network], sample_shape: Sequence[int]) -> str | None:
    max_dim, _ = ops.mlp_limits(networks[0].device)
    if math.prod(sample_shape) > max_dim:
        return f"it runs samples of up to {max_dim} elements"
    count = 0
    for model in (module for each in networks for module in modules_of(each.model)):
        if any(torch.nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
            return f"{CALL_FAILS}: its lazy layers have no weights yet"
        if isinstance(model, torch.jit.ScriptModule):
            return "it is TorchScript"
        count += sum(parameter.numel() for parameter in model.parameters())
        for name, module in model.named_modules():
            if isinstance(module, _OTHERS):
                return f"{type(module).__name__}{f' ({name})' if name else ''}: a program has no such layer"
    return f"it has {count:,} parameters, more than {_PARAMETERS:,}" if count > _PARAMETERS else None
