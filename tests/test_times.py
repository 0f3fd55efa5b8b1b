"""Spacing of times: the formulas of the papers, for every process."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastsde import VPSDE
from fastsde.sde import PROCESSES, CosineVPSDE, Process
from fastsde.solvers.times import spaced, time_of
from fastsde.vocabulary import SPACINGS

CASES = [kind() for kind in PROCESSES.values()] + [CosineVPSDE(t_max=1.0)]
EDM = PROCESSES["edm"]()


def noise(sde: Process, times: torch.Tensor) -> torch.Tensor:
    return sde.sigma(times) / sde.alpha(times)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sde", CASES, ids=str)
def test_times_decrease_between_their_ends(sde: Process, spacing: str) -> None:
    starts = (1.0,) if spacing == "leading" else (1.0, 0.6)
    for start, end in itertools.product(starts, (0.0, 0.1, 0.2)):
        for intervals in (1, 2, 3, 9, 30):
            times = spaced(spacing, sde, intervals, start * sde.t_max, end * sde.t_max)
            assert (times.shape, times.dtype) == ((intervals + 1,), torch.float64)
            assert (times.diff() < 0).all()
            assert times[-1] == pytest.approx(end * sde.t_max, abs=1e-15)
            if spacing != "leading":
                assert times[0] == pytest.approx(start * sde.t_max, rel=1e-15)
    assert spaced("uniform", sde, 4, sde.t_max, 0.0).tolist() == pytest.approx(
        [sde.t_max * (1 - k / 4) for k in range(5)]
    )


@pytest.mark.parametrize("sde", CASES, ids=str)
def test_time_of_inverts_sigma_over_alpha(sde: Process) -> None:
    times = sde.t_max * torch.logspace(-6, -0.001, 200, dtype=torch.float64)
    levels = noise(sde, times)
    torch.testing.assert_close(noise(sde, time_of(sde, levels)), levels, rtol=1e-13, atol=0)
    torch.testing.assert_close(time_of(sde, levels), times, rtol=1e-8, atol=0)


def test_karras_is_edms_formula() -> None:
    # Karras et al. 2022, eq. 5: N = 18 points from 80 to 0.002 at rho = 7, and 0.
    index = torch.arange(18, dtype=torch.float64)
    for rho in (7.0, 3.0):
        expected = (80 ** (1 / rho) + index / 17 * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
        times = spaced("karras", EDM, 18, 80.0, 0.0, rho=None if rho == 7 else rho)
        torch.testing.assert_close(times[:-1], expected, rtol=1e-12, atol=0)
        assert times[-1] == 0


def test_each_spacing_is_equidistant_in_its_own_way() -> None:
    sde = VPSDE()
    maps = {
        "uniform": lambda t: t,
        "quadratic": torch.sqrt,
        "karras": lambda t: noise(sde, t) ** (1 / 7),
        "log_snr": lambda t: noise(sde, t).log(),
    }
    for spacing, of in maps.items():
        steps = of(spaced(spacing, sde, 12, 0.9, 0.05)).diff()
        torch.testing.assert_close(steps, steps.mean().expand(12), rtol=1e-9, atol=0)
    # Down to clean data, the last interval starts at t_min, the smallest time of training.
    steps = maps["log_snr"](spaced("log_snr", sde, 12, 1.0, 0.0)[:-1]).diff()
    torch.testing.assert_close(steps, steps.mean().expand(11), rtol=1e-9, atol=0)
    assert spaced("log_snr", sde, 12, 1.0, 0.0)[-2] == pytest.approx(sde.t_min, rel=1e-9)


def test_discrete_spacings_are_those_of_table_2() -> None:
    # Lin et al. 2024: "leading" arange(1, T + 1, T // S), "trailing" round(flip(arange(T, 0, -T / S))), T = 1000.
    for steps in (1, 3, 7, 10, 25, 30, 1000):
        leading = torch.arange(1, 1001, 1000 // steps)[:steps].flip(0).tolist()
        trailing = [round(1000 - 1000 / steps * k) for k in range(steps)]
        for spacing, expected in (("leading", leading), ("trailing", trailing)):
            times = spaced(spacing, VPSDE(), steps, 1.0, 0.0) * 1000
            assert times.tolist() == pytest.approx([*expected, 0], abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosine", VPSDE(), 4, 1.0, 0.0), "spacing must be one of uniform, karras, .*, got 'cosine'"),
        (("uniform", VPSDE(), 4, 1.0, 0.0, 7.0), "rho is an option of spacing='karras', got rho=7.0 with .*'uniform'"),
        (("karras", VPSDE(), 4, 1.0, 0.0, 0.0), "rho must be positive and finite, got 0.0"),
        (("karras", VPSDE(), 4, 1.0, 0.0, math.inf), "rho must be positive and finite, got inf"),
        (("trailing", VPSDE(), 1001, 1.0, 0.0), "'trailing' has 1000 discrete steps to take, got 1001 intervals"),
        (("leading", VPSDE(), 900, 1.0, 0.25), "'leading' has 750 discrete steps to take, got 900 intervals"),
        (
            ("leading", VPSDE(), 300, 0.5, 0.25),
            "spacing='leading' needs the process's t_max as t_start, got t_start=0.5",
        ),
        (("trailing", VPSDE(), 30, 0.6006, 0.0), "t_start must be one of the 1000 discrete times .* got 0.6006"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spaced(*arguments)  # type: ignore[arg-type]


def test_levels_lie_within_twice_the_last_time() -> None:
    assert float(time_of(EDM, torch.tensor([100.0], dtype=torch.float64))) == pytest.approx(100, rel=1e-14)
    with pytest.raises(ValueError, match=r"VPSDE\(.*\) does not reach sigma / alpha = 1e\+30"):
        time_of(VPSDE(), torch.tensor([1e30], dtype=torch.float64))
