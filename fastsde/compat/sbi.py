"""sbi's posteriors by score (NPSE) and flow matching (FMPE), https://github.com/sbi-dev/sbi, sampled as tables.

``VectorFieldPosterior.sample`` draws proposals by an SDE and keeps those in the prior's support. The SDE is the table;
rejection, batches and shapes stay sbi's. The network of the table is the whole estimator, so that the standardisation
of parameters and data is part of it and the loop is a table of one slot. A new observation needs no new trace.

Score posteriors: Geffner et al. 2023 (arXiv:2209.14249); flow matching: Wildberger et al. 2023 (arXiv:2305.17161).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import require
from ..noise import normal, sample_keys
from ..tracing import Traced, TraceError
from ..tracing import accelerate as accelerate_loop
from ..tracing.noises import Draws

__all__ = ["accelerate"]

_TRACES = 16  # kept per posterior


def accelerate(posterior: Any, *, noise: str = "contract", seed: int = 0, **options: Any) -> Any:
    """Returns a posterior that is used as the given one: ``accelerate(posterior).sample((1000,), x=x)``.

    ``sample_batched`` runs so, too; ``log_prob``, ``map`` and the rest are the posterior's own. Both share the
    estimator. ``explain()`` of the result says how the last call ran. A sample that becomes NaN is an error.

    Args:
        posterior: a ``VectorFieldPosterior`` that samples by its SDE (``build_posterior(sample_with="sde")``).
        noise: "contract" for this package's noise, a function of ``seed``: the same call returns the same samples.
            "torch" for sbi's own draws: under the same ``torch.manual_seed`` the samples are sbi's to rounding.
        seed: of the noise contract, in [0, 2^64).
        options: of `fastsde.accelerate`: backend, compile and check.

    Raises:
        TypeError: if the posterior has no vector field.
        fastsde.TraceError: in a call, if it samples by its ODE, whose solver is adaptive, or is guided, or is given
            several observations of one parameter.
    """
    estimator = getattr(posterior, "vector_field_estimator", None)
    if not isinstance(estimator, nn.Module) or not hasattr(posterior, "_sample_via_diffusion"):
        raise TypeError(f"posterior must be sbi's VectorFieldPosterior, got {type(posterior).__name__}")
    kind = type(f"Accelerated{type(posterior).__name__}", (_Posterior, type(posterior)), {})
    fast: Any = object.__new__(kind)
    fast.__dict__.update(vars(posterior))  # a copy by sbi's own methods would share its attributes
    fast._proposals = _Proposals(estimator, noise, seed, options)
    return fast


class _Posterior:
    """What comes before the posterior's own class."""

    _proposals: _Proposals

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        self._proposals.count = 0
        return super().sample(*args, **kwargs)  # type: ignore[misc]

    def sample_batched(self, *args: Any, **kwargs: Any) -> Any:
        self._proposals.count = 0
        return super().sample_batched(*args, **kwargs)  # type: ignore[misc]

    def sample_via_ode(self, *args: Any, **kwargs: Any) -> Any:
        reason = "the solver of the ODE is adaptive: its steps follow from the state"
        raise TraceError("sample_via_ode", reason, instead='build the posterior with sample_with="sde"')

    def _sample_via_diffusion(self, sample_shape: Any = (), **options: Any) -> Tensor:
        return self._proposals(self, torch.Size(sample_shape).numel(), **options)

    def explain(self) -> str:
        """Returns how the last call ran (`fastsde.tracing.Traced.explain`)."""
        if self._proposals.traced is None:
            raise RuntimeError("draw samples once: the SDE is traced then")
        return self._proposals.traced.explain()


class _Field(nn.Module):
    """The estimator with an observation of its own, instead of that of the trace."""

    x: Tensor

    def __init__(self, estimator: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.estimator = estimator
        self.register_buffer("x", x.clone())
        self.eval()

    def forward(self, input: Tensor, condition: Tensor, time: Tensor) -> Any:
        return self.estimator(input, self.x, time)


def diffuser_run(diffuser: Any, start: Tensor, ts: Tensor, keep: bool) -> Any:
    """Runs sbi's loop from a given start, which has a mean and a width for each element that no table has."""
    own = copy.copy(diffuser)
    own.initialize = lambda count: start
    return own.run(len(start), ts, show_progress_bars=False, save_intermediate=keep)


class _Proposals:
    """Draws the proposals, and keeps the traces by all that they depend on."""

    def __init__(self, estimator: nn.Module, noise: str, seed: int, options: dict[str, Any]) -> None:
        options = {"noise": noise, "seed": seed, **options}
        self._loop = accelerate_loop(diffuser_run, modules=[estimator], state="start", **options)
        self._loop = self._loop.with_options(noise="contract")  # a trace leaves PyTorch's generators as they are
        self._noise, self._seed = noise, seed
        self._run = {name: value for name, value in options.items() if name in ("backend", "compile", "dtype")}
        self._traces: OrderedDict[Any, Traced] = OrderedDict()
        self._field: _Field | None = None
        self.count = 0  # of this call so far
        self.traced: Traced | None = None

    def __call__(
        self,
        posterior: Any,
        total: int,
        *,
        steps: int = 500,
        ts: Tensor | None = None,
        max_sampling_batch_size: int | None = 10_000,
        show_progress_bars: bool = True,
        save_intermediate: bool = False,
        **of_diffuser: Any,
    ) -> Tensor:
        estimator, potential = posterior.vector_field_estimator, posterior.potential_fn
        x = potential.x_o
        if potential.guidance_method is not None or (potential.x_is_iid and len(x) > 1):
            what = "guidance" if potential.guidance_method is not None else "several observations of one parameter"
            raise TraceError("posterior.sample", f"{what} is not part of a table", instead="use the posterior itself")
        ts = (estimator.solve_schedule(steps) if ts is None else ts).to(posterior.device)
        if self._field is None or self._field.x.shape != x.shape or self._field.x.device != x.device:
            self._field = _Field(estimator, x)
        self._field.x.copy_(x)
        at_most, parts = max_sampling_batch_size or posterior.max_sampling_batch_size, []
        for first in range(0, total, max(1, at_most)):
            n = min(at_most, total - first)
            parts.append(self._draw(potential, n, ts, save_intermediate, of_diffuser, show_progress_bars))
            self.count += n
        samples = torch.cat(parts)
        return estimator.from_z(samples) if estimator.compose_enabled else samples

    def _draw(self, potential: Any, n: int, ts: Tensor, keep: bool, of_diffuser: dict[str, Any], progress: bool) -> Any:
        Diffuser = require("sbi.samplers.score.diffuser", extra="sbi", what="posteriors by score").Diffuser  # noqa: N806
        with_own = self._noise == "torch"
        diffuser = Diffuser(potential, **{"predictor": "euler_maruyama", **of_diffuser})
        count = n if with_own else len(potential.x_o) + 1  # of the trace: other than the number of observations
        shape = (len(potential.x_o), *diffuser.input_shape)
        given = tuple(sorted((name, _plain(value)) for name, value in of_diffuser.items()))
        key = count, shape, tuple(ts.tolist()), ts.device, keep, given
        if key not in self._traces:
            held = Diffuser(copy.copy(potential), **{"predictor": "euler_maruyama", **of_diffuser})
            self._loop(held, torch.zeros(count, *shape, dtype=ts.dtype, device=ts.device), ts, keep)
            assert self._loop.traced is not None
            self._traces[key] = self._loop.traced
            while len(self._traces) > _TRACES:
                self._traces.popitem(last=False)
        self._traces.move_to_end(key)
        traced = self.traced = self._traces[key]
        assert self._field is not None
        source: dict[str, Any]
        if with_own:
            start, source = diffuser.initialize(n), {"draws": Draws(traced.program)}
        else:
            keys = sample_keys(self._seed, n, first_sample=self.count, device=ts.device)
            start, source = diffuser.init_mean + diffuser.init_std * normal(keys, 0, shape), {"keys": keys}
        return traced.run([self._field], n, state=start, progress=progress, **source, **self._run)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted((name, _plain(each)) for name, each in value.items()))
    return repr(value.tolist()) if isinstance(value, Tensor) else repr(value)
