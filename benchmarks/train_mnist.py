"""Training steps of the MNIST U-Net by the tutorial's recipe, on scikit-learn's digits, which need no download.

On a GPU they run in TF32, PyTorch's default, and bf16; on a CPU in fp32, and in bf16 where it multiplies that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from fastsde import data, ops
from fastsde.training import tutorial_config

from .providers import ours
from .suite.case import LOOP, Case, Provider, Target
from .suite.machine import Work
from .suite.plan import Plan
from .tasks.networks import UNET_KERNELS, unet_training_work
from .tasks.recipe import Recipe
from .train_swiss_roll import rivals


def cases(plan: Plan) -> Iterator[Case]:
    """Yields one case; on a CPU with a few steps, and with --quick with a quarter of the batch."""
    config = tutorial_config("mnist")
    if plan.quick:
        model = config.model | ({"channels": [16, 32, 32]} if plan.tiny else {})
        config = replace(config, batch_size=16, model=model)
    load = partial(data.digits, config.pixel_range)
    steps = 100 if plan.has_gpu and not plan.quick else 2 if plan.quick else 5
    default = "TF32" if plan.has_gpu else "fp32"
    providers: list[Provider] = []
    precisions = (default, "bf16") if plan.has_gpu or ops.multiplies_bf16() else (default,)
    for precision in precisions:
        own = replace(config, precision="bf16") if precision == "bf16" else config
        recipe = Recipe(own, load, plan.device, steps)
        providers += [*rivals(recipe, precision), *ours.trainers(recipe, precision)]
    targets = []
    if plan.has_gpu and not plan.quick:
        for precision in ("TF32", "bf16"):
            fastest = (f"fastsde captured, {precision}", f"fastsde captured compiled, {precision}")
            beside = (f"{LOOP}, TF32",)
            targets.append(Target(f"{precision}: 6 times the loop's speed", fastest, beside=beside, at_least=6.0))
    if not plan.has_gpu and not plan.quick:
        for beside, bound in ((LOOP, 2.0), ("torch.compile", 1.5)):
            name = f"fp32: {bound:g} times the speed of {beside}"
            targets.append(Target(name, ("fastsde native, fp32",), beside=(f"{beside}, fp32",), at_least=bound))
    yield Case(
        subject="train_mnist",
        name="train-mnist",
        what=f"MNIST training step, batch {config.batch_size}",
        about={"batch_size": config.batch_size, "steps": config.steps, "timed_steps": steps},
        providers=[each for each in providers if not (plan.has_gpu and "native" in each.name)],
        baseline=f"{LOOP}, {default}",
        work=replace(Work(784, *unet_training_work()) * config.batch_size, launches=3 * UNET_KERNELS - 1),
        per=steps,
        network_calls=3 * steps,
        targets=targets,
    )
