"""Runs a loop once on symbols."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from ..engines.inspection import device_of
from ..models.unwrap import unwrap
from .brownian import linear_brownian
from .draws import RANDOM
from .errors import TraceError
from .operations import FINAL, HANDLERS, reason_of
from .probe import Probe
from .program import Output, Program
from .tape import Finished, NeedsState, Rules, Tape, cdata
from .values import Joined, Value

__all__ = ["Arguments", "record"]


@dataclass
class Arguments:
    """The arguments of a loop by name, with its networks and its state found among them.

    Args:
        bound: the arguments, bound to the loop's signature.
        network: the name of the argument that is the network, or None.
        networks: the callables that are replaced.
        modules: those of them that the loop holds itself: their forward is replaced.
    """

    bound: inspect.BoundArguments
    network: str | None
    networks: list[Callable[..., Any]]
    modules: list[nn.Module]

    @classmethod
    def of(
        cls,
        signature: inspect.Signature,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        network: str | None,
        modules: Sequence[nn.Module],
        owner: Any = None,
    ) -> Arguments:
        """Binds the arguments. Without a network among them, it is the one module that the method's ``owner`` holds.

        Raises:
            TypeError, ValueError: if there is no network, or more than one argument could be it.
        """
        bound = signature.bind(*args, **kwargs)
        names = _names(bound)
        if network is not None:
            if not isinstance(network, str):
                raise TypeError(f"network must be the name of an argument of the loop, got {type(network).__name__}")
            if network not in names:
                raise ValueError(f"network must be one of the loop's arguments {', '.join(names)}, got {network!r}")
            if not callable(names[network]):
                raise TypeError(f"network {network!r} must be callable, got {type(names[network]).__name__}")
        elif not modules:
            found = [name for name, value in names.items() if isinstance(value, nn.Module)]
            held = [] if found else modules_of_owner(owner)
            if len(held) == 1:
                modules = [held[0][1]]
            elif len(found) != 1:
                what = f"got {len(found)}: {', '.join(found)}" if found else "got none"
                if held:
                    what += f"; its object holds {', '.join(name for name, _ in held)}: pass one of them in modules"
                raise ValueError(
                    f"network must name the loop's argument that is the network, or modules must hold the networks "
                    f"that it calls: exactly one argument that is an nn.Module was expected, {what}"
                )
            network = found[0] if found else None
        for module in modules:
            if not isinstance(module, nn.Module):
                raise TypeError(f"modules must be nn.Modules, got {type(module).__name__}")
        own = names[network] if network is not None else None
        own = unwrap(own) if isinstance(own, nn.Module) else own
        replaced = [module for module in map(unwrap, modules) if module is not own]
        networks: list[Callable[..., Any]] = [*replaced] if own is None else [own, *replaced]
        return cls(bound, network, networks, replaced)

    @property
    def names(self) -> dict[str, Any]:
        return _names(self.bound)

    def call(self, loop: Callable[..., Any], changes: Mapping[str, Any]) -> Any:
        """Calls the loop with some arguments replaced."""
        args, kwargs = list(self.bound.args), dict(self.bound.kwargs)
        if changes:
            copy = inspect.BoundArguments(self.bound.signature, dict(self.bound.arguments))
            for name, value in changes.items():
                set_argument(copy, name, value)
            args, kwargs = list(copy.args), dict(copy.kwargs)
        return loop(*args, **kwargs)


def modules_of_owner(owner: Any) -> list[tuple[str, nn.Module]]:
    """Returns the modules that the object of a method holds, with their names."""
    if isinstance(owner, nn.Module):
        return list(owner.named_children())
    return [(name, value) for name, value in getattr(owner, "__dict__", {}).items() if isinstance(value, nn.Module)]


def name_of(loop: Callable[..., Any]) -> str:
    return str(getattr(loop, "__name__", type(loop).__name__))


def signature_of(loop: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(loop)
    except (TypeError, ValueError):
        any_arguments = [
            inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
            inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
        ]
        return inspect.Signature(any_arguments)


def _names(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Returns the arguments by name; those of *args by number, as in "args[0]"."""
    found = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found.update({f"{name}[{i}]": each for i, each in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        else:
            found[name] = value
    return found


def set_argument(bound: inspect.BoundArguments, name: str, value: Any) -> None:
    for own, held in bound.arguments.items():
        kind = bound.signature.parameters[own].kind
        if kind is inspect.Parameter.VAR_POSITIONAL and name.startswith(f"{own}["):
            i = int(name[len(own) + 1 : -1])
            bound.arguments[own] = (*held[:i], value, *held[i + 1 :])
            return
        if kind is inspect.Parameter.VAR_KEYWORD and name in held:
            bound.arguments[own] = {**held, name: value}
            return
    bound.arguments[name] = value


one_at_a_time = threading.RLock()  # traces: networks and generators are replaced meanwhile
_RULES = Rules(RANDOM, HANDLERS, FINAL, reason_of)


def record(
    loop: Callable[..., Any],
    *args: Any,
    network: str | None = None,
    modules: Sequence[nn.Module] = (),
    state: str | None = None,
    double: bool = False,
    replay: bool = False,
    until_read: bool = False,
    **kwargs: Any,
) -> Program:
    """Runs ``loop(*args, **kwargs)`` once on symbols, and returns the program that it is.

    Args:
        loop: any sampling loop.
        args: the arguments of the loop.
        network: as for `fastsde.trace`.
        modules: as for `fastsde.trace`.
        state: as for `fastsde.trace`.
        double: every draw is float64, and casts of the state keep that, so that only the algebra is recorded.
        replay: as for `fastsde.trace`.
        until_read: the first read of the state on the host ends the loop, and what is read is what it returns.
        kwargs: more arguments of the loop.
    """
    arguments = Arguments.of(signature_of(loop), args, kwargs, network, modules, getattr(loop, "__self__", None))
    return record_call(loop, arguments, state, double=double, replay=replay, until_read=until_read)


def record_call(
    loop: Callable[..., Any],
    arguments: Arguments,
    state: str | None,
    *,
    double: bool = False,
    replay: bool = False,
    until_read: bool = False,
    generators: Sequence[torch.Generator] = (),
) -> Program:
    """Records a call with its arguments; the program's ``state`` is the name of the initial state.

    Args:
        generators: those that the loop does not make itself, besides its arguments.
    """
    if state is not None and not isinstance(arguments.names.get(state), Tensor):
        kind = type(arguments.names.get(state)).__name__
        raise ValueError(f"state must name a tensor argument of the loop, got {state!r}, which is {kind}")
    try:
        program = _recorded(loop, arguments, state, double, until_read, generators)
    except NeedsState as needs:
        state = _state_among(arguments, needs.shapes)
        program = _recorded(loop, arguments, state, double, until_read, generators)
    if not replay:
        program.refuse_operations()
    return program


def _state_among(arguments: Arguments, shapes: Sequence[tuple[int, ...]]) -> str:
    """Returns the name of the argument that the network was called with."""
    floating = {name: x for name, x in arguments.names.items() if isinstance(x, Tensor) and x.is_floating_point()}
    for shape in sorted(shapes, key=lambda shape: -torch.Size(shape).numel()):
        found = [name for name, x in floating.items() if tuple(x.shape) == shape]
        if not found and shape:  # several times the batch, as for guidance
            found = [
                name for name, x in floating.items() if x.shape[1:] == shape[1:] and len(x) and shape[0] % len(x) == 0
            ]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"state must name the initial state: {', '.join(found)} all have the shape {list(shape)}")
    raise TraceError(
        "network call",
        "no argument depends on a draw or on a tensor that the loop was given",
        instead="name the initial state by state=, and draw noise by torch.randn, randn_like or normal_",
    )


def _recorded(
    loop: Callable[..., Any],
    arguments: Arguments,
    state: str | None,
    double: bool,
    until_read: bool,
    generators: Sequence[torch.Generator],
) -> Program:
    names = arguments.names
    watched = [x for x in tree_leaves(names) if isinstance(x, Tensor)]
    device = _device_of(arguments, state)
    tape = Tape(device, _RULES, double=double, until_read=until_read, watched=watched)
    outside = [*generators, *(x for x in tree_leaves(names) if isinstance(x, torch.Generator))]
    tape.given_generators = {cdata(x): x.get_state().numpy().tobytes() for x in outside}
    for network in arguments.networks:
        if isinstance(network, nn.Module):
            tape.weights.update({id(x): x for x in (*network.parameters(), *network.buffers())})
    modules = arguments.modules
    changes: dict[str, Any] = {}
    first = len(arguments.networks) - len(modules)
    if first and arguments.network is not None:
        changes[arguments.network] = tape.clone(arguments.networks[0], 0)
    if state is not None:
        changes[state] = tape.input(names[state])
    held = {name: list(x) for name, x in names.items() if type(x) is list}
    for name, x in names.items():
        if isinstance(x, _FUNCTIONS) and name != arguments.network:
            changes[name] = _without_callbacks(tape, name, x)
    one_at_a_time.acquire()
    before = _random_states()
    modes = {
        number: [(module, getattr(module, "training", False)) for module in network.modules()]
        for number, network in enumerate(arguments.networks)
        if isinstance(network, nn.Module)
    }
    try:
        with tape, tape.replacing(modules, first), refused_draws(tape), linear_brownian(tape.note_tree):
            try:
                returned = arguments.call(loop, changes)
            except Finished as end:
                returned = end.args[0]
            except (NeedsState, TraceError):
                raise
            except Exception:
                if tape.refusal is not None:
                    raise tape.refusal from None
                raise
            if tape.refusal is not None:
                raise tape.refusal
            if inspect.isgenerator(returned):
                raise TraceError(
                    "yield", "the loop is a generator", name_of(loop), "wrap it in a function that lists it"
                )
            leaves, spec = tree_flatten(returned)
            for i, leaf in enumerate(leaves):
                probe = tape.as_probe(leaf)
                if not isinstance(leaf, Tensor) and any(isinstance(x, Probe) for x in _attributes(leaf)):
                    reason = f"the loop returns a {type(leaf).__name__} that holds a state"
                    raise TraceError("return", reason, name_of(loop), "return tensors")
                if probe is not None:
                    leaves[i] = Output(_result(tape, probe), leaf.shape, leaf.dtype)
            _refuse_kept(tape, names)
    finally:
        one_at_a_time.release()
        tape.restore()
        for module, mode in (each for own in modes.values() for each in own):
            if getattr(module, "training", mode) != mode:
                module.training = mode
        for name, contents in held.items():
            names[name][:] = contents
    changed = [name for name, same in _same_random_states(before).items() if not same]
    if changed:
        raise TraceError(
            "random number",
            f"the loop draws from, or seeds, a generator that is not traced ({', '.join(changed)})",
            instead="draw normals by torch.randn, randn_like, normal or normal_, and seed outside of the loop",
        )
    if not tape.calls:
        given = ", ".join(type(each).__name__ for each in arguments.networks)
        instead = "name the network by network=, or pass the module that is called itself in modules="
        raise TraceError("network call", f"the loop never calls its network ({given})", name_of(loop), instead)
    if not any(isinstance(leaf, Output) for leaf in leaves):
        raise TraceError("return", "nothing that the loop returns depends on the state", instead="return the samples")
    writes = bool(tape.inputs) and tape.inputs[0].memory.version > 0
    if writes:  # the loop changes its argument in place: what is left there is a result too
        leaves.append(Output(tape.inputs[0].whole, tape.inputs[0].shape, tape.inputs[0].dtype))
    program = Program(tape, leaves, spec)
    program.state = state
    program.writes_state = writes
    program.modes = tape.modes
    program.sets_modes = {
        number for number, own in tape.modes.items() if own != [mode for _, mode in modes.get(number, [])]
    }
    program.baked_ids = frozenset(tape.baked)
    return program


_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


def _without_callbacks(tape: Tape, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses a function that is given the state and returns nothing: it is not called later."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        if found is None and any(isinstance(x, Probe) for x in tree_leaves((args, kwargs))):
            raise tape.refuse(
                "callback",
                f"the loop hands the state to its argument {name!r}, which would not be called",
                "leave it out",
            )
        return found

    return call


def _result(tape: Tape, probe: Probe) -> Value | Joined:
    """Returns the value of a result; what the last row computes is a node, so that it is the table's own result."""
    whole = probe.whole
    if isinstance(whole, Joined) or whole.is_atom:
        return whole
    if not any(node.epoch == tape.epoch for node in whole.nodes()):
        return whole
    node = tape.node("affine", probe.shape, value=whole)
    return Value(node.numel, {(node, None): 1.0})


def _attributes(value: Any) -> Iterator[Any]:
    return iter(getattr(value, "__dict__", {}).values())


def _refuse_kept(tape: Tape, names: Mapping[str, Any]) -> None:
    for name, x in names.items():
        if not isinstance(x, Tensor) and any(isinstance(leaf, Probe) for leaf in tree_leaves(x)):
            raise tape.refuse(
                "argument", f"the loop puts states into its argument {name!r}", "return the states instead"
            )


@contextlib.contextmanager
def refused_draws(tape: Tape) -> Iterator[None]:
    """Refuses draws of Python's and NumPy's global generators, and seeding, where they are called."""

    def refuse(what: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not tape.is_mine:
                return function(*args, **kwargs)
            if name in ("seed", "manual_seed"):
                raise tape.refuse(f"{what}.{name}", "the loop seeds a generator", "seed outside of the loop")
            raise tape.refuse(
                f"{what}.{name}",
                "a random number that is not traced would be baked into the table",
                "draw normals by torch.randn, randn_like, normal or normal_",
            )

        return call

    held = [
        (module, name, getattr(module, name))
        for module, names in ((random, _OF_RANDOM), (np.random, _OF_NUMPY), (torch, ("manual_seed",)))
        for name in names
        if hasattr(module, name)
    ]
    for module, name, function in held:
        setattr(module, name, refuse(module.__name__, name, function))
    try:
        yield
    finally:
        for module, name, function in held:
            setattr(module, name, function)


_OF_RANDOM = ("random", "gauss", "normalvariate", "uniform", "randint", "randrange", "choice", "choices", "shuffle",
              "sample", "seed")  # fmt: skip
_OF_NUMPY = ("randn", "rand", "normal", "standard_normal", "random", "random_sample", "uniform", "randint", "choice",
             "shuffle", "permutation", "seed", "exponential", "poisson", "multivariate_normal",
             "default_rng")  # fmt: skip


def _device_of(arguments: Arguments, state: str | None) -> torch.device:
    if state is not None:
        device: torch.device = arguments.names[state].device
        return device
    for network in arguments.networks:
        found = device_of(network)
        if found is not None:
            return found
    return torch.empty(0).device


def _random_states() -> dict[str, Any]:
    state: Any = np.random.get_state()  # noqa: NPY002 (the global generator that loops use)
    numbers = np.append(np.asarray(state[1], dtype=np.float64), [float(each) for each in state[2:]])
    return {"random": random.getstate(), "numpy": numbers, "torch": torch.get_rng_state()}


def _same_random_states(before: Mapping[str, Any]) -> dict[str, bool]:
    now = _random_states()
    return {
        "random": now["random"] == before["random"],
        "numpy": bool(np.array_equal(now["numpy"], before["numpy"])),
        "torch": torch.equal(now["torch"], before["torch"]),
    }
