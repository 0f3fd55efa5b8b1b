"""Checks an accelerated loop against the loop itself, on a few samples with the same noises."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import noise
from .brownian import linear_brownian
from .draws import Replay, outside_modes
from .errors import MismatchError, TraceError
from .noises import Given, contract, labels_of
from .program import Program
from .recording import Arguments, record_call, set_argument
from .tape import Draw, forwards
from .traced import Traced
from .values import Node

__all__ = ["check"]

_FEW = 4
_NUDGE = 4e-6  # the difference of normals between backends (the noise contract)
_FACTOR = 8.0  # of the loop's own answer to a nudge of that size
_ROUNDINGS = 64  # of the result's own size, in units in the last place


def check(
    loop: Callable[..., Any], arguments: Arguments, traced: Traced, options: Mapping[str, Any], *, replay: bool
) -> None:
    """Runs the loop and the traced one on a few samples and compares.

    An accelerated loop may differ by 64 roundings of the result. If it differs by more, the bound is measured: the loop
    runs again with its noises and its state changed by 4e-6, the difference between the normals of backends, or by one
    unit in the last place of its own precision if that is more, and with its network's outputs by one if they have
    fewer bits than fp32; eight times what that changes is allowed.

    Raises:
        MismatchError: if it differs by more.
    """
    whole = traced
    few = _fewer(loop, arguments, traced, replay)
    arguments, traced = few if few is not None else (arguments, traced)
    program, n = traced.program, traced.batch
    keys = noise.sample_keys(0, n, device=program.device)
    noises = _noises(traced, keys)
    names = arguments.names
    state = names[program.state].detach().clone() if program.state is not None else None
    theirs = _run(loop, arguments, program.state, state, noises, program.draws)
    if whole is not traced:
        whole.program.draws[:] = [
            dataclasses.replace(draw, strides=_strides(own, draw))
            for draw, own in zip(whole.program.draws, program.draws, strict=True)
        ]
    given = None if options.get("noise") == "contract" else Given(noises)
    source: dict[str, Any] = {"keys": keys} if given is None else {}
    held = None if state is None else state.clone()
    ours = traced.run(arguments.networks, n, state=held, draws=given, **source, **_plain(options))
    wrong = _differences(ours, theirs, None, traced.name)
    if wrong is None:
        return
    again = _run(loop, arguments, program.state, state, noises, program.draws)
    if _differences(again, theirs, None, traced.name) is not None:
        raise MismatchError(
            "check", "the loop returns something else when it runs again with the same noises", traced.name, _KEEPS
        )
    generator = _generator()
    moved = []
    for z in noises:
        nudge = torch.randn(z.shape, generator=generator, dtype=torch.float32, device="cpu").to(z)
        moved.append(z + _nudge(z.dtype, z.device) * nudge)
    start = None if state is None else _nudged(state)
    nudged = _run(loop, arguments, program.state, start, moved, [*program.draws], nudges=True)
    wrong = _differences(ours, theirs, nudged, traced.name)
    if wrong is not None:
        raise wrong


def _strides(few: Draw, many: Draw) -> tuple[int, ...] | None:
    """Returns the strides of a draw of many samples, from those of few."""
    own = few.strides
    if own is None or own[0] == max(own):
        return own
    strides, size = [0] * len(many.shape), 1
    for dim in sorted(range(len(own)), key=lambda dim: own[dim]):
        strides[dim], size = size, size * many.shape[dim]
    return tuple(strides)


_KEEPS = (
    "does it keep something from one call to the next, draw from another generator, or compute in fewer bits than "
    "fp32? check=False leaves this check out"
)


def _nudge(dtype: torch.dtype, device: torch.device) -> float:
    """Returns a relative rounding of a loop in a dtype, or in that of autocast."""
    if torch.is_autocast_enabled(device.type):
        return max(_NUDGE, torch.finfo(torch.get_autocast_dtype(device.type)).eps)
    return max(_NUDGE, torch.finfo(dtype).eps)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("backend", "compile") if options.get(name)}


def _run(
    loop: Callable[..., Any],
    arguments: Arguments,
    name: str | None,
    state: Tensor | None,
    noises: Any,
    draws: list[Draw],
    nudges: bool = False,
) -> Any:
    changes: dict[str, Any] = {} if name is None or state is None else {name: state.clone()}
    modules = [
        network
        for network in arguments.networks
        if isinstance(network, nn.Module) and not isinstance(network, torch.jit.ScriptModule)
    ]
    if arguments.network is not None and isinstance(arguments.networks[0], types.FunctionType):
        changes[arguments.network] = outside_modes(arguments.networks[0], nudges)
    with (
        torch.no_grad(),
        linear_brownian(),
        forwards(modules, lambda _, own: outside_modes(own, nudges)),
        Replay(noises) as replay,
    ):
        found = arguments.call(loop, changes)
        found = [x.detach().clone() if isinstance(x, Tensor) else x for x in tree_leaves(found)]
    for number, strides in replay.strides.items():
        draws[number] = dataclasses.replace(draws[number], strides=strides)
    if replay.left:
        raise MismatchError("check", f"the loop drew {replay.left} times less than when it was traced", "the loop")
    return found


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _nudged(state: Tensor) -> Tensor:
    z = torch.randn(state.shape, generator=_generator(), dtype=torch.float32, device="cpu").to(state)
    return state + _nudge(state.dtype, state.device) * state.abs().amax() * z


def _differences(ours: Any, theirs: Any, nudged: Any, name: str) -> MismatchError | None:
    """Returns the error of the first result that differs by more than its bound; without ``nudged`` of 64 roundings."""
    ours = tree_leaves(ours)
    if len(ours) != len(theirs):
        return MismatchError("check", f"{name} returns {len(theirs)} values, and accelerated {len(ours)}", name)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not isinstance(b, Tensor):
            continue
        if not isinstance(a, Tensor) or a.shape != b.shape:
            return MismatchError("check", f"result {i} of {name} has another shape when accelerated", name)
        if not b.numel():
            continue
        error, size = _rms(a, b), _rms(b, torch.zeros_like(b))
        if not math.isfinite(size):
            raise TraceError("check", "the loop itself returns NaN or infinity", name)
        own = 0.0 if nudged is None else _rms(nudged[i], b)
        eps = torch.finfo(b.dtype).eps if b.is_floating_point() else 1.0
        allowed = _FACTOR * own + _ROUNDINGS * eps * size + (0 if b.is_floating_point() else 1.0)
        if not error <= allowed:
            reason = (
                f"result {i} of the accelerated loop differs from the loop's own by {error:.2g} (RMS), where rounding "
                f"explains {allowed:.2g}"
            )
            return MismatchError("check", reason, name, _KEEPS)
    return None


def _rms(a: Tensor, b: Tensor) -> float:
    return float((a.to("cpu", torch.float64) - b.to("cpu", torch.float64)).square().mean().sqrt())


def _noises(traced: Traced, keys: Tensor) -> list[Tensor]:
    """Returns the noise of the contract for each draw of the loop."""
    program = traced.program
    found: dict[int, Tensor] = {}

    def put(node: Node, z: Tensor) -> None:
        labels = list(labels_of(node))
        for label, part in zip(labels, z.reshape(len(labels), -1), strict=True):
            found[label] = part

    if traced.tabulated is not None:
        for step, nodes in enumerate([traced.tabulated.start, *traced.tabulated.noises]):
            for node, weight in nodes:
                if node.kind == "noise":
                    z = noise.normal(keys, step, traced.tabulated.shape[1:]).reshape(-1)
                    put(node, z * weight)
    else:
        noise_of = contract(program, len(keys), keys)
        for row in program.rows:
            for node in row.noises:
                if node.kind == "noise":
                    put(node, noise_of(node))
    generator = _generator()
    noises = []
    for i, draw in enumerate(program.draws):
        z = (
            found[i]
            if i in found
            else torch.randn(math.prod(draw.shape), generator=generator, dtype=torch.float32, device="cpu")
        )
        noises.append(z.to(program.device, draw.dtype).reshape(draw.shape))
    return noises


# Fewer samples --------------------------------------------------------------------------------------------------------


def _fewer(
    loop: Callable[..., Any], arguments: Arguments, traced: Traced, replay: bool
) -> tuple[Arguments, Traced] | None:
    """Returns the arguments and the trace for a few samples, if the same table follows from them."""
    program: Program = traced.program
    batch = traced.batch
    if batch <= _FEW or traced.tabulated is None:
        return None
    smaller = {name: _cut(value, batch) for name, value in arguments.names.items()}
    if all(smaller[name] is value for name, value in arguments.names.items()):
        return None
    bound = inspect.BoundArguments(arguments.bound.signature, arguments.bound.arguments.copy())
    for name, value in smaller.items():
        set_argument(bound, name, value)
    few = Arguments(bound, arguments.network, arguments.networks, arguments.modules)
    try:
        found = Traced(record_call(loop, few, program.state, replay=replay), traced.name)
    except Exception:  # a number of the batch's size that is something else
        return None
    if (
        found.tabulated is None
        or found.batch != _FEW
        or not torch.equal(found.tabulated.table.packed, traced.tabulated.table.packed)
    ):
        return None
    return few, found


def _cut(value: Any, batch: int) -> Any:
    if type(value) is int and value == batch:
        return _FEW
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
        return value[:_FEW]
    if isinstance(value, torch.Size) and value[:1] == (batch,):
        return torch.Size((_FEW, *value[1:]))
    if type(value) in (tuple, list) and len(value) == batch and isinstance(value[0], torch.Generator):
        return value[:_FEW]
    if type(value) in (tuple, list) and value and type(value[0]) is int and value[0] == batch:
        return type(value)((_FEW, *value[1:]))
    if type(value) is dict:
        cut = {key: _cut(each, batch) for key, each in value.items()}
        return cut if any(cut[key] is not each for key, each in value.items()) else value
    return value
