"""The MLPs that other people's loops call, with the minimum work of a call for each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

POLICY_STEPS, ACTIONS, OBSERVED = 100, (8, 2), 20
# FLOP, exponentials and logarithms, without what is known before: of t, and of what is observed.
AZULA_WORK = 2 * (5 * 256 + 2 * 256 * 256 + 256 * 5), 3 * 256
POLICY_WORK = 2 * (16 * 256 + 2 * 256 * 256 + 256 * 16), 2 * 3 * 256


class Joined(nn.Module):
    """Layers that take x and a time per sample as columns."""

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        sizes, layers = (dim + 1, *hidden), []
        for inputs, outputs in zip(sizes, hidden, strict=False):
            layers += [nn.Linear(inputs, outputs), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        f: Tensor = self.layers(torch.cat((x, t[:, None]), 1))
        return f


class Backbone(nn.Module):
    """An MLP of x and azula's own encoding of t, which all samples share."""

    def __init__(self, encoding: Callable[[int], nn.Module], dim: int = 5, width: int = 256) -> None:
        super().__init__()
        self.time = nn.Sequential(encoding(64), nn.Linear(64, width))
        inner = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.layers = nn.Sequential(nn.Linear(dim + width, width), nn.SiLU(), *inner, nn.Linear(width, dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        e = self.time(t)
        f: Tensor = self.layers(torch.cat((x, e.expand(*x.shape[:-1], -1)), -1))
        return f


class Policy(nn.Module):
    """An MLP that predicts the noise of a sequence of actions, from what is observed and an embedding of the step."""

    def __init__(self, actions: tuple[int, int] = ACTIONS, observed: int = OBSERVED, width: int = 256) -> None:
        super().__init__()
        size = actions[0] * actions[1]
        self.step = nn.Embedding(POLICY_STEPS, 64)
        inner = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.Mish())]
        self.layers = nn.Sequential(nn.Linear(size + observed + 64, width), nn.Mish(), *inner, nn.Linear(width, size))

    def forward(self, actions: Tensor, t: Tensor, observed: Tensor) -> Tensor:
        e = self.step(t.expand(len(actions)))
        f: Tensor = self.layers(torch.cat((actions.flatten(1), observed, e), -1))
        return f.reshape(actions.shape)
