"""The task of running other people's loop: the loop, its draws, and the check of what an accelerated one returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from fastsde import noise
from fastsde.tracing import Replay

from ..clients.case import Loop
from ..suite.case import WrongError, check
from ..suite.measure import Figures, Run, measure, seconds
from .trajectory import SEED

_NUDGE, _FACTOR, _ROUNDINGS = 4e-6, 8.0, 64  # see LoopProof
_SHARE_S = 1.0  # after which three measurements of the network's share are enough


@dataclass(frozen=True)
class LoopTask:
    """A loop of another package, called as its users call it.

    Args:
        build: returns the loop on a device, or raises `UnavailableError`. It has exactly one network.
        device: where it runs.
        shape: of its draws, ``[n, *shape]``.
        draws: how many there are, the start included; 0 if it is given its start.
        rows: how often it calls its network.
    """

    build: Callable[[torch.device], Loop]
    device: torch.device
    shape: tuple[int, ...]
    draws: int
    rows: int

    @cached_property
    def loop(self) -> Loop:
        return self.build(self.device)


def tensor_of(result: Any) -> Tensor:
    """Returns the samples of what a loop returns: a tensor, or the images of a pipeline's output."""
    return torch.as_tensor(getattr(result, "images", result)).detach()


def seeded(run: Run) -> Tensor:
    torch.manual_seed(SEED)
    return tensor_of(run())


class LoopProof:
    """Checks what accelerated loops return against the loop itself with the same draws, number for number (RMS).

    They may differ by what rounding explains. Some 8 rounded operations in each of a thousand rows add up to
    sqrt(8,000) x 2^-24 = 5e-6 of the state, and the normals of fastsde's backends differ by up to 4e-6. So the loop
    itself runs again with its draws and its start changed by 4e-6. Eight times what that changes is allowed, plus 64
    roundings of the result, as in the check of `fastsde.accelerate`.
    """

    def __init__(self, task: LoopTask) -> None:
        self.task = task
        self._expected = cache(self._expect)

    def prepare(self) -> None:
        """Builds the loop and computes what several checks need."""
        for kind in ("torch", "contract"):
            self._expected(kind)

    def own_noise(self, run: Run, result: Any) -> Figures:
        """Checks a function that draws as the loop does: the loop is run under the same seed of PyTorch."""
        return self._near(seeded(run), seeded(self.task.loop), self._expected("torch")[1])

    def contract_noise(self, run: Run, result: Any) -> Figures:
        """Checks a function that draws the contract's noise: the loop is given that noise instead of its own."""
        expected, allowed = self._expected("contract")
        return self._near(tensor_of(run()), expected, allowed)

    def loop_itself(self, run: Run, result: Any) -> Figures:
        """Checks that these are all the loop's draws, since it is compared by them, and measures its network's share.

        ``network_s`` is the least time of its network alone, called as the loop has called it.
        """
        expected, allowed = self._expected("torch")
        calls = self._calls()
        if len(calls) != self.task.rows:
            raise WrongError(f"the loop calls its network {len(calls)} times instead of {self.task.rows}")
        (network,) = self.task.loop.networks
        is_recorded = calls[0][2]

        def alone() -> None:
            with torch.set_grad_enabled(is_recorded):
                for args, kwargs, _ in calls:
                    network(*args, **kwargs)

        for _ in range(2):  # to warm up
            alone()
        times, _ = measure({"network": alone, "loop": run}, partial(seconds, device=self.task.device), 10, _SHARE_S)
        network_s, loop_s = min(times["network"]), min(times["loop"])  # without disturbances
        shares = {"network_s": network_s, "network_share": min(1.0, network_s / loop_s)}
        return {**self._near(seeded(run), expected, allowed), **shares}

    def _calls(self) -> list[tuple[Any, Any, bool]]:
        """Returns the arguments of the network's calls, and whether they record gradients."""
        calls: list[tuple[Any, Any, bool]] = []
        (network,) = self.task.loop.networks
        hook = network.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs, torch.is_grad_enabled())), with_kwargs=True
        )
        try:
            self.task.loop()
        finally:
            hook.remove()
        return calls

    def _near(self, x: Tensor, expected: Tensor, allowed: float) -> Figures:
        if x.shape != expected.shape or not x.isfinite().all():
            raise WrongError(f"samples must be finite and {tuple(expected.shape)}, got {tuple(x.shape)}")
        return check("the result", _rms(x - expected), allowed)

    def _expect(self, kind: str) -> tuple[Tensor, float]:
        """Returns what the loop makes of its own draws or the contract's, and how far another result may be off."""
        task, loop = self.task, self.task.loop
        draws = self._draws(kind)
        expected = _replayed(loop, draws)
        torch.manual_seed(SEED + 1)
        changed = [z + _NUDGE * torch.randn_like(z) for z in draws]
        nudged = loop
        if loop.state is not None:
            start = loop.kwargs[loop.state]
            moved = start + _NUDGE * start.abs().max() * torch.randn_like(start)
            nudged = replace(loop, kwargs={**loop.kwargs, loop.state: moved})
        answer = _rms(_replayed(nudged, changed) - expected)
        eps = torch.finfo(expected.dtype).eps
        if not expected.isfinite().all():
            raise WrongError(f"the loop itself returns NaN or infinity on {task.device}")
        return expected, _FACTOR * answer + _ROUNDINGS * eps * _rms(expected)

    def _draws(self, kind: str) -> list[Tensor]:
        task = self.task
        if kind == "torch":
            torch.manual_seed(SEED)
            return [torch.randn(task.shape, device=task.device) for _ in range(task.draws)]
        keys, first = noise.sample_keys(SEED, task.shape[0], device=task.device), int(task.loop.state is not None)
        steps = torch.arange(first, first + task.draws, device=task.device)  # step 0 is for a start that is drawn
        return list(noise.normal(keys, steps, task.shape[1:]))


def _replayed(loop: Loop, draws: Sequence[Tensor]) -> Tensor:
    with Replay(draws) as replay:
        found = tensor_of(loop())
    if replay.left:
        raise WrongError(f"the loop draws {replay.left} times less than {len(draws)}")
    return found


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
