"""`accelerate`: a loop with its own signature and result, and the package's speed."""

from __future__ import annotations

import functools
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from ..engines.fingerprint import Fingerprint
from ..plan import compiler_of
from ..validation import check_bool, check_int
from .brownian import NOTE
from .check import check as check_against
from .draws import Replay
from .environment import Environment, environment, modules_in
from .errors import TraceError
from .noises import Draws
from .recording import Arguments, name_of, one_at_a_time, record, record_call, signature_of
from .tape import Tape, cdata
from .traced import Traced

__all__ = ["Accelerated", "accelerate", "trace"]

_TRACES = 16  # kept per loop
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def trace(
    loop: Callable[..., Any],
    *args: Any,
    network: str | None = None,
    modules: Sequence[nn.Module] = (),
    state: str | None = None,
    replay: bool = False,
    **kwargs: Any,
) -> Traced:
    """Runs ``loop(*args, **kwargs)`` once on symbols instead of numbers, and returns it as a table.

    The loop must be affine in its state, in the network's outputs and in its normal draws; what it computes from
    constants, such as its schedule, is up to it. Times, sigmas and conditions may enter the network in any way.

    Args:
        loop: any sampling loop.
        args: the arguments of the loop.
        network: the name of its argument that is the network; by default the only one that is an ``nn.Module``.
        modules: networks that the loop holds itself, in a closure, an object or a pipeline; for a method by default the
            one module that its object holds.
        state: the name of its argument that is the initial state; by default the floating-point tensor of the shape of
            the network's input, if the loop does not draw its own.
        replay: run operations that no table has, such as norms, dynamic thresholding and learned variances, again
            between the rows, instead of refusing them. With a small network that is slower than the loop itself.
        kwargs: more arguments of the loop.

    Returns:
        The traced loop, called as ``traced(network, n, seed=0)``. Its arguments and conditions are those of the trace.

    Raises:
        TraceError: if no table can follow the loop; it names the operation, the reason and the line.
        TypeError, ValueError: if the network or the state cannot be told.
    """
    program = record(loop, *args, network=network, modules=modules, state=state, replay=replay, **kwargs)
    return Traced(program, name_of(loop))


@dataclass
class _Entry:
    """A trace and what it depends on."""

    traced: Traced
    networks: list[Any]
    environments: list[Fingerprint]  # that it is valid in
    outside: set[int]  # the generators that outlive the loop, by `cdata`
    weights: list[tuple[Tensor, Tensor]]  # of the networks, that the loop reads itself, and their values
    changes: frozenset[int]  # where the last of them may differ: what the loop changes and does not depend on
    tensors: list[Tensor]  # of the arguments
    generators: list[torch.Generator]
    baked: dict[int, Tensor]  # copies of tensors that take part in the loop's arithmetic, by their number

    def has_same_tensors(self, tensors: Sequence[Tensor]) -> bool:
        """Returns whether everything that the table was made of is as it was."""
        return all(torch.equal(tensors[i], value) for i, value in self.baked.items()) and all(
            torch.equal(weight, value) for weight, value in self.weights
        )

    def is_valid_in(self, now: Fingerprint) -> bool:
        last = self.environments[-1]
        if any(now.is_copied_as(each) for each in self.environments):
            return True
        same_length = len(now.structure) == len(last.structure)
        return now.is_whole and same_length and bool(self.changes) and now.differences(last) <= self.changes


@dataclass
class _Options:
    network: str | None = None
    modules: tuple[nn.Module, ...] = ()
    state: str | None = None
    noise: str = "contract"
    seed: int = 0
    backend: str = "auto"
    compile: bool | str = False
    dtype: torch.dtype | None = None
    check: bool = True
    replay: bool = False

    def __post_init__(self) -> None:
        if self.noise not in ("contract", "torch"):
            raise ValueError(f"noise must be 'contract' or 'torch', got {self.noise!r}")
        check_int("seed", self.seed, 0, 2**64)
        compiler_of(self.compile)
        for name in ("check", "replay"):
            check_bool(name, getattr(self, name))
        if isinstance(self.modules, nn.Module):
            raise TypeError("modules must be a sequence of nn.Modules, got one: put it in a list")
        self.modules = tuple(self.modules)

    def of_run(self) -> dict[str, Any]:
        return {"backend": self.backend, "compile": self.compile, "dtype": self.dtype}


class Accelerated:
    """A loop, accelerated by `accelerate`. It is called as the loop, and returns what the loop returns.

    Attributes:
        loop: the loop itself.
        traced: the `Traced` of the last call, or None before the first.
    """

    def __init__(self, loop: Callable[..., Any], options: _Options, known: Any = None) -> None:
        functools.update_wrapper(self, loop)
        self.loop, self._options = loop, options
        self._known: OrderedDict[Any, list[_Entry]] = OrderedDict() if known is None else known[0]
        self._lock = threading.RLock() if known is None else known[1]
        self.traced: Traced | None = None
        self._signature = signature_of(loop)

    def with_options(self, **changes: Any) -> Accelerated:
        """Returns the same loop with other options, such as ``seed``; traces are shared."""
        values = {name: getattr(self._options, name) for name in _Options.__dataclass_fields__}
        unknown = next((name for name in changes if name not in values), None)
        if unknown is not None:
            raise TypeError(f"{unknown!r} is no option: it must be one of {', '.join(values)}")
        options = _Options(**{**values, **changes})
        is_same = all(getattr(options, name) == values[name] for name in ("network", "modules", "state", "replay"))
        return Accelerated(self.loop, options, (self._known, self._lock) if is_same else None)

    def explain(self) -> str:
        """Returns how the last call ran (`Traced.explain`)."""
        if self.traced is None:
            raise RuntimeError("call the loop once: it is traced then")
        return self.traced.explain()

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __reduce__(self) -> tuple[Any, ...]:
        return Accelerated, (self.loop, self._options)  # a copy traces again

    def __repr__(self) -> str:
        return f"accelerate({getattr(self.loop, '__qualname__', self.loop)!s})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(_get_current_dispatch_mode(), (Tape, Replay)):  # another loop that calls this one is traced
            return self.loop(*args, **kwargs)
        options = self._options
        owner = getattr(self.loop, "__self__", None)
        arguments = Arguments.of(self._signature, args, kwargs, options.network, options.modules, owner)
        names = arguments.names
        leaves = tree_leaves(names)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        generators = [x for x in leaves if isinstance(x, torch.Generator)]
        entry = self._find(arguments, names, tensors, generators)
        traced = self.traced = entry.traced
        if options.noise == "torch" and NOTE in traced.program.notes:
            raise ValueError(f"noise must be 'contract' for {traced.name}: it {NOTE}, which are not the tree's numbers")
        state = names[traced.program.state] if traced.program.state is not None else None
        draws = None
        if options.noise == "torch":
            renamed = {cdata(old): new for old, new in zip(entry.generators, generators, strict=True)}
            draws = Draws(traced.program, renamed, entry.outside)
        given = {id(old): new for old, new in zip(entry.tensors, tensors, strict=True)}
        return traced.run(
            arguments.networks,
            traced.batch,
            state=state,
            draws=draws,
            given=given,
            seed=0 if draws is not None else options.seed,
            **options.of_run(),
        )

    # Traces ----------------------------------------------------------------------------------------------------------

    def _find(
        self,
        arguments: Arguments,
        names: dict[str, Any],
        tensors: list[Tensor],
        generators: list[torch.Generator],
    ) -> _Entry:
        ours = (Tensor, torch.Generator, *_PLAIN)
        objects = [x for name, x in names.items() if name != arguments.network and not isinstance(x, ours)]
        key = _key(names, arguments)
        with self._lock:
            return self._found(key, arguments, objects, tensors, generators)

    def _found(
        self,
        key: Any,
        arguments: Arguments,
        objects: list[Any],
        tensors: list[Tensor],
        generators: list[torch.Generator],
    ) -> _Entry:
        def look() -> Environment:
            return environment(self.loop, objects, arguments.networks, {cdata(each) for each in generators})

        now = look()
        entries = self._known.get(key, [])
        for entry in entries:
            if entry.is_valid_in(now.fingerprint) and entry.has_same_tensors(tensors):
                self._known.move_to_end(key)
                return entry
        with one_at_a_time:
            entry = self._trace(arguments, now, look, tensors, generators)
        self._known.setdefault(key, []).append(entry)
        self._known.move_to_end(key)
        while sum(map(len, self._known.values())) > _TRACES:
            oldest = next(iter(self._known))
            self._known[oldest].pop(0)
            if not self._known[oldest]:
                del self._known[oldest]
        return entry

    def _trace(
        self,
        arguments: Arguments,
        now: Environment,
        look: Callable[[], Environment],
        tensors: list[Tensor],
        generators: list[torch.Generator],
    ) -> _Entry:
        options, name = self._options, name_of(self.loop)
        before = {i: x.detach().clone() for i, x in enumerate(tensors)}
        program = record_call(self.loop, arguments, options.state, replay=options.replay, generators=now.generators)
        traced = Traced(program, name)
        weights = [(weight, weight.detach().clone()) for weight in program.weights_read]
        environments, changes = [now.fingerprint], frozenset[int]()
        if options.check:
            between = look().fingerprint
            settings = {"noise": options.noise, **options.of_run()}
            check_against(self.loop, arguments, traced, settings, replay=options.replay)
            after = look()
            if after.keeps_states:
                reason = "something that the loop reaches keeps its states, such as a list of a callback or of a hook"
                raise TraceError("state", reason, name, "return the states instead")
            environments.append(after.fingerprint)
            if len(between.structure) == len(environments[1].structure):
                changes = environments[1].differences(between)
        # Every tensor that the loop is given is either given to the network instead of the old one, or compared.
        replaced = traced.replaced_ids
        state = arguments.names.get(traced.program.state) if traced.program.state is not None else None
        baked = {i: before[i] for i, x in enumerate(tensors) if id(x) not in replaced and x is not state}
        outside = {cdata(each) for each in now.generators}
        return _Entry(traced, arguments.networks, environments, outside, weights, changes, tensors, generators, baked)


def _key(names: dict[str, Any], arguments: Arguments) -> Any:
    """Returns what a trace depends on, besides the contents of tensors and the environment."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return "tensor", tuple(value.shape), value.dtype, value.device, value.requires_grad
        if isinstance(value, _PLAIN):
            return type(value), repr(value) if isinstance(value, (float, complex)) else value
        if isinstance(value, torch.Generator):
            return "generator", value.device
        if isinstance(value, (list, tuple)):
            return (type(value), *map(of, value))
        if isinstance(value, dict):
            return (type(value), *((name, of(each)) for name, each in value.items()))
        return type(value), id(value)

    own = tuple((name, of(value)) for name, value in names.items() if name != arguments.network)
    tensors = [x for x in tree_leaves(names) if isinstance(x, Tensor)]
    first = {id(x): i for i, x in reversed(list(enumerate(tensors)))}
    aliases = tuple(first[id(x)] for x in tensors)  # which of them are the same
    return own, aliases, tuple(map(_of_network, arguments.networks)), torch.get_default_dtype()


def _of_network(network: Any) -> tuple[Any, ...]:
    """Returns which network it is, the modes of its modules, and the dtype and device of its weights."""
    if not isinstance(network, nn.Module) or isinstance(network, torch.jit.ScriptModule):
        return (id(network),)
    modules = modules_in(network)
    weight = next((x for module in modules for x in module._parameters.values() if x is not None), None)
    place = None if weight is None else (weight.dtype, weight.device)
    return id(network), tuple([module.training for module in modules]), place


@overload
def accelerate(loop: Callable[..., Any], **options: Any) -> Accelerated: ...


@overload
def accelerate(loop: None = None, **options: Any) -> Callable[[Callable[..., Any]], Accelerated]: ...


def accelerate(loop: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Returns a function with the loop's own signature and result that runs it as a table. Usable as a decorator.

    A new combination of shapes and constants is traced (see `trace`) and checked once, and kept. So is the loop when a
    global, a closure, an attribute or a tensor that it reads has changed; containers of more than 20,000 entries, and
    tensors of more than 100,000 elements that are changed without PyTorch's knowledge, are not seen to change. The loop
    itself does not run in later calls: what it prints or stores happens only when it is traced and checked.

    Args:
        loop: any sampling loop; left out, the result is a decorator.

    Keyword Args:
        network (str | None): the name of the argument that is the network, as for `trace`.
        modules (Sequence[nn.Module]): networks that the loop holds itself, as for `trace`.
        state (str | None): the name of the argument that is the initial state, as for `trace`.
        noise (str): "contract" (the default) for this package's noise, a function of ``seed``; "torch" for the loop's
            own draws from PyTorch's generators in the loop's own order: under the same ``torch.manual_seed`` the result
            is the loop's to rounding.
        seed (int): of the noise contract, in [0, 2^64), by default 0: every call draws the same samples, until
            `Accelerated.with_options` gives another one.
        backend (str): as for `fastsde.sample`, by default "auto".
        compile (bool | str): as for `fastsde.sample`, by default False.
        dtype (torch.dtype | None): as for `fastsde.sample`.
        check (bool): whether the first call of each trace also runs the loop itself, on a few samples with the same
            noises; by default True.
        replay (bool): run operations that no table has again between the rows, as for `trace`; by default False.

    Returns:
        The accelerated loop.

    Raises:
        TraceError: in a call, if no table can follow the loop.
        MismatchError: in a call, if the check finds a difference beyond rounding.
    """
    try:
        settings = _Options(**options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        names = ", ".join(_Options.__dataclass_fields__)
        unknown = next(name for name in options if name not in _Options.__dataclass_fields__)
        raise TypeError(f"accelerate takes {names}, got {unknown!r}") from None
    if loop is None:
        return lambda own: Accelerated(own, settings)
    if not callable(loop):
        raise TypeError(f"loop must be callable, got {type(loop).__name__}: for a method, give object.method")
    return Accelerated(loop.loop if isinstance(loop, Accelerated) else loop, settings)
