"""fastsde itself."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import fastsde
from fastsde.distributed import Ranks
from fastsde.engines.unet_gradients import has_native_gradients
from fastsde.plan import unavailable_reason
from fastsde.training.captured import CapturedSteps, can_capture
from fastsde.training.native_mlp import NativeSteps, can_run_natively
from fastsde.training.steps import EagerSteps, Work

from ..suite.case import Provider, Rank, UnavailableError
from ..suite.measure import Run
from ..tasks.recipe import Recipe, eager, prove_finite, prove_weights
from ..tasks.trajectory import SEED, Proof, Trajectory, dtype_of
from . import openvino

COMPILED: dict[bool | str, str] = {True: "compiled", False: "", "openvino": "through OpenVINO"}  # in a provider's name


def sampling(
    task: Trajectory, backend: str, precision: str = "fp32", compile: bool | str = False, anew: bool = False
) -> Run:
    """Returns a function that calls a sampler or, with ``anew``, `fastsde.sample`, which creates one in each call."""
    model = copy.deepcopy(task.checkpoint.model)  # its own copy, since only a few captures are kept per network
    options = {**task.options, "backend": backend, "dtype": dtype_of(precision), "compile": compile}
    reason = None if backend == "auto" else unavailable_reason(backend, task.device)
    if reason is not None:
        raise UnavailableError(reason)
    check_compiler(compile)
    sampler, given = fastsde.Sampler(model, task.sample_shape, **options), task.model_kwargs

    def run() -> Tensor:
        with task.precision_of_products(precision):
            if anew:
                return fastsde.sample(model, task.shape, seed=SEED, model_kwargs=given, **options)
            return sampler(task.n, seed=SEED, model_kwargs=given)

    return run


def check_compiler(compile: bool | str) -> None:
    """Raises UnavailableError if what the option asks for is not installed."""
    if compile == "openvino":
        openvino.require()


def sampler(
    task: Trajectory,
    proof: Proof,
    backend: str,
    precision: str,
    compile: bool | str = False,
    anew: bool = False,
    rank: Rank = Rank.USUAL,
) -> Provider:
    """Returns the provider for a backend in one precision."""
    words = ("fastsde.sample()" if anew else "fastsde", backend, COMPILED[compile])
    return Provider(
        f"{' '.join(filter(None, words))}, {precision}",
        partial(sampling, task, backend, precision, compile, anew),
        partial(proof.same_noise, precision),
        precision,
        compiles=bool(compile),
        rank=Rank.LAST if backend == "reference" else rank,
    )


def eager_steps(recipe: Recipe, compile: bool = False) -> Run:
    return _steps(recipe, eager(recipe.work(replace(recipe.config, compile=compile))))


def native(work: Work) -> NativeSteps | EagerSteps:
    """Returns native steps of a small network, or steps of a U-Net that native kernels compute."""
    if can_run_natively(work, Ranks()):
        return NativeSteps(work)
    if not has_native_gradients(work.model, work.autocast or torch.float32):
        raise UnavailableError(
            "native steps need a U-Net or, in fp32, a small network on the CPU, and a compiler, got a "
            f"{type(work.model).__name__} in {work.config.precision} on {work.device}"
        )
    return EagerSteps(work, Ranks())


def native_steps(recipe: Recipe) -> Run:
    return _steps(recipe, native(recipe.work()))


def captured_steps(recipe: Recipe, compile: bool = False) -> Run:
    config = replace(recipe.config, compile=compile)
    if not can_capture(recipe.device, Ranks()):
        raise UnavailableError(f"captured steps need Triton and a CUDA GPU, got device {recipe.device}")
    return _steps(recipe, CapturedSteps(recipe.work(config)))


def trainers(recipe: Recipe, precision: str) -> list[Provider]:
    """Returns a provider for each way to take training steps, in one precision."""
    compiled = replace(recipe.config, compile=True)
    on_cpu, on_gpu = (Rank.NEEDED, Rank.USUAL) if recipe.device.type == "cpu" else (Rank.USUAL, Rank.NEEDED)
    return [
        Provider(
            f"fastsde eager, {precision}",
            partial(eager_steps, recipe),
            prove_finite,
            precision,
        ),
        Provider(
            f"fastsde eager compiled, {precision}",
            partial(eager_steps, recipe, compile=True),
            partial(prove_weights, recipe, eager, compiled),
            precision,
            compiles=True,
        ),
        Provider(
            f"fastsde native, {precision}",
            partial(native_steps, recipe),
            partial(prove_weights, recipe, native, recipe.config),
            precision,
            rank=on_cpu,
        ),
        Provider(
            f"fastsde captured, {precision}",
            partial(captured_steps, recipe),
            partial(prove_weights, recipe, CapturedSteps, recipe.config),
            precision,
            rank=on_gpu,
        ),
        Provider(
            f"fastsde captured compiled, {precision}",
            partial(captured_steps, recipe, compile=True),
            partial(prove_weights, recipe, CapturedSteps, compiled),
            precision,
            compiles=True,
        ),
    ]


def _steps(recipe: Recipe, taker: CapturedSteps | EagerSteps | NativeSteps) -> Run:
    first = 0

    def run() -> Tensor:
        nonlocal first
        for count in taker.chunks(recipe.steps):
            losses: Tensor = taker.take(first, count)
            first += count
        return losses

    return run
