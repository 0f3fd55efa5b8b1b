"""Normals of the noise contract, compared with PyTorch's generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastsde import noise, ops

from .providers.compiled import compiled
from .suite.case import Case, Provider, Rank, Target, check
from .suite.machine import Work
from .suite.measure import Figures, Run
from .suite.plan import Plan
from .tasks.elements import SPECIALS, calls, check_normals, kernels_name, keys_of, need_kernels, traffic

RANDN = "torch.randn"


def cases(plan: Plan) -> Iterator[Case]:
    """Yields a million normals in one sample and in many; with --quick only in one."""
    for name, shape in (("sample", (1, 1_000_000)), ("images", (1276, 784))):
        if name == "sample" or not plan.quick:
            yield _case(plan, name, shape)


def _case(plan: Plan, name: str, shape: tuple[int, ...]) -> Case:
    ours, device = kernels_name(plan), plan.device
    return Case(
        subject="noise",
        name=f"noise-{name}",
        what=f"normals, {shape[0]:,} x {shape[1]:,}",
        about={"n": shape[0], "elements": math.prod(shape)},
        providers=[
            Provider(RANDN, lambda: lambda: torch.randn(shape, device=device), _prove_normal),
            Provider("torch.compile", partial(_compiled, shape, device), _prove_normal, compiles=True),
            Provider(
                "fastsde reference",
                partial(_contract, noise.normal, shape, device),
                partial(_prove_ours, shape),
                rank=Rank.LAST,
            ),
            Provider(ours, partial(_kernel, shape, device), partial(_prove_ours, shape), rank=Rank.NEEDED),
        ],
        baseline=RANDN,
        work=Work(traffic(0, 4 * math.prod(shape), plan), specials=SPECIALS * math.prod(shape), launches=1),
        calls=calls(math.prod(shape), plan),
        rounds=30,
        enough=2.0,
        is_kernel=True,
        targets=[] if plan.has_gpu or plan.quick else [Target("twice torch.randn", (ours,), None, (RANDN,), 2.0)],
    )


def _compiled(shape: tuple[int, ...], device: torch.device) -> Run:
    fast = compiled(lambda: torch.randn(shape, device=device), device)
    return lambda: fast()


def _contract(normal: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device) -> Run:
    keys = keys_of(shape, device)
    return lambda: normal(keys, 0, shape[1:])


def _kernel(shape: tuple[int, ...], device: torch.device) -> Run:
    need_kernels(device)
    return _contract(ops.normal, shape, device)


def _prove_normal(run: Run, z: Tensor) -> Figures:
    """Checks the distribution of two draws."""
    first = z.clone()
    return check_normals("the draws", torch.stack((first, run())))


def _prove_ours(shape: tuple[int, ...], run: Run, z: Tensor) -> Figures:
    """Checks that normals differ by at most what the contract allows."""
    keys = keys_of(shape, z.device)
    return check("a normal", float((z - noise.normal(keys, 0, shape[1:])).abs().max()), 4e-6)
