"""Training steps of the swiss-roll MLP by the tutorial's recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from fastsde import data
from fastsde.training import tutorial_config

from .providers import compiled, lean, ours, tutorial
from .providers.tutorial import prove_training
from .suite.case import LEAN, LOOP, Case, Provider, Rank, Target
from .suite.machine import Work
from .suite.plan import Plan
from .tasks.networks import mlp_training_work
from .tasks.recipe import Recipe


def cases(plan: Plan) -> Iterator[Case]:
    config = tutorial_config("swiss-roll")
    steps = 20 if plan.tiny else 100 if plan.quick else 500
    recipe = Recipe(config, partial(data.swiss_roll, 100_000), plan.device, steps)
    targets = []
    if not plan.quick:
        fastest = (
            ("fastsde captured, fp32", "fastsde captured compiled, fp32") if plan.has_gpu else ("fastsde native, fp32",)
        )
        bound = 10.0 if plan.has_gpu else 5.0
        beside = (f"{LEAN}, fp32",)
        targets.append(Target(f"{bound:g} times the speed of {beside[0]}", fastest, beside=beside, at_least=bound))
    yield Case(
        subject="train_swiss_roll",
        name="train-swiss-roll",
        what=f"swiss-roll training step, batch {config.batch_size}",
        about={"batch_size": config.batch_size, "steps": config.steps, "timed_steps": recipe.steps},
        providers=[*rivals(recipe, "fp32"), *ours.trainers(recipe, "fp32")],
        baseline=f"{LOOP}, fp32",
        work=replace(Work(8, *mlp_training_work()) * config.batch_size, launches=1),
        per=recipe.steps,
        network_calls=3 * recipe.steps,  # forwards, backwards and the optimizer
        targets=targets,
    )


def rivals(recipe: Recipe, precision: str) -> list[Provider]:
    """Returns the alternatives to fastsde, all with the tutorial's loss."""
    ways = {LOOP: tutorial.training, LEAN: lean.training, "torch.compile": compiled.training}
    return [
        Provider(
            f"{name}, {precision}",
            partial(make, recipe),
            prove_training,
            precision,
            compiles=name == "torch.compile",
            rank=Rank.NEEDED if name == LEAN and precision != "bf16" else Rank.USUAL,
        )
        for name, make in ways.items()
    ]
