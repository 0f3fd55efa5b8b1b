"""The alternatives to fastsde for sampling, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor

from ..suite.case import LEAN, LOOP, Case, Provider, Rank, UnavailableError
from ..suite.machine import cpu_instructions
from ..suite.measure import Figures, Run
from ..tasks.trajectory import Proof, Trajectory
from ..tasks.trajectory import proof as prove
from . import compiled, diffusers, lean, torchsde, tutorial


def precisions(task: Trajectory) -> tuple[str, ...]:
    """Returns the precisions to run the network in. The first is PyTorch's default: TF32 for convolutions on a GPU."""
    if task.device.type == "cuda":
        return ("TF32", "fp32", "bf16") if task.has_images else ("fp32", "bf16")
    has_bf16 = task.has_images and any(name.endswith("bf16") for name in cpu_instructions())
    return ("fp32", "bf16") if has_bf16 else ("fp32",)


def baseline(task: Trajectory) -> str:
    return f"{LOOP}, {precisions(task)[0]}"


def case(
    task: Trajectory, proof: Proof, subject: str, name: str, what: str, providers: Sequence[Provider], **options: Any
) -> Case:
    """Returns a case of a whole trajectory; the first provider is the baseline."""

    def prepare() -> None:
        with suppress(UnavailableError):  # the network's library is not installed: each provider says so itself
            proof.prepare(precisions(task)[0])

    return Case(
        subject=subject,
        name=name,
        what=what,
        about={"n": task.n, "rows": task.rows},
        providers=providers,
        baseline=providers[0].name,
        work=task.work,
        prepare=prepare,
        network_calls=task.rows,
        **options,
    )


def others(task: Trajectory, proof: Proof) -> list[Provider]:
    """Returns the tutorial's loop and the other providers that take steps of the same SDE."""
    default, *rest = precisions(task)
    loops = [
        (LOOP, tutorial.sampling, default),
        *((LEAN, lean.sampling, precision) for precision in (default, *rest)),
        ("diffusers ScoreSdeVp", diffusers.score_sde_vp, default),
        *([(LOOP, tutorial.sampling, "fp32")] if "fp32" in rest else []),
    ]
    found = [loop(name, make, task, proof, precision) for name, make, precision in loops]
    chain = partial(as_task, diffusers.ddpm_task, task, default)
    motion = partial(torchsde.prove, proof, default)
    return [
        *found,
        Provider(f"diffusers DDPM, {default}", partial(diffusers.ddpm, task, default), chain, default),
        Provider(f"torchsde sdeint, {default}", partial(torchsde.sdeint, task, default), motion, default),
        *compilations(task),
    ]


def as_task(
    equivalent: Callable[[Trajectory], Trajectory], task: Trajectory, precision: str, run: Run, x: Tensor
) -> Figures:
    """Checks a loop with different steps against fastsde's table of those steps."""
    return prove(equivalent(task)).given_noise(precision, run, x)


def rank(task: Trajectory, precision: str, in_default: Rank = Rank.USUAL) -> Rank:
    """Returns the rank of a provider: the last for fp32 where TF32 is the default, since it is several times slower."""
    default = precisions(task)[0]
    return in_default if precision == default else Rank.LAST if precision == "fp32" else Rank.USUAL


def loop(name: str, make: Callable[[Trajectory, str], Run], task: Trajectory, proof: Proof, precision: str) -> Provider:
    """Returns a provider for a loop that draws its noise with torch.randn and takes exactly the steps of the task."""
    shows = partial(proof.given_noise, precision)
    place = rank(task, precision, Rank.NEEDED if name == LEAN else Rank.USUAL)
    return Provider(f"{name}, {precision}", partial(make, task, precision), shows, precision, rank=place)


def compilations(task: Trajectory) -> list[Provider]:
    """Returns the providers that use ``torch.compile``, one for each precision."""
    return [
        Provider(
            f"torch.compile, {precision}",
            partial(compiled.sampling, task, precision),
            compiled.prove,
            precision,
            compiles=True,
        )
        for precision in precisions(task)
    ]
