"""Networks of random layers, which must sample as the reference does, whatever a program makes of them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastsde
from fastsde import noise, ops
from fastsde.engines import Network
from fastsde.likelihood.divergence import Divergence
from fastsde.likelihood.native import NativeDivergence

ACTIVATIONS = (
    *(functional.silu, functional.relu, functional.gelu, functional.mish, functional.softplus, functional.logsigmoid),
    *(functional.elu, functional.leaky_relu, torch.tanh, torch.sigmoid, torch.sin),
)
WIDTHS = (1, 2, 7, 16, 33, 64, 100)


class Random(nn.Module):
    """Some of: linear and residual layers, activations, FiLM, norms, slices, permutations, gates, concatenations.

    Args:
        choose: makes all choices.
    """

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.dim, self.embedded = choose.choice((1, 2, 3, 5, 8, 17)), choose.choice((1, 6, 16))
        self.condition = nn.Linear(4, self.embedded) if choose.random() < 0.6 else None
        self.time = nn.Linear(1, self.embedded)
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, Any]] = []
        width = self.dim
        for _ in range(choose.randint(1, 9)):
            width = self._add(choose, width)
        self.last = nn.Linear(width, self.dim)

    def _add(self, choose: random.Random, width: int) -> int:
        kind = choose.choice(
            (
                "linear",
                "linear",
                "act",
                "film",
                "residual",
                "norm",
                "slice",
                "order",
                "gate",
                "time",
                "condition",
                "mean",
            )
        )
        extra: Any = None
        if kind == "linear":
            after = choose.choice(WIDTHS)
            self.layers.append(nn.Linear(width, after, bias=choose.random() < 0.7))
            width = after
        elif kind == "film":
            self.layers.append(nn.Linear(self.embedded, 2 * width))
        elif kind == "residual":
            self.layers.append(nn.Linear(width, width))
        elif kind == "norm":
            makes = [
                nn.LayerNorm(width),
                nn.RMSNorm(width),
                *([nn.GroupNorm(width // 4, width)] if width % 4 == 0 else []),
            ]
            self.layers.append(choose.choice(makes))
        elif kind == "act":
            extra = choose.choice(ACTIVATIONS)
        elif kind == "slice":
            extra = sorted(choose.sample(range(width + 1), 2))
            width = extra[1] - extra[0]
        elif kind == "order":
            extra = choose.sample(range(width), width) if width < 20 else list(range(width))
        elif kind == "gate" and width % 2 == 0:
            width //= 2
        elif kind == "time":
            width += self.embedded
        elif kind == "condition" and self.condition is not None:
            width += 4
        elif kind in ("gate", "condition"):
            return width
        self.steps.append((kind, extra))
        return width

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        embedding, layers = functional.silu(self.time(t[:, None])), iter(self.layers)
        if c is not None and self.condition is not None:
            embedding = embedding + self.condition(c)
        for kind, extra in self.steps:
            x = self._step(kind, extra, x, embedding, c, layers)
        return 0.1 * self.last(x)

    def _step(self, kind: str, extra: Any, x: Tensor, embedding: Tensor, c: Any, layers: Any) -> Tensor:
        if kind in ("linear", "norm"):
            return next(layers)(x)
        if kind == "act":
            return extra(x)
        if kind == "film":
            scale, shift = next(layers)(embedding).chunk(2, -1)
            return x * (1 + scale) + shift
        if kind == "residual":
            return x + functional.silu(next(layers)(x))
        if kind in ("slice", "order"):
            return x[:, extra[0] : extra[1]] if kind == "slice" else x[:, extra]
        if kind == "gate":
            first, second = x.chunk(2, -1)
            return first * torch.sigmoid(second) / (1 + first.square())
        if kind == "mean":
            return x - x.mean(-1, keepdim=True) * embedding[:, :1] + x.clamp(-1, 1)
        return torch.cat((x, embedding), -1) if kind == "time" else torch.cat((c, x), -1)


@pytest.mark.skipif(not ops.has_native(torch.device("cpu")), reason="no native kernels")
@pytest.mark.parametrize("count", [15, pytest.param(80, marks=pytest.mark.slow)])
def test_random_networks_sample_as_the_reference(count: int) -> None:
    for _ in range(count):
        seed = random.SystemRandom().randrange(2**32)
        torch.manual_seed(seed)
        choose = random.Random(seed)
        network, n = Random(choose).eval(), choose.choice((1, 3, 16, 17, 64, 65, 200))
        options: dict[str, Any] = {
            "steps": 5,
            "solver": "ddim",
            "prediction": choose.choice(("eps", "v")),
            "seed": seed,
        }
        if network.condition is not None:
            given = torch.randn(n, 4) if choose.random() < 0.5 else torch.randn(1, 4).expand(n, 4)
            options["model_kwargs"] = {"c": given}
            if choose.random() < 0.4:
                options |= {"guidance": 1.7, "uncond_kwargs": {"c": torch.zeros(n, 4)}}
        ours, theirs = (
            fastsde.sample(network, (n, network.dim), backend=b, **options) for b in ("persistent", "reference")
        )
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * scale, msg=lambda m, s=seed: f"seed {s}: {m}")


@pytest.mark.slow
@pytest.mark.skipif(not ops.has_native(torch.device("cpu")), reason="no native kernels")
def test_random_networks_have_the_divergence_of_autograd() -> None:
    n, t = 7, torch.linspace(0.1, 0.9, 7)
    for _ in range(40):
        seed = random.SystemRandom().randrange(2**32)
        torch.manual_seed(seed)
        model = Random(random.Random(seed)).eval().requires_grad_(False)
        kwargs = {} if model.condition is None else {"c": torch.randn(n, 4)}
        keys = noise.sample_keys(seed, n)
        x = noise.normal(keys, 0, (model.dim,))
        for probes in (0, 2):
            usual = Divergence(Network(model), keys, (model.dim,), probes, may_be_native=True)
            found = NativeDivergence.find(usual, x, kwargs, (0.1, 0.9))
            assert found is not None, seed
            f, trace = usual(x, t, kwargs)
            expected = torch.cat((f, trace[:, None].float()), 1)
            scale = max(1.0, float(expected.abs().max()))
            got = found(x, t, torch.arange(n))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * scale, msg=lambda m, s=seed: f"seed {s}: {m}")
