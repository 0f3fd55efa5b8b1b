"""Other people's loops as they are, and the same loops through `fastsde.accelerate`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import fastsde

from ..clients.case import Loop
from ..suite.case import Provider, Rank
from ..suite.measure import Run
from ..tasks.loop import LoopProof, LoopTask
from ..tasks.trajectory import SEED

Way = Callable[..., Callable[..., Any]]  # from a loop and the options of `accelerate` to what is called instead


def direct(loop: Loop, **options: Any) -> Callable[..., Any]:
    """Returns a loop accelerated by `fastsde.accelerate` itself."""
    fast: Callable[..., Any] = fastsde.accelerate(loop.call, modules=loop.modules, state=loop.state, **options)
    return fast


def as_it_is(name: str, task: LoopTask, proof: LoopProof, precision: str) -> Provider:
    """Returns the provider of the loop itself: the baseline."""
    return Provider(f"{name}, {precision}", lambda: task.loop, proof.loop_itself, precision)


def accelerated(
    task: LoopTask, proof: LoopProof, precision: str, way: Way = direct, label: str = "", **options: Any
) -> Provider:
    """Returns the provider of an accelerated loop, with the contract's noise unless the options have another."""
    has_own = options.get("noise") == "torch"
    compiles = options.get("compile", False)
    words = (label, "compiled" if compiles else "", "torch's noise" if has_own else "")
    return Provider(
        ", ".join(filter(None, ("fastsde", *words, precision))),
        partial(_run, task, way, options),
        proof.own_noise if has_own else proof.contract_noise,
        precision,
        compiles=compiles,
        rank=Rank.USUAL if label or has_own else Rank.NEEDED,
    )


def _run(task: LoopTask, way: Way, options: dict[str, Any]) -> Run:
    loop = task.loop
    own = options if options.get("noise") == "torch" else {**options, "seed": SEED}
    return partial(way(loop, **own), *loop.args, **loop.kwargs)
