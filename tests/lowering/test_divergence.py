"""The divergence of a program against autograd, in float64, so that only a wrong formula can differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastsde import noise
from fastsde.lowering import evaluate, lower, with_divergence

Function = Callable[[Tensor], Tensor]

# Of numbers from about -3 to 3, and above 0.
ANYWHERE: dict[str, Function] = {
    "abs": torch.abs,
    "affine": lambda a: 3 * a - 2,
    "clamp": lambda a: a.clamp(-0.5, 0.8),
    "clamp_min": lambda a: a.clamp(min=0.1),
    "cos": torch.cos,
    "elu": nn.ELU(),
    "elu of another alpha": nn.ELU(0.7),
    "erf": torch.erf,
    "exp": torch.exp,
    "gelu": nn.GELU(),
    "gelu by tanh": nn.GELU("tanh"),
    "leaky_relu": nn.LeakyReLU(0.2),
    "logsigmoid": nn.LogSigmoid(),
    "mish": nn.Mish(),
    "relu": nn.ReLU(),
    "selu": nn.SELU(),
    "sigmoid": nn.Sigmoid(),
    "silu": nn.SiLU(),
    "sin": torch.sin,
    "softplus": nn.Softplus(2),
    "tanh": nn.Tanh(),
}
POSITIVE: dict[str, Function] = {"sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal}
# Of [B, 3], mixing its elements.
MIXED: dict[str, Function] = {
    "product": lambda a: a * a[:, [1, 2, 0]],
    "quotient": lambda a: a / (2 + a[:, [2, 0, 1]].square()),
    "number over units": lambda a: 2 / (3 + a * a),
    "difference": lambda a: a.square() - a[:, [1, 2, 0]] ** 3,
    "of the first half": lambda a: torch.cat((a[:, :1].sin(), torch.ones(len(a), 2, dtype=a.dtype)), 1) * a,
    "repeated": lambda a: a[:, :1] * a,
    "layer_norm": lambda a: nn.functional.layer_norm(a, (3,)) * a,
    "rms_norm": lambda a: nn.functional.rms_norm(a, (3,)) * a,
    "group_norm": lambda a: nn.functional.group_norm(torch.cat((a, a.square().flip(1)), 1), 2)[:, 1:4],
    "mean": lambda a: a - a.square().mean(1, keepdim=True),
    "variance": lambda a: a * a.var(1, keepdim=True),
    "constant": lambda a: torch.ones(len(a), 3, dtype=a.dtype),
    "itself": lambda a: a,
}


def expected(network: Callable[..., Tensor], x: Tensor, t: Tensor, signs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns f and its exact divergence, or its estimate by probes."""

    def one(x: Tensor, t: Tensor) -> Tensor:
        return network(x[None], t[None])[0].reshape(-1)

    jacobian = torch.vmap(torch.func.jacrev(one))(x, t)
    if signs is None:
        return network(x, t), torch.einsum("bii->b", jacobian)
    return network(x, t), torch.einsum("pbi,bij,pbj->b", signs, jacobian, signs) / len(signs)


def check(network: Callable[..., Tensor], dim: int, at: float = 0.0, probes: int = 0, rates: bool = False) -> None:
    n, times = 4, torch.linspace(0.1, 0.9, 4)
    lowered = lower(network, (dim,), times, time_is_input=not rates)
    vectors = lowered.vectors(times, n, ())
    assert vectors is not None
    counts = len(vectors.constants), len(vectors.matrices)
    joint = with_divergence(lowered.program, dim, probes, rates, *counts)
    keys = noise.sample_keys(0, n)
    x = noise.normal(keys, 0, (dim,)).double() + at
    signs = noise.signs(keys, torch.arange(probes), (dim,)) if probes else None
    r, s = torch.tensor([[0.5, -1.0, 2.0, 0.25], [3.0, 0.5, -1.0, 2.0]], dtype=torch.float64)
    numbers = joint.vectors(vectors, signs, (r, s) if rates else None)
    numbers = replace(numbers, given=numbers.given.double())
    for row in (0, 2) if rates else (0,):
        t = times[row].expand(n) if rates else times
        last = torch.full((n, 1), 7.0, dtype=torch.float64) if rates else t.double()[:, None]
        found = evaluate(joint.program, numbers, torch.cat((x, last), 1), row)
        f, trace = expected(network, x, t.double(), None if signs is None else signs.double())
        if rates:
            f, trace = r[row] * x + s[row] * f, s[row] * trace
        torch.testing.assert_close(found, torch.cat((f.detach(), trace.detach()[:, None]), 1), rtol=1e-6, atol=1e-6)


def network_of(function: Function) -> Callable[..., Tensor]:
    return lambda x, t: function(x) * (1 + t[:, None])


@pytest.mark.parametrize("name", [*ANYWHERE, *POSITIVE])
def test_elementwise_functions(name: str) -> None:
    at = 0.05 if name in ANYWHERE else 5.0  # not at a kink
    check(network_of({**ANYWHERE, **POSITIVE}[name]), 3, at)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("probes", [0, 2])
def test_functions_of_several_elements(name: str, probes: int) -> None:
    check(network_of(MIXED[name]), 3, probes=probes)


class Joined(nn.Module):
    """Time features, blocks with norms, and a residual sum."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(dim + 2, 12), nn.LayerNorm(12)
        self.second, self.last = nn.Linear(12 + dim, 12), nn.Linear(12, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        features = torch.stack((t.sin(), t.cos()), 1)
        h = nn.functional.silu(self._of(self.first, torch.cat((x, features), 1)))
        h = h + nn.functional.layer_norm(h, (12,), self.norm.weight.to(h.dtype), self.norm.bias.to(h.dtype))
        return x - self._of(self.last, self._of(self.second, torch.cat((h, x), 1)).tanh())

    @staticmethod
    def _of(layer: nn.Linear, h: Tensor) -> Tensor:
        return nn.functional.linear(h, layer.weight.to(h.dtype), layer.bias.to(h.dtype))


@pytest.mark.parametrize("dim", [1, 5])
@pytest.mark.parametrize("rates", [False, True])
def test_networks(dim: int, rates: bool) -> None:
    torch.manual_seed(0)
    network = Joined(dim).requires_grad_(False)
    for probes in (0, 1, 3):
        check(network, dim, probes=probes, rates=rates)
