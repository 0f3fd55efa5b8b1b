"""sbi's estimators of scores and flows, with the defaults of its factories unless named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sbi.neural_nets import posterior_flow_nn, posterior_score_nn
from torch import Tensor

from .case import Called, Case

TITLE, PACKAGES = "sbi", ("sbi",)


def _estimator(factory: Callable[..., Any], **options: Any) -> Callable[[], Called]:
    """Returns what makes an estimator of three parameters, standardised by some data, given two observed numbers."""

    def make() -> Called:
        theta = torch.randn(64, 3) * torch.tensor([0.5, 1.0, 2.0])
        estimator = factory(**options)(theta, theta[:, :2] + 0.1 * torch.randn(64, 2))

        def call(x: Tensor, t: Tensor, observed: Tensor) -> Tensor:
            f: Tensor = estimator(x, observed, t)
            return f

        return Called(estimator, (3,), call, (torch.randn(2, 2),))

    return make


def cases() -> list[Case]:
    return [
        Case("posterior_score_nn", _estimator(posterior_score_nn)),
        *(
            Case(f"posterior_score_nn, {kind}", _estimator(posterior_score_nn, sde_type=kind))
            for kind in ("vp", "subvp")
        ),
        *(
            Case(f"posterior_score_nn, {model}", _estimator(posterior_score_nn, model=model))
            for model in ("ada_mlp", "transformer")
        ),
        Case("posterior_flow_nn", _estimator(posterior_flow_nn)),
        Case("posterior_flow_nn, ada_mlp", _estimator(posterior_flow_nn, model="ada_mlp")),
    ]
