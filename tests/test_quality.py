"""The shipped models draw what they were trained on."""

from __future__ import annotations

import pytest
import torch

import fastsde
from fastsde import checkpoints, data
from fastsde.benchmarks.quality import Classifier, frechet_distance, sliced_wasserstein, swiss_roll_distance


@pytest.mark.slow
def test_the_swiss_roll_is_as_close_to_fresh_data_as_claimed() -> None:
    # Two fresh sets of 10,000 points are about 0.01 apart, 1000 training points drawn again 0.037, a Gaussian 0.099.
    assert swiss_roll_distance(checkpoints.load("swiss-roll"))["samples_to_data"] <= 0.030


@pytest.mark.slow
def test_the_distance_tells_good_from_bad() -> None:
    fresh, other = data.swiss_roll(10_000, seed=1).x, data.swiss_roll(10_000, seed=2).x
    gaussian = torch.distributions.MultivariateNormal(fresh.mean(0), fresh.T.cov())
    torch.manual_seed(0)
    assert sliced_wasserstein(fresh, other) < 0.02
    assert sliced_wasserstein(fresh, gaussian.sample((10_000,))) > 0.08
    # A shift by s is s |cos| on each axis: 2 s / pi on average.
    shifted = fresh + torch.tensor([0.3, 0.0])
    assert abs(sliced_wasserstein(fresh, shifted) - 0.6 / torch.pi) < 1e-4


def test_the_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    torch.manual_seed(0)
    a = torch.randn(4000, 3, dtype=torch.float64)
    assert frechet_distance(a, a) < 1e-4
    # Equal except for a shift and a factor: |shift|^2 + sum (s - 1)^2 var.
    b = 2 * a + torch.tensor([1.0, 0.0, 0.0])
    expected = float((b.mean(0) - a.mean(0)).square().sum() + a.var(0).sum())
    assert abs(frechet_distance(a, b) - expected) < 1e-3


def test_the_shipped_digits_have_ink_in_the_middle_and_none_at_the_edge() -> None:
    checkpoint = checkpoints.load("mnist")
    x = fastsde.sample(
        checkpoint.model, (8, *checkpoint.shape), prediction=checkpoint.prediction, solver="dpm_solver_pp_2m", steps=20
    )
    ink = (x.clamp(-1, 1) + 1) / 2
    assert ink[:, :, 6:22, 6:22].mean() > 0.2  # MNIST's own: 0.36
    assert ink[:, :, :2].mean() < 0.02
    assert ((ink < 0.1) | (ink > 0.9)).double().mean() > 0.8  # black or white, not grey
    assert Classifier()(x).shape == (8, 10)
