"""EDM's stochastic sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..sde import Process
from ..validation import check_number
from .forms import continuous_times, eps_form
from .registry import Variant, solver
from .table import StepTable
from .times import time_of

__all__ = ["edm_stochastic"]

_GAMMA_MAX = math.sqrt(2) - 1


def _corrects_at(sde: Process, t: float, prediction: str) -> bool:
    return bool(sde.sigma(t) > 0)


@solver(Variant(2), Variant(2, noise=True, options={"s_churn": 8.0}), corrects_at=_corrects_at, needs_alpha=True)
def edm_stochastic(
    sde: Process,
    times: Tensor | Sequence[float],
    prediction: str = "eps",
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    euler_final: bool | None = None,
) -> StepTable:
    """EDM's stochastic sampler (Karras et al. 2022, arXiv:2206.00364, algorithm 2), on any process.

    With rho = sigma / alpha, each interval adds noise up to rho^ = rho (1 + gamma) and takes one step of Heun's method
    on d(x / alpha) = eps d(rho) from there: two rows, the Euler step and its correction. The noise joins the end of
    the row before, so the states between intervals are those with the noise. Before the first interval there is no
    row; there x is the Gaussian prior, which with noise is a Gaussian of larger variance, so the first row scales it
    instead: the distribution is the same. A trajectory from a later time than the prior's (``t_start``) adds no noise
    before its first interval.

    Args:
        sde, times, prediction: as for `heun`.
        s_churn: S_churn; gamma is min(S_churn / intervals, sqrt(2) - 1) where s_min <= rho <= s_max, else 0. At 0 this
            is Heun's method in rho, the deterministic sampler of EDM's algorithm 1.
        s_min, s_max: in units of rho. With an infinite s_max, the first interval calls the network beyond the last
            time of the process, as algorithm 2 does.
        s_noise: S_noise, the standard deviation of the noise that is added.
        euler_final: whether the last interval is a lone Euler row; by default only where it ends at sigma = 0.
    """
    times = continuous_times(sde, times, prediction)
    check_number("s_churn", s_churn, "at least 0 and finite", lambda s: 0 <= s < math.inf)
    check_number("s_min", s_min, "at least 0", lambda s: s >= 0), check_number("s_max", s_max, "at least 0", lambda s: s >= 0)
    check_number("s_noise", s_noise, "at least 0 and finite", lambda s: 0 <= s < math.inf)
    rho = sde.sigma(times) / sde.alpha(times)
    if not torch.isfinite(rho).all():
        raise ValueError(
            f"edm_stochastic has no step from t = {times[0].item():g}, where alpha is 0: pick another solver, or times "
            f"that start below"
        )
    if euler_final is None:
        euler_final = bool(rho[-1] == 0)
    gamma = min(s_churn / (len(times) - 1), _GAMMA_MAX)
    starts = rho[:-1]
    churned = torch.where((s_min <= starts) & (starts <= s_max), starts * (1 + gamma), starts)
    if times[0] != sde.t_max:
        churned[0] = starts[0]
    here, added = times[:-1].clone(), churned > starts
    here[added] = time_of(sde, churned[added]) if added.any() else here[added]
    noise = s_noise * sde.alpha(here) * (churned**2 - starts**2).sqrt()
    rows = _rows(sde, times, here, noise, prediction, euler_final)
    time, n, keep, other, save, b, saved_b, d = torch.tensor(rows, dtype=torch.float64, device="cpu").unbind(1)
    zero = torch.zeros_like(time)
    A = torch.stack((keep, other, save, zero), dim=1).reshape(-1, 2, 2)
    pairs = {"n": (n, zero), "b": (b, saved_b), "d": (d, zero)}
    return StepTable(time, A=A, **{name: torch.stack(pair, dim=1) for name, pair in pairs.items()})


def _rows(
    sde: Process, times: Tensor, here: Tensor, noise: Tensor, prediction: str, euler_final: bool
) -> list[tuple[float, ...]]:
    """The rows: time, n of slot 0, A by rows less the last, b of both slots, d.

    In a first row x' = ratio x + step eps and H' = ratio x + step / 2 eps; in a second, x' = H + step / 2 eps.
    """
    rows = []
    prior = (sde.prior_std / float(sde.alpha(times[0]))) ** 2 + (float(noise[0]) / float(sde.alpha(here[0]))) ** 2
    first = float(sde.alpha(here[0])) * math.sqrt(prior) / sde.prior_std  # what scales the draw from the prior
    intervals = len(times) - 1
    for k in range(intervals):
        start, end = here[k], times[k + 1]
        n = first if k == 0 else 1.0
        alpha = float(sde.alpha(end))
        ratio = alpha / float(sde.alpha(start))
        step = alpha * float(sde.sigma(end) / sde.alpha(end) - sde.sigma(start) / sde.alpha(start))
        is_last = k == intervals - 1
        lead = 1.0 if is_last else float(sde.alpha(here[k + 1])) / alpha  # to the scale of the next interval's start
        add = 0.0 if is_last else float(noise[k + 1])
        r, s = (float(each) for each in eps_form(sde.alpha(start), sde.sigma(start), prediction))
        if is_last and euler_final:
            rows.append((float(start), n, n * (ratio + step * r), 0.0, 0.0, step * s, 0.0, 0.0))
            break
        half = n * (ratio + step / 2 * r)
        rows.append((float(start), n, n * (ratio + step * r), 0.0, half, step * s, step / 2 * s, 0.0))
        r, s = (float(each) for each in eps_form(sde.alpha(end), sde.sigma(end), prediction))
        rows.append((float(end), 1.0, lead * step / 2 * r, lead, 0.0, lead * step / 2 * s, 0.0, add))
    return rows
