"""Ancestral samplers: DDPM, DDIM and the ancestral Euler method."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..validation import check_number
from .forms import data_form, eps_form, schedule, table
from .registry import Variant, solver
from .table import StepTable

__all__ = ["ddim", "ddpm", "euler_ancestral"]


@solver(Variant(1, noise=True))
def ddpm(
    alpha: Tensor | Sequence[float],
    sigma: Tensor | Sequence[float],
    time: Tensor | Sequence[float],
    prediction: str = "eps",
    clip: float | None = None,
) -> StepTable:
    """Ancestral sampling from the posterior q(x_prev | x_t, x_0) with the small variance.

    (DDPM; Ho et al. 2020, arXiv:2006.11239, eq. 7.)

    Args:
        alpha: ``[K + 1]``, the factor of x_0 before each row and after the last. The first may be 0 (zero terminal SNR;
            Lin et al. 2024, arXiv:2305.08891) if the network predicts v, x_0 or flow.
        sigma: ``[K + 1]``, the standard deviation of the noise at the same points. The last may be 0.
        time: ``[K]``, the times at which the network is called.
        prediction: what the network predicts, one of `PREDICTIONS`.
        clip: bound of the predicted x_0, or None.
    """
    alpha, sigma, time = schedule(alpha, sigma, time, prediction)
    before, after = (alpha[:-1], sigma[:-1]), (alpha[1:], sigma[1:])
    ratio = before[0] / after[0]
    variance = (before[1] ** 2 - ratio**2 * after[1] ** 2).clamp(min=0)  # points may differ by a rounding only
    return table(
        time,
        a=ratio * after[1] ** 2 / before[1] ** 2,
        d=variance.sqrt() * after[1] / before[1],
        e=after[0] * variance / before[1] ** 2,
        data=data_form(*before, prediction),
        clip=clip,
    )


@solver(Variant(1), Variant(1, noise=True, options={"eta": 0.6}))
def ddim(
    alpha: Tensor | Sequence[float],
    sigma: Tensor | Sequence[float],
    time: Tensor | Sequence[float],
    prediction: str = "eps",
    eta: float = 0.0,
    clip: float | None = None,
) -> StepTable:
    """DDIM (Song, Meng & Ermon 2021, arXiv:2010.02502, eq. 12 and 16): deterministic at eta = 0, DDPM at eta = 1.

    The direction towards x_t uses the unclipped eps.

    Args:
        alpha: ``[K + 1]``, the factor of x_0 before each row and after the last, as for `ddpm`.
        sigma: ``[K + 1]``, the standard deviation of the noise at the same points.
        time: ``[K]``, the times at which the network is called.
        prediction: what the network predicts, one of `PREDICTIONS`.
        eta: the share of the noise, in [0, 1].
        clip: bound of the predicted x_0, or None.
    """
    time, before, after, noise = _rows(alpha, sigma, time, prediction, eta)
    direction = (after[1] ** 2 - noise**2).clamp(min=0).sqrt()
    r, s = eps_form(*before, prediction)
    data = data_form(*before, prediction)
    return table(time, a=direction * r, b=direction * s, d=noise, e=after[0], data=data, clip=clip)


@solver(Variant(1, noise=True), Variant(1, options={"eta": 0.0}))
def euler_ancestral(
    alpha: Tensor | Sequence[float],
    sigma: Tensor | Sequence[float],
    time: Tensor | Sequence[float],
    prediction: str = "eps",
    eta: float = 1.0,
    clip: float | None = None,
) -> StepTable:
    """The ancestral Euler method of k-diffusion: an ODE step down past the target level, then noise back up to it.

    With rho = sigma / alpha (written sigma by Karras et al. 2022, arXiv:2206.00364), the noise is
    rho_up = eta rho' sqrt(1 - rho'^2 / rho^2), and the Euler step goes down to sqrt(rho'^2 - rho_up^2). Without clip
    this is `ddim` with the same eta; with clip, the direction uses the clipped data, too.

    Args:
        alpha: ``[K + 1]``, the factor of x_0 before each row and after the last, as for `ddpm`.
        sigma: ``[K + 1]``, the standard deviation of the noise at the same points.
        time: ``[K]``, the times at which the network is called.
        prediction: what the network predicts, one of `PREDICTIONS`.
        eta: the share of the noise, in [0, 1].
        clip: bound of the predicted x_0, or None.
    """
    time, before, after, up = _rows(alpha, sigma, time, prediction, eta)  # up and down are multiplied by alpha'
    down = (after[1] ** 2 - up**2).clamp(min=0).sqrt()
    data = data_form(*before, prediction)
    return table(time, a=down / before[1], d=up, e=after[0] - down * before[0] / before[1], data=data, clip=clip)


def _rows(
    alpha: Tensor | Sequence[float],
    sigma: Tensor | Sequence[float],
    time: Tensor | Sequence[float],
    prediction: str,
    eta: float,
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Returns the times, (alpha, sigma) before and after each row, and the std of its noise: eta times that of DDPM."""
    check_number("eta", eta, "in [0, 1]", lambda eta: 0 <= eta <= 1)
    alpha, sigma, time = schedule(alpha, sigma, time, prediction, upwards=eta == 0)
    before, after = (alpha[:-1], sigma[:-1]), (alpha[1:], sigma[1:])
    variance = (before[1] ** 2 - (before[0] / after[0]) ** 2 * after[1] ** 2).clamp(min=0)
    return time, before, after, eta * variance.sqrt() * after[1] / before[1]
