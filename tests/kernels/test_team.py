"""Subnormal numbers: every native kernel flushes them, and leaves the mode of every thread as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from native_steps import native_steps
from torch import Tensor
from trajectories import packed_for, trajectory

from fastsde import StepTable, noise, ops
from fastsde.engines.unet_inference import UNetInference
from fastsde.models import MLP, UNet
from fastsde.objective import Objective

pytestmark = pytest.mark.usefixtures("native")

SUBNORMAL = 71_362  # the bits of 1e-40, which no conversion flushesfrom fastsde.objective import Objective

BATCH, SIZE = 300, 50  # which several threads share
KEYS = noise.sample_keys(0, BATCH)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def _small(*shape: int) -> Tensor:
    return torch.full(shape, SUBNORMAL, dtype=torch.int32).view(torch.float32)


def _bits(x: Tensor) -> Tensor:
    """Returns the bits without the sign."""
    return x.view(torch.int32) & 0x7FFFFFFF


def _table(f: float = 0.0) -> StepTable:
    """Returns a table of one row that keeps the state and adds a multiple of f."""
    one = torch.ones(1, dtype=torch.float64)
    return StepTable(time=one, a=one, b=f * one)


def _solver_step() -> Tensor:
    return ops.solver_step([_small(BATCH, SIZE)], torch.zeros(BATCH, SIZE), _table(1.0), 0)[0]


def _perturb() -> Tensor:
    x_0, none = _small(BATCH, SIZE), torch.zeros(BATCH, SIZE)
    return ops.perturb(x_0, None, 0, torch.ones(BATCH, 6), z=none).x_in


def _dsm_loss() -> Tensor:
    f = torch.full((BATCH, SIZE), 1e-37).requires_grad_()  # whose gradient is 2 f / n
    zeros = torch.zeros(BATCH, SIZE)
    loss = ops.dsm_loss(f, zeros, None, 0, torch.ones(BATCH, 6), z=zeros)
    return torch.autograd.grad(loss, f)[0]


def _mlp_sampler() -> Tensor:
    x, states = trajectory(MLP(SIZE, (8,)), _table(), KEYS, x_init=_small(BATCH, SIZE), every=1)
    assert (_bits(states[0]) == SUBNORMAL).all()  # moved, not computed with
    return x


def _mlp_training() -> Tensor:
    model = MLP(2, (8,), "SiLU")
    with torch.no_grad():
        for each in model.parameters():
            each.copy_(_small(*each.shape))
    table = Objective(prediction="eps").table(torch.rand(1, BATCH))
    native_steps(model, (2,), torch.zeros(9, 2), KEYS, table, rates=torch.zeros(1, 2))
    return torch.cat([each.detach().flatten() for each in model.parameters()])


@torch.no_grad()
def _unet() -> Tensor:
    model = UNet(1, 8, (16, 16))
    for parameter in model.parameters():
        parameter.zero_()
    model.head[1].bias.copy_(_small(1))
    return UNetInference(model)(torch.zeros(30, 1, 8, 8), torch.ones(30))


def _draws() -> Tensor:
    """Draws are never subnormal; these calls test only the mode that they leave behind."""
    keys = noise.sample_keys(0, BATCH)
    ops.dispatch.kernel("normal", keys.device).bits(keys, 0, 0, (SIZE,))
    return ops.normal(keys, 0, (SIZE,)) * 0


def _unknown_code() -> Tensor:
    from fastsde.kernels.cpu import library, mlp_sampler

    packed, vectors = packed_for(MLP(2, (8,), "SiLU"), _table(), BATCH, KEYS.device)
    packed._code[1].activation = 99
    given = {"vectors": vectors, "terms": _table().trajectory_terms, "out": torch.zeros(BATCH, 2)}
    with pytest.raises(ValueError, match="mlp_sampler was given a code that it does not know"):
        mlp_sampler.mlp_sampler(packed, _table().on(KEYS.device), KEYS, **given)
    with pytest.raises(ValueError, match="activation must be one that the native kernels know, got 'Sine'"):
        library.code("activation", "Sine")
    return torch.zeros(1)


KERNELS: list[Callable[[], Tensor]] = [
    _solver_step,
    _perturb,
    _dsm_loss,
    _mlp_sampler,
    _mlp_training,
    _unet,
    _draws,
    _unknown_code,
]


def _flushes() -> list[bool]:
    """Returns whether this thread flushes, in fp32 and in float64, and whether any of PyTorch's threads does."""
    small = 1e-300
    of_all = _small(1 << 18) * 1.0
    return [bool((_small(1) * 1.0 == 0).any()), small * 1e-20 == 0, bool((_bits(of_all) == 0).any())]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__[1:])
@pytest.mark.parametrize("threads", [1, 2])
def test_it_flushes_and_leaves_every_thread_as_it_was(kernel: Callable[[], Tensor], threads: int) -> None:
    torch.set_num_threads(threads)
    assert not any(_flushes())
    assert (_bits(kernel()) == 0).all()
    assert not any(_flushes())


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__[1:])
def test_a_caller_that_flushes_goes_on_to_do_so(kernel: Callable[[], Tensor]) -> None:
    assert torch.set_flush_denormal(True), "PyTorch cannot flush on this CPU"
    kernel()
    assert all(_flushes()[:2])
