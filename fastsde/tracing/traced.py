"""A traced loop, ready to run: as a table by the package's engines, or row by row in PyTorch where it is no table."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import noise, ops
from ..models.unwrap import unwrap
from ..reference import NonFiniteError
from ..request import make_keys
from ..sampler import Sampler
from ..solvers import StepTable
from ..validation import check_int, check_tensor
from .called import conditions_of, model_of
from .calls import Item, NotATable, per_sample
from .explain import explain
from .program import Output, Program, evaluate, execute, run_operation
from .tabulate import Tabulated, tabulate
from .tape import Call, Draw, cdata
from .values import Node, Positions, Value

__all__ = ["Draws", "Traced"]

_STREAM_OTHER = 4  # further draws of a row
_SAMPLERS = 4  # kept per traced loop
_OF_SAMPLER = ("dtype", "device", "backend", "compile", "max_batch")
_OF_CALL = ("seed", "first_sample", "keys", "progress")


class Draws:
    """The draws of a loop from PyTorch's generators, in the loop's own order.

    Args:
        draws: the draws of the trace.
        generators: generators instead of those of the trace, by the ``_cdata`` of these: PyTorch wraps them anew.
    """

    def __init__(
        self, draws: Sequence[Draw], device: torch.device, generators: Mapping[int, torch.Generator] | None = None
    ) -> None:
        self._draws, self._device, self._generators = draws, device, generators or {}
        self._next = 0
        self._waiting: dict[int, Tensor] = {}

    def __getitem__(self, number: int) -> Tensor:
        while self._next <= number:
            self._waiting[self._next] = self._draw(self._draws[self._next])
            self._next += 1
        return self._waiting.pop(number)

    def finish(self) -> None:
        """Makes the draws that are left, which the loop makes and does not use."""
        while self._next < len(self._draws):
            self._draw(self._draws[self._next])
            self._next += 1

    def _draw(self, draw: Draw) -> Tensor:
        generator = draw.generator
        if generator is not None:
            generator = self._generators.get(cdata(generator), generator)
        device = draw.device or (generator.device if generator is not None else self._device)
        return torch.randn(draw.shape, dtype=draw.dtype, device=device, generator=generator).to(self._device)


class Traced:
    """A loop that was traced. Call it as ``traced(model, n, seed=0, **options)``.

    Attributes:
        table: the loop as a `StepTable`, or None if it is none: `explain` says why.
        program: its rows.
        engine: what ran it last: a backend, or "rows" for PyTorch.
    """

    def __init__(self, program: Program, name: str = "loop") -> None:
        self.program, self.name = program, name
        self.why_no_table: str | None = None
        self.tabulated: Tabulated | None = None
        try:
            self.tabulated = tabulate(program)
        except NotATable as reason:
            self.why_no_table = str(reason)
        self.engine: str | None = None  # that ran it last: the name of a backend, or "rows"
        self._samplers: OrderedDict[Any, tuple[Any, Sampler]] = OrderedDict()

    @property
    def table(self) -> StepTable | None:
        return None if self.tabulated is None else self.tabulated.table

    @property
    def slots(self) -> int:
        """The number of slots: of tensors that the loop keeps from one network call to the next."""
        return self.program.slots if self.table is None else self.table.slots

    @property
    def calls(self) -> list[Call]:
        """What the network is given in each call."""
        return self.program.calls

    @property
    def batch(self) -> int:
        """The number of samples that were traced."""
        shape = self.tabulated.shape if self.tabulated is not None else self.program.rows[0].shapes[0]
        return shape[0] if shape else 1

    def explain(self) -> str:
        """Returns a listing of the rows, of what the network is given, and of the engine that runs them."""
        return explain(self.name, self.program, self.tabulated, self.why_no_table, self.engine)

    def __repr__(self) -> str:
        what = "no table" if self.table is None else repr(self.table)
        return f"Traced({self.name}, {len(self.calls)} network calls, {what})"

    def __call__(self, model: Any, n: int | None = None, *, state: Tensor | None = None, **options: Any) -> Any:
        """Draws samples by the loop's own rows.

        Args:
            model: the network, called as the loop calls it; a list of them if the loop calls several.
            n: the number of samples, by default that of the trace. Loops that mix samples or give each sample its own
                constants run only as traced.
            state: the initial state ``[n, *shape]`` of a loop that is given one.
            options: seed, first_sample, keys, progress, dtype, device, backend, compile and max_batch, as for
                `fastsde.sample`.

        Returns:
            What the loop returns.

        Raises:
            ValueError, TypeError: for an invalid argument.
        """
        unknown = [name for name in options if name not in (*_OF_SAMPLER, *_OF_CALL)]
        if unknown:
            raise TypeError(f"{unknown[0]!r} is no option of a traced loop: it fixes its solver, times and start")
        n = self.batch if n is None else check_int("n", n, 0)
        networks = list(model) if isinstance(model, (list, tuple)) else [model]
        return self.run(networks, n, state=state, **options)

    def run(
        self,
        networks: Sequence[Callable[..., Any]],
        n: int,
        *,
        state: Tensor | None = None,
        draws: Draws | None = None,
        given: Mapping[int, Tensor] | None = None,
        seed: int = 0,
        first_sample: int = 0,
        keys: Any = None,
        progress: bool = False,
        **options: Any,
    ) -> Any:
        """Runs it.

        Args:
            networks: those that the loop calls, in the order of the trace.
            n: the number of samples.
            state: the initial state, if the loop is given one.
            draws: the loop's own draws, instead of the noise contract.
            given: tensors that the network is given instead of those of the trace, by the ids of these.
            options: of `Sampler`.
        """
        if (self.program.state is None) != (state is None):
            expected = "a state" if self.program.state is not None else "no state: it draws its own"
            raise ValueError(f"this loop starts from {expected}, got {'none' if state is None else 'one'}")
        with self._in_their_modes(networks):
            if self.tabulated is None:
                return self._run_rows(networks, n, state, draws, given, seed, first_sample, keys, options)
            return self._run_table(networks[0], n, state, draws, given, seed, first_sample, keys, progress, options)

    @contextlib.contextmanager
    def _in_their_modes(self, networks: Sequence[Callable[..., Any]]) -> Iterator[None]:
        """Runs the networks in the modes, training or evaluation, that the loop has put them into."""
        changed: list[nn.Module] = []
        for number, modes in self.program.modes.items():
            network = networks[number] if number < len(networks) else None
            modules = list(unwrap(network).modules()) if isinstance(network, nn.Module) else []
            if len(modules) == len(modes):
                changed += [module for module, mode in zip(modules, modes, strict=True) if module.training != mode]
        for module in changed:
            module.training = not module.training
        try:
            yield
        finally:
            for module in changed:
                module.training = not module.training

    def _run_table(
        self,
        network: Callable[..., Any],
        n: int,
        state: Tensor | None,
        draws: Draws | None,
        given: Mapping[int, Tensor] | None,
        seed: int,
        first_sample: int,
        keys: Any,
        progress: bool,
        options: Mapping[str, Any],
    ) -> Any:
        tabulated = self.tabulated
        assert tabulated is not None
        conditions = conditions_of(tabulated.calls, given or {})
        is_bound = any(isinstance(leaf, Item) and leaf.kind == "condition" for leaf in tabulated.calls.leaves)
        if n != self.batch and (tabulated.calls.is_fixed or is_bound):
            raise ValueError(
                f"n must be {self.batch}: this loop mixes samples, or gives each its own condition, got {n}"
            )
        sampler = self._sampler(network, options)
        x_init = self._start(state, n, draws, keys, seed, first_sample, sampler.state_dtype)
        noise_function = None
        if draws is not None:
            held: Draws = draws

            def noise_function(row: int, x: Tensor) -> Tensor:
                return self._mixed(held, tabulated.noises[row], x.dtype).reshape(x.shape)

        has_draws = noise_function is not None and any(tabulated.noises)
        found = sampler(
            n,
            x_init=x_init,
            noise=noise_function if has_draws else None,
            model_kwargs={name: value.to(sampler.device) for name, value in conditions.items()} or None,
            trajectory=1 if tabulated.needs_trajectory else None,
            progress=progress,
            **({"seed": seed, "first_sample": first_sample} if keys is None else {"keys": keys}),
        )
        self.engine = sampler.backend if not has_draws or sampler.backend == "reference" else "eager"
        x, states = found if isinstance(found, tuple) else (found, None)
        if draws is not None:
            draws.finish()
        return self._returned(x, states, n, state)

    def _start(
        self,
        state: Tensor | None,
        n: int,
        draws: Draws | None,
        keys: Any,
        seed: int,
        first_sample: int,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Returns the initial slot 0; None if it is a draw of the contract, which the sampler makes itself."""
        tabulated = self.tabulated
        assert tabulated is not None
        noises = [(node, w) for node, w in tabulated.start if node.kind == "noise"]
        shape = (n, *tabulated.shape[1:])
        total: Tensor | None = None
        if noises and draws is not None:
            total = self._mixed(draws, noises, dtype)
        elif noises and (state is not None or tabulated.start_positions is not None):
            own = make_keys(keys, n, seed, first_sample, self.program.device, "eager")
            total = ops.normal(own, 0, shape[1:]).to(dtype).reshape(-1)
        for node, weight in tabulated.start:
            if node.kind == "input":
                assert state is not None
                x = weight * state.to(dtype).reshape(-1)
                total = x if total is None else total + x
        if total is None:
            return None
        return tabulated.scale * self._moved(total, tabulated.start_positions, n).reshape(shape)

    def _moved(self, x: Tensor, positions: Positions | None, n: int) -> Tensor:
        """Returns elements of flat samples."""
        if positions is None:
            return x
        if n == self.batch:
            return x[positions.idx.to(x.device)]
        index = per_sample(positions.idx, self.batch, len(x) // max(1, n))
        if index is None:
            raise ValueError(f"n must be {self.batch}: what this loop returns mixes samples, got {n}")
        return x.reshape(n, -1)[:, index.to(x.device)].reshape(-1)

    def _sampler(self, network: Callable[..., Any], options: Mapping[str, Any]) -> Sampler:
        tabulated = self.tabulated
        assert tabulated is not None
        key = (id(network), *sorted((name, str(value)) for name, value in options.items()))
        if key not in self._samplers:
            own = dict(options)
            if not isinstance(network, nn.Module) and own.get("device") is None:
                own["device"] = self.program.device
            model = model_of(tabulated.calls, unwrap(network) if isinstance(network, nn.Module) else network)
            sampler = Sampler(
                model, tabulated.shape[1:], solver=tabulated.table, prior_std=tabulated.scale, **own
            )  # fmt: skip
            self._samplers[key] = (network, sampler)  # the network too, so that no other one gets its id
            while len(self._samplers) > _SAMPLERS:
                self._samplers.popitem(last=False)
        self._samplers.move_to_end(key)
        return self._samplers[key][1]

    def backend(self, network: Callable[..., Any], **options: Any) -> str:
        """Returns the backend that runs it for a network."""
        return "rows" if self.tabulated is None else self._sampler(network, options).backend

    @staticmethod
    def _mixed(draws: Draws, nodes: Sequence[tuple[Node, float]], dtype: torch.dtype) -> Tensor:
        total: Tensor | None = None
        for node, weight in nodes:
            z = torch.cat([draws[label].to(dtype).reshape(-1) for label in _labels(node)])
            z = z if weight == 1 else weight * z
            total = z if total is None else total + z
        assert total is not None
        return total

    # Results ---------------------------------------------------------------------------------------------------------

    def _returned(self, x: Tensor, states: Tensor | None, n: int, state: Tensor | None) -> Any:
        tabulated = self.tabulated
        assert tabulated is not None
        found = {}
        for node, how in tabulated.returned.items():
            base = x if how.rows == len(tabulated.table) or states is None else states[how.rows]
            value = base.reshape(-1)
            value = value if how.scale == 1 else value * how.scale
            value = value if how.const == 0 else value + how.const
            value = self._moved(value, how.positions, n)
            for step, after in how.after:
                if step.bounds is not None:
                    value = value.clamp(*step.bounds)
                    place: Any = ("D", next(atom.index for atom, _ in after.terms))
                else:
                    ((atom, _),) = after.terms
                    value = run_operation(step, [value])[atom.output].reshape(-1)
                    place = ("o", atom.index, atom.output)
                value = self._evaluated(after, {place: value}, n)
            found[node] = value
        leaves = []
        for leaf in self.program.leaves:
            if isinstance(leaf, Output):
                parts = [self._evaluated(part, found, n) for part in leaf.parts]
                leaf = self._built(leaf, parts, n).to(leaf.dtype)
            leaves.append(leaf)
        return self.program.unflattened(leaves, state)

    def _evaluated(self, value: Value, atoms: Mapping[Any, Tensor], n: int) -> Tensor:
        """Returns a value of n samples, flat."""
        like = next(iter(atoms.values()))
        dtype = like.dtype if like.is_floating_point() else torch.float32
        if n == self.batch:
            if len(value.terms) == 1 and value.const == 0:
                ((key, positions), c), *_ = value.terms.items()
                if positions is None and c == 1:
                    return atoms[key] if isinstance(key, Node) else like
            return evaluate(value, atoms, dtype, like.device)
        total: Tensor | None = None
        for (key, positions), c in value.terms.items():
            x = self._moved(atoms[key] if isinstance(key, Node) else like, positions, n)
            if isinstance(c, Tensor):
                raise ValueError(f"n must be {self.batch}: this loop gives each element its own constants, got {n}")
            total = c * x if total is None else total + c * x
        if total is None or isinstance(value.const, Tensor):
            raise ValueError(f"n must be {self.batch}: this loop gives each element its own constants, got {n}")
        return total + value.const if value.const != 0 else total

    def _built(self, output: Output, parts: Sequence[Tensor], n: int) -> Tensor:
        if n == self.batch:
            return output.build(parts)
        value = output.value
        if isinstance(value, Value):
            return parts[0].reshape(_for_batch(output.shape, self.batch, n))
        shaped = [
            part.reshape(_for_batch(shape, self.batch, n)) for part, (_, shape) in zip(parts, value.parts, strict=True)
        ]
        return torch.cat(shaped, dim=value.dim)

    # No table --------------------------------------------------------------------------------------------------------

    def _run_rows(
        self,
        networks: Sequence[Callable[..., Any]],
        n: int,
        state: Tensor | None,
        draws: Draws | None,
        given: Mapping[int, Tensor] | None,
        seed: int,
        first_sample: int,
        keys: Any,
        options: Mapping[str, Any],
    ) -> Any:
        program = self.program
        if n != self.batch:
            raise ValueError(f"n must be {self.batch}: this loop is no table ({self.why_no_table}), got {n}")
        dtype = torch.float64 if options.get("dtype") == torch.float64 else torch.float32
        for name in ("compile", "max_batch"):
            if options.get(name):
                raise ValueError(f"{name} needs a loop that is a table: this one is none ({self.why_no_table})")
        if options.get("backend", "auto") not in ("auto", "eager", "reference"):
            raise ValueError(
                f"backend {options['backend']!r} needs a loop that is a table: this one is none ({self.why_no_table}); "
                f"use 'auto'"
            )
        noises = contract(program, n, make_keys(keys, n, seed, first_sample, program.device, "eager"))

        def source(node: Node) -> Tensor:
            if node.kind == "input":
                assert state is not None
                return check_tensor("state", state, finite=True).to(dtype).reshape(-1)
            if draws is None:
                return noises(node).to(dtype)
            return torch.cat([draws[label].to(dtype).reshape(-1) for label in _labels(node)])

        with torch.no_grad():
            found = execute(program, networks, source, dtype, arguments=given)
        self.engine = "rows"
        if draws is not None:
            draws.finish()
        for value in found.values():
            if value.numel() and not bool(torch.isfinite(value).all()):
                raise NonFiniteError("the state became NaN or infinity")
        return program.returned(found, state=state)


def contract(program: Program, n: int, keys: Tensor) -> Callable[[Node], Tensor]:
    """Returns the noise of the contract for each draw: the first of a row is that of the row's step in stream 0, and
    further ones follow in stream 4.
    """
    places: dict[Node, tuple[int, int]] = {}
    others = 0
    for step, row in enumerate(program.rows):
        nodes = [node for node in row.noises if node.kind == "noise"]
        for i, node in enumerate(nodes):
            places[node] = (step, 0) if i == 0 else (others, _STREAM_OTHER)
            others += i > 0

    def draw(node: Node) -> Tensor:
        step, stream = places[node]
        if node.shape[:1] == (n,):
            make = ops.normal if stream == 0 else noise.normal
            shape = node.shape[1:]
            z = make(keys, step, shape) if stream == 0 else noise.normal(keys, step, shape, stream)
        else:  # one for all samples
            z = noise.normal(keys[:1], step, node.shape, stream)
        return z.reshape(-1)

    return draw


def _labels(node: Node) -> Iterator[int]:
    label = node.label
    return iter(label) if isinstance(label, tuple) else iter((label,))


def _for_batch(shape: Sequence[int], batch: int, n: int) -> tuple[int, ...]:
    """Returns a traced shape for n samples: its first dimension of more than one, or the one of the batch's size."""
    sizes = list(shape)
    for i, size in enumerate(sizes):
        if size == batch:
            sizes[i] = n
            return tuple(sizes)
        if math.prod(sizes[: i + 1]) > 1:
            break
    return tuple(sizes)
