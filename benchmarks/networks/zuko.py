"""zuko's MLPs, and the vector field of its continuous flow."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zuko.flows.continuous import FFJTransform
from zuko.nn import MLP

from .case import Called, Case

TITLE, PACKAGES = "zuko", ("zuko",)


class Joined(nn.Module):
    """An MLP of x and t as columns."""

    def __init__(self, normalize: bool) -> None:
        super().__init__()
        self.net = MLP(4, 3, (64, 64), activation=nn.ELU, normalize=normalize)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        f: Tensor = self.net(torch.cat((x, t[:, None]), -1))
        return f


def _field() -> Called:
    transform = FFJTransform(3, 4)
    return Called(transform, (3,), lambda x, t, c: transform.f(t, x, c), (torch.randn(2, 4),))


def cases() -> list[Case]:
    return [
        Case("MLP", lambda: Called(Joined(False), (3,))),
        Case("MLP, normalize=True", lambda: Called(Joined(True), (3,))),
        Case("CNF's FFJTransform.f", _field),
    ]
