"""`fastsde.compat.sbi` against sbi, with untrained posteriors whose networks are not zero."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from libraries import assert_close, library, seeded
from torch import Tensor, nn

from fastsde import TraceError
from fastsde.compat.sbi import accelerate

library("sbi")
library("sbi.neural_nets")

from sbi.inference.posteriors.vector_field_posterior import VectorFieldPosterior  # noqa: E402
from sbi.neural_nets import posterior_flow_nn, posterior_score_nn  # noqa: E402
from sbi.utils import BoxUniform  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*lie outside the prior support:UserWarning")

OBSERVED = torch.tensor([[0.2, -0.4]])
QUIET: dict[str, Any] = {"steps": 15, "show_progress_bars": False}
LANGEVIN: dict[str, Any] = {"corrector": "langevin", "corrector_params": {"num_steps": 2, "step_size": 1e-3}}


@functools.cache
def posterior(kind: str = "vp", *, sample_with: str = "sde", bound: float = 2.0, **options: Any) -> Any:
    """Returns a posterior of three parameters, standardised by data of unequal means and widths."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theta = torch.randn(64, 3) * torch.tensor([0.5, 1.0, 2.0]) + torch.tensor([0.3, 0.0, -1.0])
        x = theta[:, :2] + 0.1 * torch.randn(64, 2)
        options = {"hidden_features": 8, "num_layers": 1, **options}
        build = posterior_flow_nn(**options) if kind == "flow" else posterior_score_nn(sde_type=kind, **options)
        estimator = build(theta, x)
        for weight in estimator.net.parameters():
            nn.init.normal_(weight, std=0.3)
    prior = BoxUniform(-bound * torch.ones(3), bound * torch.ones(3))
    return VectorFieldPosterior(estimator, prior, sample_with=sample_with)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("ve", {}), ("vp", {}), ("subvp", {}), ("flow", {}), ("vp", LANGEVIN), ("vp", {"corrector": "gibbs"}),
     ("vp", {"predictor_params": {"eta": 0.5}}), ("flow", {"reject_outside_prior": False})],
)  # fmt: skip
def test_samples_are_sbis(kind: str, options: dict[str, Any]) -> None:
    theirs = posterior(kind)
    fast = accelerate(theirs, noise="torch")
    call: dict[str, Any] = {"x": OBSERVED, **QUIET, **options}
    assert_close(seeded(fast.sample, (40,), **call), seeded(theirs.sample, (40,), **call))
    assert "1 slot\nIt is a table" in fast.explain()


def test_rejection_outside_the_priors_support_is_kept() -> None:
    theirs = posterior(bound=1.0)
    every = theirs.sample((200,), x=OBSERVED, reject_outside_prior=False, **QUIET)
    assert (every.abs() > 1).any()  # otherwise this tests nothing
    call: dict[str, Any] = {"x": OBSERVED, "max_sampling_batch_size": 64, **QUIET}
    fast = accelerate(theirs, noise="torch")
    assert_close(seeded(fast.sample, (100,), **call), seeded(theirs.sample, (100,), **call))
    ours = accelerate(theirs).sample((100,), **call)
    assert ours.shape == (100, 3)
    assert (ours.abs() <= 1).all()
    assert len(ours.unique(dim=0)) == 100  # each batch has its own noise


def test_a_seed_is_reproducible_and_a_new_observation_needs_no_new_trace() -> None:
    fast = accelerate(posterior(), seed=7)
    first = fast.sample((30,), x=OBSERVED, **QUIET)
    assert torch.equal(first, fast.sample((30,), x=OBSERVED, **QUIET))
    assert not torch.equal(first, accelerate(posterior(), seed=8).sample((30,), x=OBSERVED, **QUIET))
    traced, other = fast._proposals.traced, torch.tensor([[1.5, 0.7]])
    second = fast.sample((30,), x=other, **QUIET)
    assert fast._proposals.traced is traced
    assert_close(second, accelerate(posterior(), seed=7).sample((30,), x=other, **QUIET))
    assert float((second - first).abs().max()) > 1e-2
    assert torch.equal(first, fast.sample((30,), x=OBSERVED, **QUIET))


def test_batched_observations() -> None:
    theirs, x = posterior(), torch.tensor([[0.2, -0.4], [0.1, 0.5], [1.0, 0.0]])
    ours = seeded(accelerate(theirs, noise="torch").sample_batched, (20,), x, **QUIET)
    assert_close(ours, seeded(theirs.sample_batched, (20,), x, **QUIET))
    fast = accelerate(theirs)
    samples: Tensor = fast.sample_batched((20,), x, **QUIET)
    assert samples.shape == (20, 3, 3)
    assert torch.equal(samples, fast.sample_batched((20,), x, **QUIET))


def test_the_posterior_itself_is_unchanged_and_the_rest_is_its_own() -> None:
    theirs = posterior()
    fast = accelerate(theirs)
    assert type(theirs) is VectorFieldPosterior
    assert not hasattr(theirs, "_proposals")
    assert isinstance(fast, VectorFieldPosterior)
    fast.set_default_x(OBSERVED)
    assert fast.sample((3,), **QUIET).shape == (3, 3)
    assert torch.isfinite(fast.potential(torch.zeros(1, 3))).all()


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(TraceError, match="adaptive"):
        accelerate(posterior(sample_with="ode")).sample((3,), x=OBSERVED, show_progress_bars=False)
    with pytest.raises(TraceError, match="several observations"):
        accelerate(posterior()).sample((3,), x=OBSERVED.repeat(2, 1), iid_method="fnpe", **QUIET)
    with pytest.raises(TypeError, match="posterior must be sbi's VectorFieldPosterior"):
        accelerate(BoxUniform(torch.zeros(3), torch.ones(3)))
    with pytest.raises(ValueError, match="noise must be"):
        accelerate(posterior(), noise="numpy")
