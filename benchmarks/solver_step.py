"""One Euler-Maruyama step including its noise, of a thousand digits and of a state larger than any cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from fastsde import ops, reference, solvers

from .providers import diffusers, lean, tutorial
from .providers.compiled import compiled
from .suite.case import LEAN, LOOP, Case, Provider, Rank, check
from .suite.machine import Work
from .suite.measure import Figures, Rotated
from .suite.plan import Plan
from .tasks.elements import SDE, SPECIALS, calls, check_normals, copies, kernels_name, keys_of, need_kernels, traffic

TABLE = solvers.build("euler_maruyama", SDE, 999)
ROW = 500
_SIGMA = float(SDE.sigma(TABLE.time[ROW]))
Step = Callable[[Tensor, Tensor], Tensor]
Pairs = Rotated[tuple[Tensor, Tensor]]
_SHAPES = {"digits": (1000, 784), "large": (16_384, 3072)}
_CPU_LARGE = (4096, 3072)


@dataclass(frozen=True)
class State:
    """Pairs of a state and a network output from which the step is taken, in turn."""

    shape: tuple[int, ...]
    plan: Plan

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        device = self.plan.device
        count = copies(8 * self.elements, self.plan)
        return [(torch.randn(self.shape, device=device), torch.randn(self.shape, device=device)) for _ in range(count)]

    @cached_property
    def keys(self) -> Tensor:
        return keys_of(self.shape, self.plan.device)


def cases(plan: Plan) -> Iterator[Case]:
    """Yields both states; with --quick only the digits."""
    for name, shape in _SHAPES.items():
        if name == "large" and not plan.has_gpu:
            shape = _CPU_LARGE
        if name == "digits" or not plan.quick:
            yield _case(State(shape, plan), name)


def _case(state: State, name: str) -> Case:
    on = partial(_on, state)
    compile_it = partial(compiled, device=state.plan.device)
    plain = partial(lean.step, **lean_factors())
    providers = [
        Provider(LOOP, partial(on, partial(tutorial_step, state.plan.device)), partial(_prove_any, state, 1.0)),
        Provider(LEAN, partial(on, lambda: plain), partial(_prove_any, state, 1.0), rank=Rank.NEEDED),
        Provider(
            "torch.compile", partial(on, lambda: compile_it(plain)), partial(_prove_any, state, 1.0), compiles=True
        ),
        Provider(
            "diffusers ScoreSdeVp",
            partial(on, partial(diffusers.score_sde_vp_step, len(TABLE), ROW, state.plan.device), _as_eps),
            partial(_prove_any, state, -1 / _SIGMA),
        ),
        Provider(
            "fastsde reference", partial(on, partial(_reference, state)), partial(_prove_ours, state), rank=Rank.LAST
        ),
        Provider(
            kernels_name(state.plan),
            partial(on, partial(_kernel, state)),
            partial(_prove_ours, state),
            rank=Rank.NEEDED,
        ),
        Provider(
            f"{kernels_name(state.plan)}, bf16 network",
            partial(on, partial(_kernel, state), Tensor.bfloat16),
            partial(_prove_ours, state),
            "bf16",
            work=work(state, 6),
        ),
    ]
    return Case(
        subject="solver_step",
        name=f"solver-step-{name}",
        what=f"solver step, {state.elements / 1e6:.3g} M elements",
        about={"n": state.shape[0], "elements": state.elements},
        providers=providers,
        work=work(state, 8),
        prepare=lambda: (state.pairs, state.keys),
        calls=calls(state.elements, state.plan) if state.plan.has_gpu else 5,
        rounds=30,
        enough=2.0,
        is_kernel=True,
    )


def work(state: State, input_bytes: int) -> Work:
    """Returns the work of a step whose x and f together have ``input_bytes`` bytes per element."""
    size = state.elements
    total = traffic(input_bytes * size, 4 * size, state.plan)
    return Work(total, flop=5 * size, specials=SPECIALS * size, launches=1)


def tutorial_step(device: torch.device) -> Step:
    """Returns the tutorial's step, with its scalars on the device as in the tutorial."""
    t = torch.tensor(float(TABLE.time[ROW]), device=device)
    size = torch.tensor(1 / len(TABLE), device=device)
    return lambda x, f: tutorial.step(x, f, tutorial.beta_at(t), size)


def lean_factors() -> dict[str, float]:
    """Returns the factors of x' = a x + b f + d z."""
    k = TABLE.row(ROW)
    return {"a": k.A[0][0], "b": k.b[0], "d": k.d[0]}


def _as_eps(score: Tensor) -> Tensor:
    return -_SIGMA * score


def _on(state: State, make: Callable[[], Step], convert: Callable[[Tensor], Tensor] | None = None) -> Pairs:
    """Takes the step from one state after the other, starting with the first."""
    step = make()
    pairs = [(x, convert(f)) if convert else (x, f) for x, f in state.pairs]
    return Rotated(lambda pair: step(*pair), pairs)


def _reference(state: State) -> Step:
    return lambda x, f: reference.solver_step((x,), f, TABLE, ROW, keys=state.keys)[0]


def _kernel(state: State) -> Step:
    device = state.plan.device
    need_kernels(device)
    module, rows, terms = ops.dispatch.kernel("solver_step", device), ops.device_table(TABLE, device), TABLE.terms(ROW)
    out = torch.full(state.shape, math.nan, device=device)

    def step(x: Tensor, f: Tensor) -> Tensor:
        module.solver_step([x], f, rows, ROW, terms=terms, keys=state.keys, out=[out])
        return out

    return step


def _prove_ours(state: State, run: Pairs, result: Tensor) -> Figures:
    """Checks a part of the result against the reference."""
    x, f = (each[:64].float() for each in run.last)
    k = lean_factors()
    (expected,) = reference.solver_step((x,), f, TABLE, ROW, keys=state.keys[:64])
    bound = 4e-6 * k["d"] + 4 * 2**-24 * float((k["a"] * x.abs() + k["b"] * f.abs()).max())
    return check("the step", float((result[:64] - expected).abs().max()), bound)


def _prove_any(state: State, scale: float, run: Pairs, result: Tensor) -> Figures:
    """Checks that x' - a x - b f is noise of deviation d, where f is ``scale`` times the step's input."""
    (x, f), k = run.last, lean_factors()
    f = scale * f
    rest = (result.double() - (k["a"] * x + k["b"] * f)) / k["d"]
    check("the noise", abs(float((rest * f).mean())), 6 / math.sqrt(state.elements))
    return check_normals("the noise", rest)
