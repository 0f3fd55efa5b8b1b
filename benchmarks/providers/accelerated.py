"""Other people's loops as they are, and the same loops through `fastsde.accelerate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import fastsde

from ..clients.case import Loop
from ..suite.case import Case, Provider, Rank, Target, UnavailableError
from ..suite.machine import Work
from ..suite.measure import Run
from ..tasks.loop import LoopProof, LoopTask
from ..tasks.trajectory import SEED
from .ours import COMPILED, check_compiler

Way = Callable[..., Callable[..., Any]]  # from a loop and the options of `accelerate` to what is called instead


def direct(loop: Loop, **options: Any) -> Callable[..., Any]:
    """Returns a loop accelerated by `fastsde.accelerate` itself."""
    fast: Callable[..., Any] = fastsde.accelerate(loop.call, modules=loop.modules, state=loop.state, **options)
    return fast


def case(
    task: LoopTask,
    name: str,
    what: str,
    baseline: str,
    ways: Sequence[tuple[str, Way, dict[str, Any]]],
    flop: float,
    specials: float = 0.0,
    precision: str = "fp32",
    rounds: int = 10,
    at_least: float = 0.0,
) -> Case:
    """Returns the case of a loop and of some ways to accelerate it: a label, the way, and options of `accelerate`.

    Args:
        at_least: a goal of the project on a CPU, the speed of the fastest way relative to the loop; 0 for none.
    """
    proof = LoopProof(task)

    def prepare() -> None:
        with suppress(UnavailableError):  # each provider says so itself
            proof.prepare()

    n = task.shape[0]
    base = as_it_is(baseline, task, proof, precision)
    fast = [accelerated(task, proof, precision, way, label, **more) for label, way, more in ways]
    targets = []
    if at_least and task.device.type == "cpu":
        names = tuple(each.name for each in fast if not each.compiles)
        targets = [Target(f"{at_least:g} times the loop's speed", names, beside=(base.name,), at_least=at_least)]
    return Case(
        subject="loops",
        name=f"loop-{name}",
        what=f"{what}, {n:,} x {task.rows}",
        about={"n": n, "rows": task.rows},
        providers=[base, *fast],
        baseline=base.name,
        work=Work(flop=flop * n, specials=specials * n) * task.rows,
        network_calls=task.rows,
        rounds=rounds,
        targets=targets,
        prepare=prepare,
    )


def as_it_is(name: str, task: LoopTask, proof: LoopProof, precision: str) -> Provider:
    """Returns the provider of the loop itself: the baseline."""
    return Provider(f"{name}, {precision}", lambda: task.loop, proof.loop_itself, precision)


def accelerated(
    task: LoopTask, proof: LoopProof, precision: str, way: Way = direct, label: str = "", **options: Any
) -> Provider:
    """Returns the provider of an accelerated loop, with the contract's noise unless the options have another."""
    has_own = options.get("noise") == "torch"
    compiles = options.get("compile", False)
    words = (label, COMPILED[compiles], "torch's noise" if has_own else "")
    return Provider(
        ", ".join(filter(None, ("fastsde", *words, precision))),
        partial(_run, task, way, options),
        proof.own_noise if has_own else proof.contract_noise,
        precision,
        compiles=bool(compiles),
        rank=Rank.USUAL if label or has_own else Rank.NEEDED,
    )


def _run(task: LoopTask, way: Way, options: dict[str, Any]) -> Run:
    loop = task.loop
    check_compiler(options.get("compile", False))
    own = options if options.get("noise") == "torch" else {**options, "seed": SEED}
    return partial(way(loop, **own), *loop.args, **loop.kwargs)
