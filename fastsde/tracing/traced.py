"""A traced loop, ready to run: as a table by the package's engines, or row by row in PyTorch where it is no table."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..models.unwrap import unwrap
from ..reference import NonFiniteError
from ..request import make_keys
from ..sampler import Sampler
from ..solvers import StepTable
from ..validation import check_int, check_tensor
from .called import conditions_of, model_of
from .calls import Item, NotATable, per_sample
from .explain import explain
from .noises import Draws, contract, labels_of
from .program import Output, Program, constant_result, evaluate, execute, run_operation
from .tabulate import Tabulated, tabulate
from .tape import Call
from .values import Node, Positions, Value

__all__ = ["Traced"]

_SAMPLERS = 4  # kept per traced loop
_OF_SAMPLER = ("dtype", "device", "backend", "compile", "max_batch")
_OF_CALL = ("seed", "first_sample", "keys", "progress")


class _Job(NamedTuple):
    """What is to be drawn: see `Traced.run`."""

    n: int
    state: Tensor | None
    draws: Draws | None
    given: Mapping[int, Tensor]
    seed: int
    first_sample: int
    keys: Any
    progress: bool
    options: Mapping[str, Any]

    def own_keys(self, device: torch.device) -> Tensor:
        return make_keys(self.keys, self.n, self.seed, self.first_sample, device, plain=False)


class Traced:
    """A loop that was traced. Call it as ``traced(model, n, seed=0, **options)``.

    Attributes:
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
        self.passed_over: str | None = None  # why not in one launch
        self._samplers: OrderedDict[Any, tuple[Any, Sampler]] = OrderedDict()

    @property
    def table(self) -> StepTable | None:
        """The loop as a table, or None if it is none: `explain` says why."""
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
    def replaced_ids(self) -> set[int]:
        """The ids of tensors given to the loop that only the network reads: others may be given instead of them."""
        if self.tabulated is not None:
            found = [value for item in self.tabulated.calls.conditions.values() for value in item.unique]
        else:
            found = [leaf for call in self.program.calls for leaf in call.leaves]
        return {id(x) for x in found if id(x) in self.program.watched} - self.program.baked_ids

    @property
    def batch(self) -> int:
        """The number of samples that were traced."""
        shape = self.tabulated.shape if self.tabulated is not None else self.program.rows[0].shapes[0]
        return shape[0] if shape else 1

    def explain(self) -> str:
        """Returns a listing of the rows, of what the network is given, and of the engine that runs them."""
        return explain(self.name, self.program, self.tabulated, self.why_no_table, self.engine, self.passed_over)

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
        for network in networks:
            if not callable(network):
                kind = type(network).__name__
                raise TypeError(f"model must be the network, got {kind}: call it as traced(network, n, seed=0)")
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
        job = _Job(n, state, draws, given or {}, seed, first_sample, keys, progress, options)
        with self._in_their_modes(networks):
            if self.tabulated is None:
                found = self._run_rows(networks, job)
            else:
                found = self._run_table(networks[self.program.calls[0].network], job)
        if draws is not None:
            draws.finish()
        return found

    @contextlib.contextmanager
    def _in_their_modes(self, networks: Sequence[Callable[..., Any]]) -> Iterator[None]:
        """Runs the networks in the modes, training or evaluation, that the loop has put them into."""
        changed: list[nn.Module] = []
        for number, modes in self.program.modes.items():
            network = networks[number] if number < len(networks) else None
            modules = list(unwrap(network).modules()) if isinstance(network, nn.Module) else []
            if len(modules) == len(modes) and number in self.program.sets_modes:
                changed += [
                    module
                    for module, mode in zip(modules, modes, strict=True)
                    if getattr(module, "training", mode) != mode
                ]
        for module in changed:
            module.training = not module.training
        try:
            yield
        finally:
            for module in changed:
                module.training = not module.training

    def _run_table(self, network: Callable[..., Any], job: _Job) -> Any:
        tabulated, n, draws = self._known_table, job.n, job.draws
        conditions = conditions_of(tabulated.calls, job.given)
        is_bound = any(isinstance(leaf, Item) and leaf.kind == "condition" for leaf in tabulated.calls.leaves)
        if n != self.batch and (tabulated.calls.is_fixed or is_bound):
            raise ValueError(
                f"n must be {self.batch}: this loop mixes samples, or gives each its own condition, got {n}"
            )
        sampler = self._sampler(network, job.options)
        noise_function = None
        if draws is not None and any(tabulated.noises):
            own = draws

            def noise_function(row: int, x: Tensor) -> Tensor:
                return self._mixed(own, tabulated.noises[row], x.dtype).reshape(x.shape)

        seeds = {"seed": job.seed, "first_sample": job.first_sample} if job.keys is None else {"keys": job.keys}
        found = sampler(
            n,
            x_init=self._start(job, sampler.state_dtype),
            noise=noise_function,
            model_kwargs={name: value.to(sampler.device) for name, value in conditions.items()} or None,
            trajectory=1 if tabulated.needs_trajectory else None,
            progress=job.progress,
            **seeds,
        )
        self.engine, self.passed_over = sampler.last_backend, sampler.passed_over
        x, states = found if isinstance(found, tuple) else (found, None)
        return self._returned(x, states, job)

    @property
    def _known_table(self) -> Tabulated:
        assert self.tabulated is not None
        return self.tabulated

    def _start(self, job: _Job, dtype: torch.dtype) -> Tensor | None:
        """Returns the initial slot 0; None if it is a draw of the contract, which the sampler makes itself."""
        tabulated = self._known_table
        noises = [(node, w) for node, w in tabulated.start if node.kind == "noise"]
        shape = (job.n, *tabulated.shape[1:])
        total: Tensor | None = None
        if noises and job.draws is not None:
            total = self._mixed(job.draws, noises, dtype)
        elif noises and (job.state is not None or tabulated.start_positions is not None):
            total = ops.normal(job.own_keys(self.program.device), 0, shape[1:]).to(dtype).reshape(-1)
        for node, weight in tabulated.start:
            if node.kind == "input":
                assert job.state is not None
                x = weight * job.state.to(dtype).reshape(-1)
                total = x if total is None else total + x
        if total is None:
            return None
        return tabulated.scale * self._moved(total, tabulated.start_positions, job.n).reshape(shape)

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
        tabulated = self._known_table
        key = (id(network), *sorted((name, str(value)) for name, value in options.items()))
        if key not in self._samplers:
            own = dict(options)
            if not isinstance(network, nn.Module) and own.get("device") is None:
                own["device"] = self.program.device
            model = model_of(tabulated.calls, unwrap(network) if isinstance(network, nn.Module) else network)
            sampler = Sampler(model, tabulated.shape[1:], solver=tabulated.table, prior_std=tabulated.scale, **own)
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
            z = torch.cat([draws[label].to(dtype).reshape(-1) for label in labels_of(node)])
            z = z if weight == 1 else weight * z
            total = z if total is None else total + z
        assert total is not None
        return total

    # Results ---------------------------------------------------------------------------------------------------------

    def _returned(self, x: Tensor, states: Tensor | None, job: _Job) -> Any:
        tabulated, n = self._known_table, job.n
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
            else:
                leaf = constant_result(leaf, job.given)
            leaves.append(leaf)
        return self.program.unflattened(leaves, job.state)

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

    def _run_rows(self, networks: Sequence[Callable[..., Any]], job: _Job) -> Any:
        program, options, why = self.program, job.options, f"this one is none ({self.why_no_table})"
        if job.n != self.batch:
            raise ValueError(f"n must be {self.batch}: this loop is no table ({self.why_no_table}), got {job.n}")
        for name in ("compile", "max_batch"):
            if options.get(name):
                raise ValueError(f"{name} needs a loop that is a table: {why}")
        backend = options.get("backend", "auto")
        if backend not in ("auto", "eager", "reference"):
            raise ValueError(f"backend {backend!r} needs a loop that is a table: {why}; use 'auto'")
        dtype = torch.float64 if options.get("dtype") == torch.float64 else torch.float32
        drawn = contract(program, job.n, job.own_keys(program.device))

        def source(node: Node) -> Tensor:
            if node.kind == "input":
                assert job.state is not None
                return check_tensor("state", job.state, finite=True).to(dtype).reshape(-1)
            if job.draws is None:
                return drawn(node).to(dtype)
            return self._mixed(job.draws, [(node, 1.0)], dtype)

        with torch.no_grad():
            found = execute(program, networks, source, dtype, arguments=job.given)
        self.engine = "rows"
        for value in found.values():
            if value.numel() and not bool(torch.isfinite(value).all()):
                raise NonFiniteError("the state became NaN or infinity")
        return program.returned(found, state=job.state, given=job.given)


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
