"""`fastsde.compat.azula` against azula."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from libraries import Field, assert_close, library, seeded
from torch import Tensor

import fastsde
from fastsde.compat.azula import accelerate

azula = library("azula")
library("azula.sample")
library("azula.guidance.dps")

from azula.denoise import KarrasDenoiser, SimpleDenoiser  # noqa: E402
from azula.guidance.cfg import CFGDenoiser  # noqa: E402
from azula.guidance.dps import DPSSampler  # noqa: E402
from azula.noise import RectifiedSchedule, VPSchedule  # noqa: E402

X = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))


def sampler(name: str, *, wrap: Any = KarrasDenoiser, schedule: Any = VPSchedule, **options: Any) -> Any:
    return getattr(azula.sample, f"{name}Sampler")(wrap(Field(), schedule()), steps=12, silent=True, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDPM", {}),
        ("DDIM", {"eta": 0.7}),
        ("DDIM", {"wrap": SimpleDenoiser}),
        ("Euler", {"schedule": RectifiedSchedule}),
        ("Heun", {"schedule": RectifiedSchedule}),
        ("Ito", {}),
        ("zAB", {}),
        ("xEAB", {"order": 3}),
        ("PC", {"corrections": 2, "delta": 0.05}),
    ],
)
def test_samplers_return_azulas_numbers(name: str, options: dict[str, Any]) -> None:
    theirs = sampler(name, **options)
    fast = accelerate(theirs, noise="torch")
    # Samplers that extrapolate divide by sigmas of 1e-3 at the end.
    assert_close(seeded(fast, X), seeded(theirs, X), tolerance=2e-4)
    assert fast.traced.table is not None


def test_guidance() -> None:
    net = Field()
    theirs = azula.sample.DDIMSampler(CFGDenoiser(KarrasDenoiser(net, VPSchedule())), steps=12, silent=True)
    labels = {"positive": {"y": torch.linspace(-1, 1, 6)}, "negative": {"y": torch.zeros(6)}, "guidance": 1.5}
    fast = accelerate(theirs)
    assert_close(fast(X, **labels), theirs(X, **labels))
    assert "network calls" in fast.explain()


def test_the_whole_use_with_its_initial_draw() -> None:
    theirs = sampler("DDPM")
    mean, var = torch.tensor([0.3, -0.2]), torch.tensor(0.5)

    def whole() -> Tensor:
        return theirs(theirs.init((6, 2), mean=mean, var=var))

    assert_close(seeded(accelerate(theirs, noise="torch").sample, (6, 2), mean, var), seeded(whole))


def test_it_is_used_as_the_sampler_and_a_seed_is_reproducible() -> None:
    fast = accelerate(sampler("DDPM"), seed=7)
    assert fast.steps == 12
    assert torch.equal(seeded(fast.init, (6, 2)), seeded(fast.sampler.init, (6, 2)))
    first = fast.sample((6, 2))
    assert torch.equal(first, fast.sample((6, 2)))
    assert torch.equal(first, copy.copy(fast).sample((6, 2)))
    assert not torch.equal(first, fast.with_options(seed=8).sample((6, 2)))


def test_what_is_no_table_is_refused() -> None:
    denoiser = KarrasDenoiser(Field(), VPSchedule())
    with pytest.raises(fastsde.TraceError):
        accelerate(DPSSampler(denoiser, X, lambda x: x, steps=4, silent=True))(X)
    with pytest.raises(TypeError, match="sampler must be an azula sampler"):
        accelerate(denoiser.backbone)
