"""JAX: the whole trajectory as one compiled ``lax.scan``, with JAX's own normals (threefry), on the CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastsde.models import MLP, Sinusoidal
from fastsde.networks import Residual

from ..suite.case import Provider, UnavailableError, check, imported
from ..suite.measure import Figures
from ..tasks.trajectory import SEED, Proof, Trajectory

Network = Callable[[Any, Any], Any]  # of x [B, d] and one time
_ACTIVATIONS = {"LogSigmoid": "log_sigmoid", "SiLU": "silu", "ReLU": "relu", "Softplus": "softplus", "Tanh": "tanh"}
_STANDARD_ERRORS = 6.0


class Scan:
    """Samples of an MLP or `Residual` network by a table of one slot, with other noise in each call.

    Args:
        jax: the package, which a test may replace.
    """

    def __init__(self, task: Trajectory, jax: Any) -> None:
        if task.device.type != "cpu":
            raise UnavailableError("JAX takes part on a CPU only: on a GPU it would keep most of the memory to itself")
        self._task, self._jax, self._calls = task, jax, 0
        jax.config.update("jax_platforms", "cpu")
        self.network = converted(jax, task.checkpoint.model)
        table, numpy = task.table, jax.numpy
        if table.slots != 1 or table.terms().has_data:
            raise UnavailableError("JAX's scan here has one slot, and no prediction of the data")
        columns = (table.time, table.A[:, 0, 0], table.b[:, 0], table.d[:, 0])
        self._rows = tuple(numpy.asarray(each.float().numpy()) for each in columns)
        self._drawing, self._given = jax.jit(self._draw), jax.jit(self._take)
        self._again: Tensor | None = None

    def _step(self, x: Any, row: Any, z: Any) -> Any:
        t, a, b, d = row
        return a * x + b * self.network(x, t) + d * z

    def _draw(self, key: Any) -> Any:
        """Returns samples with noise drawn from a key."""
        random, shape = self._jax.random, self._task.shape

        def step(carry: Any, row: Any) -> Any:
            x, key = carry
            key, own = random.split(key)
            return (self._step(x, row, random.normal(own, shape)), key), None

        key, own = random.split(key)
        (x, _), _ = self._jax.lax.scan(step, (random.normal(own, shape), key), self._rows)
        return x

    def _take(self, draws: Any) -> Any:
        """Returns samples with given noise, ``[1 + rows, *shape]``."""
        rows = (self._rows, draws[1:])
        x, _ = self._jax.lax.scan(lambda x, row: (self._step(x, *row), None), draws[0], rows)
        return x

    def __call__(self) -> Tensor:
        self._calls += 1
        return self._tensor(self._drawing(self._jax.random.PRNGKey(self._calls)))

    def _tensor(self, x: Any) -> Tensor:
        return torch.from_dlpack(self._jax.block_until_ready(x))

    def given(self) -> Tensor:
        """Returns samples with noise of ``torch.randn``, for which the check puts the contract's."""
        draws = torch.stack([torch.randn(self._task.shape) for _ in range(1 + self._task.rows)])
        self._again = self._tensor(self._given(self._jax.numpy.asarray(draws.numpy())))
        return self._again

    def prove(self, proof: Proof, x: Tensor) -> Figures:
        """Checks the network, every step with the contract's noise, and the moments with JAX's own."""
        proof.check_samples(x)
        self._check_network()
        figures = proof.given_noise("fp32", self.given, x)
        assert self._again is not None
        for name, ours, theirs in (("mean", x, self._again), ("second moment", x**2, self._again**2)):
            spread = ((ours.double().var(0) + theirs.double().var(0)) / len(x)).sqrt()
            apart = float(((ours.double().mean(0) - theirs.double().mean(0)) / spread).abs().max())
            check(f"the {name} of the samples, in standard errors,", apart, _STANDARD_ERRORS)
        return figures

    def _check_network(self) -> None:
        """Checks the network's output at some times: off by at most twice what PyTorch's own is in fp32."""
        task, model = self._task, self._task.checkpoint.model
        double = copy.deepcopy(model).double()
        x = torch.randn((min(task.n, 1000), *task.sample_shape), generator=torch.Generator().manual_seed(SEED))
        for time in task.table.time[:: max(1, task.rows // 3)].float():
            t = time.expand(len(x))
            with torch.no_grad():
                plain, truth = model(x, t), double(x.double(), t.double())
            found = self._tensor(self.network(self._jax.numpy.asarray(x.numpy()), float(time)))
            bound = 2 * float((plain - truth).abs().max()) + 1e-6 * float(truth.abs().max())
            check("the network", float((found - truth).abs().max()), bound)


def converted(jax: Any, model: nn.Module) -> Network:
    """Returns a network with the weights of one of PyTorch's.

    Raises:
        UnavailableError: for any other than an MLP or `Residual`.
    """
    if isinstance(model, Residual):
        return _residual(jax, model)
    if isinstance(model, MLP) and model.activation in _ACTIVATIONS:
        return _mlp(jax, model)
    raise UnavailableError(f"JAX has no twin of {type(model).__name__} here")


def _linear(jax: Any, layer: nn.Linear) -> Callable[[Any], Any]:
    weight, bias = (jax.numpy.asarray(each.detach().numpy()) for each in (layer.weight, layer.bias))
    return lambda h: h @ weight.T + bias


def _mlp(jax: Any, model: MLP) -> Network:
    numpy, act = jax.numpy, getattr(jax.nn, _ACTIVATIONS[model.activation])
    *layers, last = (_linear(jax, layer) for layer in model.net if isinstance(layer, nn.Linear))

    def network(x: Any, t: Any) -> Any:
        h = numpy.concatenate((x, numpy.full((len(x), 1), t)), -1)
        for layer in layers:
            h = act(layer(h))
        return last(h)

    return network


def _residual(jax: Any, model: Residual) -> Network:
    numpy, act = jax.numpy, partial(jax.nn.gelu, approximate=False)
    first, last = _linear(jax, model.first), _linear(jax, model.last)
    inner = [_linear(jax, each.layer) for each in model.inner]

    def embedded(of: Sinusoidal, value: Any) -> Any:
        half = of.width // 2
        place = numpy.arange(half, dtype=numpy.float32) / (half - 1)
        angles = value[:, None] * (of.scale * numpy.exp(-math.log(10_000) * place))
        return numpy.concatenate((numpy.sin(angles), numpy.cos(angles)), -1)

    def network(x: Any, t: Any) -> Any:
        columns = [embedded(model.place, x[:, i]) for i in range(x.shape[1])]
        time = numpy.broadcast_to(embedded(model.time, numpy.full(1, t)), (len(x), model.time.width))
        h = act(first(numpy.concatenate((*columns, time), -1)))
        for layer in inner:
            h = h + act(layer(h))
        return last(h)

    return network


def _sampling(task: Trajectory) -> Scan:
    return Scan(task, imported("jax", "engines"))


def scan(task: Trajectory, proof: Proof) -> Provider:
    """Returns the provider."""
    return Provider("JAX lax.scan, fp32", partial(_sampling, task), lambda run, x: run.prove(proof, x))
