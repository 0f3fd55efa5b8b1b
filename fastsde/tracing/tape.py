"""The tape: while a loop runs under it, every tensor that depends on the state, a draw or the network is a `Probe`.

What the loop computes from constants, such as its schedule, runs as it is. Operations are in `operations`, draws in
`draws`.
"""

from __future__ import annotations

import contextlib
import copy
import math
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..dynamo import Uncompiled
from .brownian import NOTE
from .errors import TraceError
from .probe import Memory, Probe
from .values import Coefficient, Joined, Mover, Node, Value, flat, uniform

__all__ = [
    "Call",
    "Draw",
    "Handler",
    "NeedsState",
    "Operation",
    "Rules",
    "Tape",
    "cdata",
    "forwards",
    "name_of_operation",
    "registered",
    "shape_of",
    "tensors_in",
]


class NeedsState(Exception):  # noqa: N818 (no error: the trace starts again with the state)
    """The network was called with constants only: its input is an argument of the loop."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__(shapes)
        self.shapes = shapes


class Finished(Exception):  # noqa: N818
    """The first read of the state on the host, where that ends the trace."""


@dataclass(frozen=True)
class Draw:
    """A normal draw of the loop: a tensor of standard normals.

    ``strides`` are known after the check, of a draw into memory that is not contiguous.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    generator: torch.Generator | None = None
    device: torch.device | None = None
    strides: tuple[int, ...] | None = None


@dataclass(repr=False)
class Call:
    """A call of the network.

    Args:
        network: the number of the network.
        leaves: the leaves of its arguments, in the order of ``spec``; where the state enters, its value.
        states: of these leaves, the shape and dtype, by their number.
        outputs, places: the nodes of its outputs, and their numbers among the leaves of what it returns.
        autocast: whether it is under autocast, and in which dtype, where that differs from the loop's caller.
    """

    network: int
    spec: Any
    leaves: list[Any]
    states: dict[int, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    outputs: list[Node] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    autocast: tuple[bool, torch.dtype] | None = None

    def __repr__(self) -> str:
        states = [f"the state as {list(shape)}" for shape, _ in self.states.values()]
        others = [leaf for i, leaf in enumerate(self.leaves) if i not in self.states]
        constants = [
            repr(x) if not isinstance(x, Tensor) else f"{x.item():g}" if x.numel() == 1 else f"a tensor {list(x.shape)}"
            for x in others
        ]
        return f"Call({', '.join(states + constants)})"


@dataclass(eq=False)
class Operation:
    """An operation that is not affine, to be run again: its arguments, with a value for each traced tensor."""

    function: Any
    spec: Any
    leaves: list[Any]
    states: dict[int, tuple[tuple[int, ...], torch.dtype]]
    error: TraceError

    @property
    def operands(self) -> list[Value]:
        return [self.leaves[i] for i in self.states]

    @property
    def name(self) -> str:
        return name_of_operation(self.function)


Handler = Callable[["Tape", Any, Any, Any], Any]  # (tape, func, args, kwargs) -> its result


class Rules(NamedTuple):
    """What operations do to probes, by ATen's packets.

    Args:
        draws: of draws.
        operations: of operations that are affine or move elements.
        final: those that are refused at once, since nothing can stand for their result.
        reason: why an operation, by its name, is not affine.
    """

    draws: Mapping[Any, Handler]
    operations: Mapping[Any, Handler]
    final: AbstractSet[Any]
    reason: Callable[[str], str]


class Tape(Uncompiled, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records a loop.

    Args:
        device: of the probes.
        rules: what operations do.
        double: every draw is float64, and casts of the state keep that, so that only the algebra is recorded.
        until_read: the first read of the state on the host ends the loop, and is its result.
        watched: tensors of the caller: those that take part in an operation are collected in ``baked``.
    """

    def __init__(
        self,
        device: torch.device,
        rules: Rules,
        *,
        double: bool = False,
        until_read: bool = False,
        watched: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.double, self.until_read = device, double, until_read
        self._rules = rules
        self._thread = threading.get_ident()
        self._autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        self.mover = Mover()
        self.epoch = 0
        self.calls: list[Call] = []
        self.draws: list[Draw] = []
        self.notes: dict[str, None] = {}
        self.modes: dict[int, list[bool]] = {}  # by network: which of its modules were in training mode
        self.refusal: TraceError | None = None
        self.baked: set[int] = set()
        self.inputs: list[Probe] = []  # the initial state
        self._watched = {id(tensor) for tensor in watched}
        self.watched = frozenset(self._watched)
        self.weights: dict[int, Tensor] = {}  # of the networks
        self.weights_read: dict[int, Tensor] = {}  # those that the loop reads itself
        self._watched_storages = {x.untyped_storage()._cdata for x in watched if x.layout == torch.strided}
        self.given_generators: dict[int, bytes] = {}  # those that outlive the loop, by `cdata`: their states
        self.generator_states: dict[int, Tensor] = {}  # of generators at their first draw
        self._states: dict[int, bytes] = {}  # the same, as bytes
        self._count = 0
        self._storages: dict[int, tuple[Memory, Any]] = {}  # plain memory that the loop has written state into
        self._poisoned: list[tuple[Tensor, Tensor]] = []
        self.shapes: dict[Any, tuple[int, ...]] = {}  # of views, by the operation and its arguments
        self._dtypes: dict[Any, torch.dtype] = {}
        self._templates: dict[Any, tuple[list[Any], Any]] = {}

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread runs the loop: others use its networks and generators meanwhile."""
        return threading.get_ident() == self._thread

    # Symbols ---------------------------------------------------------------------------------------------------------

    def node(self, kind: str, shape: Sequence[int], **options: Any) -> Node:
        node = Node(kind, self.epoch, shape, **options)
        node.order = self._count
        self._count += 1
        return node

    def symbol(self, node: Node, dtype: torch.dtype) -> Probe:
        return self.probe(Value(node.numel, {(node, None): 1.0}), node.shape, dtype)

    def probe(self, value: Value | Joined, shape: Sequence[int], dtype: torch.dtype) -> Probe:
        return Probe(self, Memory(value, self.mover), shape, dtype)

    def noise(
        self,
        shape: Sequence[int],
        dtype: torch.dtype | None,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> Probe:
        dtype = dtype or torch.get_default_dtype()
        if generator is not None:
            self._check_generator(generator)
        self.draws.append(Draw(tuple(shape), dtype, generator, device))
        node = self.node("noise", shape, label=len(self.draws) - 1)
        return self.symbol(node, torch.float64 if self.double else dtype)

    def _check_generator(self, generator: torch.Generator) -> None:
        """Refuses a generator that the loop seeds again between draws: its draws would no longer repeat."""
        own, found = cdata(generator), generator.get_state()
        self.generator_states.setdefault(own, found)
        state = found.numpy().tobytes()
        last = self._states.setdefault(own, state)
        is_again = own not in self.given_generators and any(
            state == other and each != own for each, other in self._states.items()
        )
        is_seeded = self.given_generators.get(own, state) != state
        if last != state or is_again or is_seeded:
            raise self.refuse(
                "generator", "the loop seeds a generator again, to draw the same numbers", "seed it outside of the loop"
            )

    def input(self, tensor: Tensor) -> Probe:
        """Returns the symbol of the initial state."""
        node = self.node("input", tensor.shape, label=0)
        probe = self.symbol(node, torch.float64 if self.double else tensor.dtype)
        self.inputs.append(probe)
        return probe

    def note_tree(self) -> None:
        self.notes[NOTE] = None

    def named(self, value: Value, shape: Sequence[int], dtype: torch.dtype) -> Probe:
        """Returns a probe of a value; a sum becomes a node, so that later values stay short."""
        return self.probe(self.shortened(value, shape), shape, dtype)

    def shortened(self, value: Value, shape: Sequence[int]) -> Value:
        if len(value.terms) > 1 or (value.terms and not _is_multiple(value)):
            node = self.node("affine", shape, value=value)
            return Value(value.numel, {(node, None): 1.0})
        return value

    def one_draw(self, values: Sequence[Value], shapes: Sequence[tuple[int, ...]], dim: int) -> Value | None:
        """Returns the one draw that draws of a sample each, joined, are; None if that is not what they are."""
        nodes = [next(iter(value.terms))[0] for value in values if value.is_atom]
        first = next(iter(nodes), None)
        if any(positions is not None for value in values for _, positions in value.terms):
            return None
        if dim != 0 or first is None or first.kind != "noise" or len(nodes) != len(values) or len(values) < 2:
            return None
        are_drawn_now = all(node.kind == "noise" and node.order == first.order + i for i, node in enumerate(nodes))
        if not are_drawn_now or any(shape[0] != 1 or math.prod(shape) != first.numel for shape in shapes):
            return None
        joined = self.node("noise", (len(nodes), *shapes[0][1:]), label=tuple(node.label for node in nodes))
        joined.order = first.order - 0.5  # before its parts, which are parts of it from now on
        for i, node in enumerate(nodes):
            start, stop = i * first.numel, (i + 1) * first.numel
            place, _ = self.mover.moves(("range", start, stop, joined.numel), (joined.numel,), lambda e: e[start:stop])  # noqa: B023
            node.kind, node.label = "affine", None
            node.value = Value(node.numel, {(joined, place): 1.0})
        return Value(joined.numel, {(joined, None): 1.0})

    # Operands --------------------------------------------------------------------------------------------------------

    def as_probe(self, x: Any) -> Probe | None:
        """Returns the probe that an argument is, or that stands for plain memory into which state was written."""
        if isinstance(x, Probe):
            if x.tape is not self:
                raise self.refuse(
                    "state",
                    "the loop uses a state of an earlier call that something kept",
                    "reset what the loop keeps at its beginning",
                )
            return x
        if self._storages and isinstance(x, Tensor):
            held = self._storages.get(x.untyped_storage()._cdata)
            if held is not None:
                memory = held[0]
                key = ("plain", tuple(x.shape), x.stride(), x.storage_offset(), memory.numel)
                positions, _ = self.mover.moves(
                    key, (memory.numel,), lambda i: torch.as_strided(i, x.shape, x.stride(), x.storage_offset())
                )
                return Probe(self, memory, x.shape, x.dtype, positions)
        return None

    def memory(self, x: Tensor) -> Probe:
        """Returns the probe of a tensor that an operation writes to; plain memory becomes traced memory."""
        probe = self.as_probe(x)
        if probe is not None:
            return probe
        if not x.is_floating_point():
            raise TraceError("write", f"the state is written into {x.dtype}, which rounds it")
        if x.untyped_storage()._cdata in self._watched_storages:
            raise self.refuse(
                "write", "the loop writes the state into a tensor that it was given", "return the states instead"
            )
        storage = x.untyped_storage()
        numel = storage.nbytes() // x.element_size()
        whole = torch.as_strided(x.detach(), (numel,), (1,), 0)
        data = whole.to("cpu", torch.float64)
        data = torch.where(data.isfinite(), data, torch.zeros_like(data))  # torch.empty
        self._storages[storage._cdata] = (Memory(Value(numel, {}, uniform(data)), self.mover), storage)
        with _disable_current_modes(), torch.no_grad():
            self._poisoned.append((whole, whole.clone()))
            whole.fill_(float("nan") if x.is_floating_point() else 0)  # what reads it past the trace is noticed
        found = self.as_probe(x)
        assert found is not None
        return found

    def restore(self) -> None:
        """Gives memory that the loop wrote to its contents back."""
        with torch.no_grad():
            for memory, data in self._poisoned:
                memory.copy_(data)

    def operand(self, x: Any, shape: torch.Size) -> Value | Coefficient:
        """Returns an operand broadcast to a shape: a value, or a constant."""
        if isinstance(x, Probe) or self._storages:
            probe = self.as_probe(x)
            if probe is not None:
                return probe.value if probe.shape == shape else self._expanded(probe, shape)
        if not isinstance(x, Tensor):
            return float(x)
        if x.numel() <= 1:
            return float(x.item()) if x.numel() else 0.0
        core = x.detach()
        for dim in range(core.ndim):
            if core.stride(dim) == 0 and core.shape[dim] > 1:
                core = core.narrow(dim, 0, 1)
        first = core.flatten()[0]
        if core.numel() == 1 or bool((core == first).all()):
            return float(first.item())
        return core.to("cpu", torch.float64).expand(shape).reshape(-1)

    def value(self, x: Any, shape: torch.Size) -> Value:
        """Returns an operand as a value."""
        v = self.operand(x, shape)
        return v if isinstance(v, Value) else Value(shape.numel(), {}, v)

    def _expanded(self, probe: Probe, shape: torch.Size) -> Value:
        key = ("expand", tuple(probe.shape), tuple(shape))
        positions, _ = self.mover.moves(key, probe.shape, lambda i: i.expand(shape))
        return self.mover.gather(probe.value, positions)

    def dtype_of(self, *operands: Any) -> torch.dtype:
        key = tuple((x.dtype, x.ndim > 0) if isinstance(x, Tensor) else type(x) for x in operands)
        if key not in self._dtypes:
            metas = [
                torch.empty((1,) if k[1] else (), dtype=k[0], device="meta") if isinstance(k, tuple) else k(1)
                for k in key
            ]
            dtype = torch.result_type(*metas[:2]) if len(metas) > 1 else metas[0].dtype
            for meta in metas[2:]:
                dtype = torch.promote_types(dtype, meta.dtype)
            self._dtypes[key] = dtype
        return self._dtypes[key]

    # The network -----------------------------------------------------------------------------------------------------

    def network(self, network: Callable[..., Any], number: int = 0) -> Callable[..., Any]:
        """Returns what stands for a network in the loop; the network itself runs once, for what its outputs are."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._call(network, number, args, kwargs) if self.is_mine else network(*args, **kwargs)

        return call

    def clone(self, network: Any, number: int) -> Any:
        """Returns a network with the same weights and attributes whose calls are calls of the network.

        The hooks of a module belong to the network, and do not run on symbols.
        """
        if isinstance(network, nn.Module) and not isinstance(network, torch.jit.ScriptModule):
            twin = copy.copy(network)
            for name in HOOKS:
                twin.__dict__[name] = OrderedDict()
            twin.__dict__["forward"] = self._noting_mode(twin, network, number)
            return twin
        stub = self.network(network, number)
        if isinstance(network, types.FunctionType) or not hasattr(network, "__dict__"):
            return stub
        try:  # an object with attributes
            other = copy.copy(network)
            other.__class__ = type(
                type(network).__name__, (type(network),), {"__call__": lambda _, *a, **k: stub(*a, **k)}
            )
        except TypeError:
            return stub
        return other

    def _noting_mode(self, module: nn.Module, forward: Callable[..., Any], number: int) -> Callable[..., Any]:
        stub = self.network(forward, number)

        def call(*args: Any, **kwargs: Any) -> Any:
            if number not in self.modes and self.is_mine:
                self.modes[number] = [getattr(each, "training", False) for each in module.modules()]
            return stub(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def replacing(self, modules: Sequence[nn.Module], first: int = 0) -> Iterator[None]:
        """Within it, a call of one of these modules is a call of the network."""
        numbers = {id(module): first + i for i, module in enumerate(modules)}

        def stub(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            return self._noting_mode(module, forward, numbers[id(module)])

        with forwards(modules, stub, without_hooks=True):
            yield

    def _call(self, network: Callable[..., Any], number: int, args: Any, kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        call = Call(number, spec, [])
        for i, leaf in enumerate(leaves):
            probe = self.as_probe(leaf)
            if probe is None:
                call.leaves.append(leaf)
                continue
            if torch.is_grad_enabled() and leaf.requires_grad:
                raise self.refuse("network call", "the loop asks for a gradient through the network", _ROW_BY_ROW)
            call.leaves.append(probe.whole)
            call.states[i] = (tuple(leaf.shape), leaf.dtype)
        if not call.states:
            if not self.calls:
                raise NeedsState([tuple(leaf.shape) for leaf in leaves if _is_floating(leaf)])
            raise self.refuse(
                "network call", "no argument depends on the state", "draw it by torch.randn, randn_like or normal_"
            )
        for i, leaf in enumerate(call.leaves):  # the loop may change it in place later; conditions keep their identity
            if isinstance(leaf, Tensor) and id(leaf) not in self._watched:
                call.leaves[i] = leaf.detach().clone()
        enabled, dtype = torch.is_autocast_enabled(self.device.type), torch.get_autocast_dtype(self.device.type)
        if (enabled, dtype) != self._autocast and (enabled or self._autocast[0]):
            call.autocast = (enabled, dtype)
        self.epoch += 1
        self.calls.append(call)
        signature = (number, tuple(call.states.items()), str(spec))
        if signature not in self._templates:
            self._templates[signature] = self._template(network, leaves, spec)
        outputs, out_spec = self._templates[signature]
        made = []
        for place, leaf in enumerate(outputs):
            if isinstance(leaf, Tensor):
                node = self.node("output", leaf.shape, label=len(call.outputs))
                call.outputs.append(node)
                call.places.append(place)
                leaf = self.symbol(node, torch.float64 if self.double else leaf.dtype)
            elif not isinstance(leaf, (int, float, complex, str, bytes, type(None))):
                kind = type(leaf).__name__
                raise self.refuse(
                    "network call", f"the network returns a {kind}, whose tensors are not known", "return tensors"
                )
            made.append(leaf)
        return tree_unflatten(made, out_spec)

    def _template(self, network: Callable[..., Any], leaves: list[Any], spec: Any) -> tuple[list[Any], Any]:
        """Runs the network once on zeros."""
        probes = [self.as_probe(x) for x in leaves]

        def run(dtype: torch.dtype | None) -> tuple[list[Any], Any]:
            real = [
                x if p is None else torch.zeros(p.shape, dtype=dtype or p.dtype, device=self.device)
                for x, p in zip(leaves, probes, strict=True)
            ]
            args, kwargs = tree_unflatten(real, spec)
            return tree_flatten(network(*args, **kwargs))

        module = getattr(network, "__self__", network)
        buffers = (
            [(b, b.clone()) for b in module.buffers()] if isinstance(module, nn.Module) and module.training else []
        )
        with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=_gpus(self.device)):
            try:
                return run(None)
            except RuntimeError:
                if not self.double:
                    raise
                return run(torch.float32)  # of a network in fp32
            finally:
                for buffer, value in buffers:  # statistics of a batch norm
                    buffer.copy_(value)

    # Dispatch --------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        draw = self._rules.draws.get(packet)
        if draw is not None:
            return draw(self, func, args, kwargs)
        if self.weights:
            self.weights_read.update({id(x): x for x in tensors_in(args) if id(x) in self.weights})
        if self._watched:
            used = [id(x) for x in tensors_in(args) if id(x) in self._watched]
            self.baked.update(used)
            if used and func._schema.name.endswith("_") and id(args[0]) in self._watched and not kwargs.get("out"):
                reason = f"the loop changes a tensor that it was given in place ({name_of_operation(func)})"
                raise self.refuse("write", reason, "clone it first")
        traced = Probe in types or (self._storages and any(self.as_probe(x) is not None for x in tensors_in(args)))
        if not traced:
            return func(*args, **kwargs)
        out = kwargs.get("out")
        if out is not None:
            plain = {key: value for key, value in kwargs.items() if key != "out"}
            with self:
                result = getattr(torch, func._schema.name.split("::")[1])(*args, **plain)
            if result.shape != out.shape:
                raise self.refuse(name_of_operation(func), "out= has another shape than the result", "leave out= out")
            self.memory(out).write(self.value(result, out.shape))
            return out
        handler = self._rules.operations.get(packet)
        try:
            if handler is not None:
                return handler(self, func, args, kwargs)
            with self:  # composite operations arrive whole in inference mode
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            raise TraceError(name_of_operation(func), self._rules.reason(name_of_operation(func)))
        except (TraceError, AttributeError, TypeError, AssertionError, NotImplementedError) as problem:
            if problem is self.refusal:
                raise
            error = problem
            if not isinstance(error, TraceError):
                error = TraceError(name_of_operation(func), "is not followed with these arguments")
            constants = self._constants(args)
            if constants is not None:
                return func(*constants, **kwargs)
            if packet in self._rules.final:
                cause = self.first_cause(args, error)
                if cause is not error:
                    reason = f"{cause.reason}, which the loop reads on the host (.item(), if or float())"
                    cause = TraceError(cause.operation, reason, cause.line, _KEEP)
                elif cause.instead is None:
                    cause = TraceError(cause.operation, cause.reason, cause.line, _FIXED)
                raise self._refused(cause) from None
            return self.opaque(func, args, kwargs, error)

    def _constants(self, args: Any) -> list[Any] | None:
        """Returns the arguments with real tensors, if no probe among them depends on anything, as a slice of a cat."""

        def real(x: Any) -> Any:
            probe = self.as_probe(x) if isinstance(x, Tensor) else None
            if probe is None:
                return type(x)(map(real, x)) if isinstance(x, (list, tuple)) else x
            values = flat(probe.value.const, probe.numel())
            return values.reshape(probe.shape).to(self.device, probe.dtype)

        probes = [probe for x in tensors_in(args) if (probe := self.as_probe(x)) is not None]
        return None if any(probe.value.terms for probe in probes) else [real(x) for x in args]

    def refuse(self, operation: str, reason: str, instead: str | None = None) -> TraceError:
        """Returns the error of a loop that cannot be traced; it counts even if the loop catches it."""
        return self._refused(TraceError(operation, reason, instead=instead))

    def _refused(self, error: TraceError) -> TraceError:
        self.refusal = self.refusal or error
        return error

    def host_read(self, probe: Probe) -> None:
        """Ends the trace or refuses it: the loop reads values of the state on the host."""
        if self.until_read:
            raise Finished(probe)
        error = TraceError(
            "numpy(), tolist() or print",
            "the loop reads values of the state on the host",
            instead="keep tensors in the loop, and read them after it",
        )
        raise self._refused(self.first_cause((probe,), error))

    def first_cause(self, args: Any, error: TraceError) -> TraceError:
        """Returns the refusal of the first operation that is not affine among those that operands come from."""
        stack = [node for x in tensors_in(args) if (p := self.as_probe(x)) is not None for node in p.value.nodes()]
        seen: set[Node] = set()
        while stack and len(seen) < 1000:
            node = stack.pop()
            if node.kind == "opaque":
                cause: TraceError = node.label
                return cause
            if node not in seen:
                seen.add(node)
                stack += node.children()
        return error

    def opaque(self, func: Any, args: Any, kwargs: Any, error: TraceError) -> Any:
        """Stands for the result of an operation that is not affine. It costs nothing as long as nobody uses it."""

        def meta(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return type(x)(meta(each) for each in x)
            return torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x

        error = self.first_cause(args, error)
        try:
            found, spec = tree_flatten(func(*meta(tuple(args)), **{key: meta(x) for key, x in kwargs.items()}))
        except Exception:  # its shape is not known
            raise self._refused(error) from None
        leaves, arguments = tree_flatten((tuple(args), kwargs))
        states = {}
        for i, leaf in enumerate(leaves):
            probe = self.as_probe(leaf)
            if probe is not None:
                leaves[i], states[i] = probe.value, (tuple(leaf.shape), leaf.dtype)
        operation = Operation(func, arguments, leaves, states, error)
        if name_of_operation(func).endswith("_"):
            if not isinstance(args[0], Tensor):
                raise self._refused(error)
            node = self.node("opaque", args[0].shape, label=error, made_by=(operation, 0))
            self.memory(args[0]).write(Value(node.numel, {(node, None): 1.0}))
            return args[0]
        made = []
        for i, x in enumerate(found):
            if isinstance(x, Tensor):
                x = self.symbol(self.node("opaque", x.shape, label=error, made_by=(operation, i)), x.dtype)
            made.append(x)
        return tree_unflatten(made, spec)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
         "_forward_hooks_always_called")  # fmt: skip
_KEEP = "keep it a tensor, and take fixed steps: then replay=True can run it again between the rows"
_FIXED = "let the row decide and not the state: a table has fixed steps"
_ROW_BY_ROW = "call fastsde.sample with a callback, or keep the loop as it is"


def cdata(generator: Any) -> int:
    """Returns what tells generators apart: PyTorch wraps them in new objects."""
    found: int = generator._cdata
    return found


@contextlib.contextmanager
def forwards(
    modules: Sequence[nn.Module],
    change: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]],
    without_hooks: bool = False,
) -> Iterator[None]:
    """Within it, the forward of each module is what ``change`` makes of it, and hooks are left out on request."""
    names = ("forward", *(HOOKS if without_hooks else ()))
    held = [{name: module.__dict__[name] for name in names if name in module.__dict__} for module in modules]
    for module in modules:
        module.__dict__["forward"] = change(module, module.forward)
        module.__dict__.update({name: OrderedDict() for name in names[1:]})
    try:
        yield
    finally:
        for module, own in zip(modules, held, strict=True):
            if "forward" not in own:
                module.__dict__.pop("forward", None)
            module.__dict__.update(own)


def tensors_in(args: Any) -> Iterator[Tensor]:
    """Yields the tensors among arguments and in lists of them."""
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from (each for each in x if isinstance(each, Tensor))


def _is_multiple(value: Value) -> bool:
    return not isinstance(value.const, Tensor) and value.const == 0


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def name_of_operation(func: Any) -> str:
    schema = getattr(func, "_schema", None)
    name: str = func.__name__ if schema is None else schema.name
    return name.removeprefix("aten::")


def registered(table: dict[Any, Handler], *names: str) -> Callable[[Handler], Handler]:
    """Registers the handler that it decorates for the aten operations of these names that this PyTorch has."""

    def register(handler: Handler) -> Handler:
        for name in names:
            if hasattr(torch.ops.aten, name):
                table[getattr(torch.ops.aten, name)] = handler
        return handler

    return register


def _gpus(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


def shape_of(*operands: Any) -> torch.Size:
    """Returns the shape that operands broadcast to."""
    shapes = {x.shape for x in operands if isinstance(x, Tensor)}
    shapes.discard(torch.Size())
    if len(shapes) <= 1:
        return shapes.pop() if shapes else torch.Size()
    found: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return found
