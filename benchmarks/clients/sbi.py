"""sbi: posteriors by score and by flow matching, untrained, whose network is replaced by the stand-in.

``Diffuser.run`` and ``sample_via_ode`` are the loops inside ``posterior.sample``, which in addition rejects samples
outside the prior's support, on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sbi.inference.posteriors.vector_field_posterior import VectorFieldPosterior
from sbi.neural_nets import posterior_flow_nn, posterior_score_nn
from sbi.samplers.score.diffuser import Diffuser
from sbi.utils import BoxUniform
from torch import nn

from .case import Case, held

TITLE, PACKAGES = "sbi", ("sbi",)

SAMPLES, STEPS, BOUND = 4, 12, 3.0
GIBBS: dict[str, Any] = {"corrector": "gibbs", "corrector_params": {"num_steps": 2}}
LANGEVIN: dict[str, Any] = {"corrector": "langevin", "corrector_params": {"num_steps": 2, "step_size": 1e-3}}


def posterior(net: nn.Module, kind: str, sample_with: str = "sde", **options: Any) -> Any:
    """Returns an untrained posterior of three parameters, standardised by data of unequal means and widths."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(64, 3, generator=generator) * torch.tensor([0.5, 1.0, 2.0]) + torch.tensor([0.3, 0.0, -1.0])
    x = theta[:, :2] + 0.1 * torch.randn(64, 2, generator=generator)
    state = torch.get_rng_state()
    build = posterior_flow_nn(**options) if kind == "flow" else posterior_score_nn(sde_type=kind, **options)
    estimator = build(theta, x)
    torch.set_rng_state(state)
    estimator.net = net
    prior = BoxUniform(-BOUND * torch.ones(3), BOUND * torch.ones(3))
    made = VectorFieldPosterior(estimator, prior, sample_with=sample_with)
    made.set_default_x(torch.tensor([[0.2, -0.4]]))
    made.potential_fn.set_x(torch.tensor([[0.2, -0.4]]), x_is_iid=False)
    return made


def diffuser(
    kind: str, *, build: dict[str, Any] | None = None, keep: bool = False, **options: Any
) -> Callable[[nn.Module], Any]:
    """Returns what makes ``Diffuser.run``, the loop of ``posterior.sample``."""

    def make(net: nn.Module) -> Callable[[], torch.Tensor]:
        made = posterior(net, kind, **(build or {}))
        run = Diffuser(made.potential_fn, predictor="euler_maruyama", **options)
        times = made.vector_field_estimator.solve_schedule(STEPS)
        return lambda: run.run(SAMPLES, times, show_progress_bars=False, save_intermediate=keep)

    return make


def sample(kind: str, **options: Any) -> Callable[[nn.Module], Any]:
    """Returns what makes a call of ``posterior.sample`` itself."""

    def make(net: nn.Module) -> Callable[[], torch.Tensor]:
        made = posterior(net, kind)
        return lambda: made.sample((SAMPLES,), steps=STEPS, show_progress_bars=False, **options)

    return make


def batched(net: nn.Module) -> Callable[[], torch.Tensor]:
    made = posterior(net, "vp")
    x = torch.tensor([[0.2, -0.4], [0.1, 0.5]])
    return lambda: made.sample_batched((SAMPLES,), x, steps=STEPS, show_progress_bars=False, reject_outside_prior=False)


def by_ode(kind: str) -> Callable[[nn.Module], Any]:
    def make(net: nn.Module) -> Callable[[], torch.Tensor]:
        made = posterior(net, kind, sample_with="ode")
        return lambda: made.sample_via_ode((SAMPLES,))

    return make


def cases() -> list[Case]:
    return [
        *(held(f"score, {kind}, Euler-Maruyama", diffuser(kind)) for kind in ("ve", "vp", "subvp")),
        held("score, vp, Euler-Maruyama, eta=0.5", diffuser("vp", predictor_params={"eta": 0.5})),
        held("score, vp, structured standardisation", diffuser("vp", build={"z_score_theta": "structured"})),
        held("score, vp, all states kept", diffuser("vp", keep=True)),
        *(held(f"score, {kind}, + Langevin corrector", diffuser(kind, **LANGEVIN)) for kind in ("ve", "vp")),
        held("score, vp, + Gibbs corrector", diffuser("vp", **GIBBS)),
        held("flow, Euler-Maruyama", diffuser("flow")),
        held("flow, gaussian baseline", diffuser("flow", build={"gaussian_baseline": True})),
        held("score, vp, posterior.sample, nothing rejected", sample("vp", reject_outside_prior=False)),
        held("score, vp, posterior.sample", sample("vp")),
        held("score, vp, posterior.sample_batched, nothing rejected", batched),
        held("score, vp, adaptive ODE", by_ode("vp")),
        held("flow, adaptive ODE", by_ode("flow")),
    ]
