"""Shared by builders: checked times and schedules, and x_0, noise and score as functions of the network's output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sde import Process, check_process
from ..vocabulary import PREDICTIONS
from .table import StepTable

__all__ = [
    "check_prediction",
    "continuous_times",
    "data_form",
    "eps_form",
    "finite_velocity_form",
    "float64",
    "has_signal",
    "has_velocity",
    "schedule",
    "score_form",
    "table",
    "velocity_form",
]


_UPWARDS = "; only a solver without noise may run upwards"


def float64(name: str, values: Tensor | Sequence[float], min_points: int = 1) -> Tensor:
    try:
        tensor = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a 1-d tensor or sequence of numbers, got {type(values).__name__}") from error
    if tensor.ndim != 1 or len(tensor) < min_points:
        raise ValueError(f"{name} must be 1-d with at least {min_points} points, got shape {list(tensor.shape)}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} must be finite, got {tensor[~torch.isfinite(tensor)][0].item()}")
    return tensor


def check_prediction(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")


def continuous_times(sde: Process, times: Tensor | Sequence[float], prediction: str, upwards: bool = False) -> Tensor:
    """Returns checked times ``[K + 1]`` of the process, decreasing within [0, t_max].

    Args:
        upwards: whether they may also increase, for a solver of the probability flow.
    """
    check_process("sde", sde)
    check_prediction(prediction)
    times = float64("times", times, 2)
    steps = times.diff()
    in_order = (steps < 0).all() or (upwards and (steps > 0).all())
    if times.max() > sde.t_max or times.min() < 0 or not in_order:
        raise ValueError(
            f"times must decrease strictly within [0, {sde.t_max:g}], got {times[0].item():g} .. "
            f"{times[-1].item():g} over {len(times)} points{_UPWARDS}"
        )
    return times


def schedule(
    alpha: Tensor | Sequence[float],
    sigma: Tensor | Sequence[float],
    time: Tensor | Sequence[float],
    prediction: str,
    upwards: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns checked alpha and sigma ``[K + 1]`` and time ``[K]``. The first alpha may be 0 (arXiv:2305.08891).

    Args:
        upwards: whether sigma / alpha may also increase, for a solver of the probability flow.
    """
    check_prediction(prediction)
    alpha, sigma, time = float64("alpha", alpha, 2), float64("sigma", sigma, 2), float64("time", time)
    if not len(alpha) == len(sigma) == len(time) + 1:
        raise ValueError(
            f"alpha and sigma must have one point more than time, got {len(alpha)}, {len(sigma)} and {len(time)}"
        )
    if not (alpha[1:] > 0).all() or alpha[0] < 0:
        up = "; upwards to where it is zero, take heun or rk4" if alpha[-1] == 0 else ""
        raise ValueError(f"alpha must be positive, or zero at the first point, got {alpha.min().item():g}{up}")
    if prediction in ("score", "eps") and not has_signal(alpha[:-1], sigma[:-1]).all():
        raise ValueError(
            f"prediction={prediction!r} does not determine x_0 where alpha is {alpha[:-1].min().item():g}: for zero "
            f"terminal SNR, train and sample with prediction='v', 'x0' or 'flow'"
        )
    if not (sigma[:-1] > 0).all() or sigma[-1] < 0:
        raise ValueError(f"sigma must be positive, or zero at the last point, got {sigma.min().item():g}")
    decrease = alpha[1:] * sigma[:-1] - alpha[:-1] * sigma[1:]
    if not ((decrease > 0).all() or (upwards and (decrease < 0).all())):
        raise ValueError(f"sigma / alpha must decrease strictly from point to point{_UPWARDS}")
    return alpha, sigma, time


def has_signal(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Returns where x_t contains information about x_0, in fp32."""
    return alpha > 2.0**-24 * sigma


def data_form(alpha: Tensor, sigma: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """Returns (p, q) with x_0 = p x + q f."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    norm = alpha**2 + sigma**2  # 1 on a variance-preserving schedule
    return {
        "score": (1 / alpha, sigma**2 / alpha),
        "eps": (1 / alpha, -sigma / alpha),
        "x0": (zero, one),
        "v": (alpha / norm, -sigma / norm),
        "flow": (1 / (alpha + sigma), -sigma / (alpha + sigma)),
    }[prediction]


def eps_form(alpha: Tensor, sigma: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """Returns (r, s) with eps = r x + s f."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    norm = alpha**2 + sigma**2
    return {
        "score": (zero, -sigma),
        "eps": (zero, one),
        "x0": (1 / sigma, -alpha / sigma),
        "v": (sigma / norm, alpha / norm),
        "flow": (1 / (alpha + sigma), alpha / (alpha + sigma)),
    }[prediction]


def score_form(sde: Process, time: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """Returns (r, s) with score = r x + s f at each time, for the network's output f.

    Raises:
        ValueError: if sigma is 0, at t = 0, unless the network predicts the score.
    """
    if prediction == "score":
        return torch.zeros_like(time), torch.ones_like(time)
    sigma = sde.sigma(time)
    if not (sigma > 0).all():
        raise ValueError(f"a network that predicts {prediction} has no score at t = 0, where sigma is 0")
    r, s = eps_form(sde.alpha(time), sigma, prediction)
    return -r / sigma, -s / sigma


def velocity_form(sde: Process, time: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """Returns (r, s) with dx/dt = r x + s f on the probability flow, alpha' x_0 + sigma' eps (SiT, arXiv:2401.08740).

    Each prediction has its own formula, which is finite wherever the velocity is: for v and flow, which determine both
    x_0 and eps, also where the drift of the SDE is infinite. Elsewhere it is infinite or NaN.
    """
    if prediction == "score":
        return sde.drift_coefficient(time), -sde.squared_diffusion(time) / 2
    sigma, sigma_dot = sde.sigma(time), sde.sigma_dot(time)
    if prediction == "eps":
        rate = sde.drift_coefficient(time)
        return rate, sigma_dot - rate * sigma
    alpha, alpha_dot = sde.alpha(time), sde.alpha_dot(time)
    if prediction == "x0":
        rate = sigma_dot / sigma
        return rate, alpha_dot - rate * alpha
    turn = alpha * sigma_dot - sigma * alpha_dot
    if prediction == "v":
        norm = alpha**2 + sigma**2
        return (alpha * alpha_dot + sigma * sigma_dot) / norm, turn / norm
    return (alpha_dot + sigma_dot) / (alpha + sigma), turn / (alpha + sigma)


def has_velocity(sde: Process, t: float, prediction: str) -> bool:
    """Returns whether a network with this prediction has a finite velocity at a time."""
    form = velocity_form(sde, torch.tensor([t], dtype=torch.float64, device="cpu"), prediction)
    return bool(torch.isfinite(torch.stack(form)).all())


def finite_velocity_form(sde: Process, time: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """Returns `velocity_form`. Raises ValueError where it is not finite."""
    r, s = velocity_form(sde, time, prediction)
    if not (exists := torch.isfinite(r) & torch.isfinite(s)).all():
        t = float(time[~exists][0])
        which = "sigma" if t == 0 else "alpha"
        raise ValueError(f"a network that predicts {prediction} has no velocity at t = {t:g}, where {which} is 0")
    return r, s


def table(
    time: Tensor,
    *,
    a: Tensor,
    b: Tensor | None = None,
    c: Tensor | None = None,
    d: Tensor | None = None,
    e: Tensor | None = None,
    data: tuple[Tensor, Tensor],
    clip: float | None = None,
) -> StepTable:
    """Builds a table in its cheapest form: without clip D = p x + q f is affine, and e D is folded into a x + b f.

    ``data`` is (p, q); columns that are not given are zero.
    """
    zero = torch.zeros_like(time)
    b, c, d, e = (zero if column is None else column for column in (b, c, d, e))
    # A row without e does not need D, which may not exist: if alpha is close to 0, x_t has no information about x_0.
    is_usable = (e != 0) | torch.isfinite(torch.stack(data).float()).all(dim=0)
    p, q = (torch.where(is_usable, column, zero) for column in data)
    if clip is None:
        a, b, e = a + e * p, b + e * q, zero
    return StepTable(time=time, a=a, b=b, c=c, d=d, e=e, p=p, q=q, clip=clip)
