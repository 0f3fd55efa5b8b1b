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


@solver(
    Variant(2),
    Variant(2, noise=True, options={"s_churn": 8.0, "s_max": 50.0}),
    corrects_at=_corrects_at,
    rows_per_interval=2,
    needs_alpha=True,
)
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
    on d(x / alpha) = eps d(rho) from there: two rows, the Euler step and its correction. The noise is added at the end
    of the previous row, so the states between intervals include it. No row comes before the first interval; there x is
    the Gaussian prior, and adding noise would give a Gaussian of larger variance, so the first row scales x instead,
    which gives the same distribution. A trajectory that starts at another time than the prior's (``t_start``) adds no
    noise before its first interval.

    Args:
        sde: the process.
        times: ``[K + 1]``, decreasing in [0, t_max], or increasing without noise.
        prediction: what the network predicts, one of `PREDICTIONS`.
        s_churn: S_churn; gamma is min(S_churn / intervals, sqrt(2) - 1) where s_min <= rho <= s_max, else 0. At 0 this
            is Heun's method in rho, the deterministic sampler of EDM's algorithm 1.
        s_min: the least rho at which noise is added.
        s_max: the largest rho at which noise is added. If it is infinite, the first interval calls the network beyond
            the last time of the process, as algorithm 2 does.
        s_noise: S_noise, the standard deviation of the added noise.
        euler_final: whether the last interval is a single Euler row; by default only if it ends at sigma = 0.
    """
    check_number("s_churn", s_churn, "at least 0 and finite", lambda s: 0 <= s < math.inf)
    times = continuous_times(sde, times, prediction, upwards=s_churn == 0)
    check_number("s_min", s_min, "at least 0", lambda s: s >= 0)
    check_number("s_max", s_max, f"at least s_min, {s_min:g}", lambda s: s >= s_min)
    check_number("s_noise", s_noise, "at least 0 and finite", lambda s: 0 <= s < math.inf)
    rho = sde.sigma(times) / sde.alpha(times)
    if not torch.isfinite(rho).all():
        raise ValueError(
            f"edm_stochastic has no step from or to t = {times.max().item():g}, where alpha is 0: pick another solver, "
            f"or times below"
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
    return _heun(sde, times, here, noise, prediction, euler_final)


def _heun(sde: Process, times: Tensor, here: Tensor, noise: Tensor, prediction: str, euler_final: bool) -> StepTable:
    """Builds the table from the times ``here`` of the interval starts after their noise, and the amount of that noise.

    In a first row x' = ratio x + step eps and H' = ratio x + step / 2 eps; in a second row x' = H + step / 2 eps,
    scaled to the start of the next interval, plus the noise of that.
    """
    end, alpha, after = times[1:], sde.alpha(here), sde.alpha(times[1:])
    step = after * (sde.sigma(end) / after - sde.sigma(here) / alpha)
    last = torch.ones_like(alpha[:1])
    lead, add = torch.cat((alpha[1:] / after[:-1], last)), torch.cat((noise[1:], 0 * last))
    r, s = eps_form(alpha, sde.sigma(here), prediction)
    corrected = slice(len(step) - euler_final)  # only there sigma is above 0
    r_end, s_end = torch.zeros_like(r), torch.zeros_like(s)
    r_end[corrected], s_end[corrected] = eps_form(after[corrected], sde.sigma(end[corrected]), prediction)

    n = torch.ones_like(step)
    if noise[0] > 0:  # scales the draw from the prior instead of adding noise
        n[0] = alpha[0] * torch.hypot(1 / sde.alpha(times[0]), noise[0] / alpha[0] / sde.prior_std)
    zero, one = torch.zeros_like(step), torch.ones_like(step)
    ratio = after / alpha

    def rows(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack((first, second), dim=1).flatten(0, 1)[: 2 * len(step) - euler_final]

    def pair(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack((first, second), dim=1)

    euler = pair(pair(n * (ratio + step * r), zero), pair(n * (ratio + step / 2 * r), zero))
    correction = pair(pair(lead * step / 2 * r_end, lead), pair(zero, zero))
    return StepTable(
        rows(here, end),
        n=rows(pair(n, zero), pair(one, zero)),
        A=rows(euler, correction),
        b=rows(pair(step * s, step / 2 * s), pair(lead * step / 2 * s_end, zero)),
        d=rows(pair(zero, zero), pair(add, zero)),
    )
