"""Solvers as tables: every solver is a float64 table, and one affine step executes any of them.

Row k of a `StepTable` runs the network once and takes one step (`fastsde.reference.solver_step`):

    f  = model(x, time[k])
    D  = p x + q f                      clamped to [-clip, clip] where clip is set
    x' = a x + b f + e D + c H + d z    z: this row's noise;  H: what the previous row stored, 0 in the first
    H' = D

The prediction kind is folded into the coefficients when a table is built, so nothing downstream knows of it. Terms
that are zero in the whole table cost nothing. To add a solver, write a function that returns a `StepTable`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .dynamo import constant
from .sde import VPSDE
from .validation import check_instance, check_int, check_number
from .vocabulary import PREDICTIONS, SOLVERS

__all__ = [
    "PREDICTIONS",
    "SOLVERS",
    "StepTable",
    "build",
    "ddim",
    "ddpm",
    "dpm_solver_pp_2m",
    "euler_maruyama",
    "exponential_euler_maruyama",
    "heun",
    "score_form",
]


@dataclass(frozen=True, eq=False)
class StepTable:
    """A solver: K rows, each one network call and one step (see the module docstring for the equation).

    Args:
        time: float64 ``[K]``, what the network is called with.
        a, b, c, d, e, p, q: float64 ``[K]``, the coefficients.
        clip: bound of D, or None.

    Raises:
        TypeError: for a column that is not a float64 tensor.
        ValueError: for columns of different lengths, without rows, not finite, or a clip that is not positive.
    """

    time: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    e: Tensor
    p: Tensor
    q: Tensor
    clip: float | None = None

    def __post_init__(self) -> None:
        for name in self.columns():
            column = getattr(self, name)
            if not isinstance(column, Tensor) or column.dtype != torch.float64:
                kind = column.dtype if isinstance(column, Tensor) else type(column).__name__
                raise TypeError(f"StepTable.{name} must be a float64 tensor, got {kind}")
            if column.device.type != "cpu":
                raise ValueError(f"StepTable.{name} must be on the CPU, got {column.device}")
            if column.ndim != 1 or column.shape != self.time.shape or not len(column):
                raise ValueError(
                    f"StepTable.{name} must have shape [K] with K >= 1 as time has, got {list(column.shape)} "
                    f"beside time {list(self.time.shape)}"
                )
            if not (finite := torch.isfinite(column.float())).all():
                row = int((~finite).nonzero()[0])
                raise ValueError(f"StepTable.{name} must be finite in fp32, got {column[row].item()} in row {row}")
        if self.clip is not None:
            check_number("clip", self.clip, "a positive number or None", lambda clip: 0 < clip < math.inf)

    @staticmethod
    def columns() -> tuple[str, ...]:
        """The names of the tensor fields, in order."""
        return tuple(field.name for field in fields(StepTable) if field.name != "clip")

    def __len__(self) -> int:
        return len(self.time)

    @cached_property
    def _rows(self) -> list[dict[str, float]]:
        names = self.columns()
        columns = (getattr(self, name).tolist() for name in names)
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    @constant
    def row(self, k: int) -> dict[str, float]:
        """The time and coefficients of row k as Python floats."""
        return self._rows[k]

    @constant
    def terms(self) -> list[bool]:
        """Whether a row has noise, history, and D."""
        return [bool((column != 0).any()) for column in (self.d, self.c, self.e)]

    @constant
    def on(self, device: torch.device) -> Tensor:
        """All columns as the kernels read them, fp32 ``[K, 8]`` on a device; made once."""
        copies = _on_devices.setdefault(self, {})
        if device not in copies:
            columns = torch.stack([getattr(self, name) for name in self.columns()], dim=1)
            copies[device] = columns.to(device, torch.float32)
        return copies[device]

    def head(self, rows: int) -> StepTable:
        """The table of the first rows."""
        return replace(self, **{name: getattr(self, name)[:rows] for name in self.columns()})


_on_devices: WeakKeyDictionary[StepTable, dict[torch.device, Tensor]] = WeakKeyDictionary()  # what is not pickled


def _float64(name: str, values: Tensor | Sequence[float], min_points: int = 1) -> Tensor:
    try:
        tensor = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a 1-d tensor or sequence of numbers, got {type(values).__name__}") from error
    if tensor.ndim != 1 or len(tensor) < min_points:
        raise ValueError(f"{name} must be 1-d with at least {min_points} points, got shape {list(tensor.shape)}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} must be finite, got {tensor[~torch.isfinite(tensor)][0].item()}")
    return tensor


def _check_prediction(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")


def _continuous_times(sde: VPSDE, times: Tensor | Sequence[float], prediction: str) -> Tensor:
    """Checked ``[K + 1]`` times of the SDE, decreasing within [0, 1]."""
    check_instance("sde", sde, VPSDE)
    _check_prediction(prediction)
    times = _float64("times", times, 2)
    if times.max() > 1 or times.min() < 0 or not (times.diff() < 0).all():
        raise ValueError(
            f"times must decrease strictly within [0, 1], got {times[0].item():g} .. {times[-1].item():g} over "
            f"{len(times)} points"
        )
    return times


def _schedule(
    alpha: Tensor | Sequence[float], sigma: Tensor | Sequence[float], time: Tensor | Sequence[float], prediction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked alpha and sigma ``[K + 1]`` and time ``[K]``. The first alpha may be 0, as Lin et al. (2024) want it."""
    _check_prediction(prediction)
    alpha, sigma, time = _float64("alpha", alpha, 2), _float64("sigma", sigma, 2), _float64("time", time)
    if not len(alpha) == len(sigma) == len(time) + 1:
        raise ValueError(
            f"alpha and sigma must have one point more than time, got {len(alpha)}, {len(sigma)} and {len(time)}"
        )
    if not (alpha[1:] > 0).all() or alpha[0] < 0:
        raise ValueError(f"alpha must be positive but for a first point of zero, got {alpha.min().item():g}")
    if prediction in ("score", "eps") and not torch.isfinite(1 / alpha[:-1].float()).all():
        raise ValueError(
            f"prediction={prediction!r} tells nothing of x_0 where alpha is {alpha[:-1].min().item():g}: for zero "
            f"terminal SNR, train and sample with prediction='v' or 'x0'"
        )
    if not (sigma[:-1] > 0).all() or sigma[-1] < 0:
        raise ValueError(f"sigma must be positive but for a last point of zero, got {sigma.min().item():g}")
    if not (alpha[1:] * sigma[:-1] > alpha[:-1] * sigma[1:]).all():
        raise ValueError("sigma / alpha must decrease strictly from point to point")
    return alpha, sigma, time


def _data_form(alpha: Tensor, sigma: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """(p, q) with x_0 = p x + q f."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    norm = alpha**2 + sigma**2  # 1 on a variance-preserving schedule
    return {
        "score": (1 / alpha, sigma**2 / alpha),
        "eps": (1 / alpha, -sigma / alpha),
        "x0": (zero, one),
        "v": (alpha / norm, -sigma / norm),
    }[prediction]


def _eps_form(alpha: Tensor, sigma: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """(r, s) with eps = r x + s f."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    norm = alpha**2 + sigma**2
    return {
        "score": (zero, -sigma),
        "eps": (zero, one),
        "x0": (1 / sigma, -alpha / sigma),
        "v": (sigma / norm, alpha / norm),
    }[prediction]


def score_form(sde: VPSDE, time: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """(r, s) with score = r x + s f at each time, for the network's output f.

    Raises:
        ValueError: at t = 0 for a network that predicts no score.
    """
    if prediction == "score":
        return torch.zeros_like(time), torch.ones_like(time)
    sigma = sde.sigma(time)
    if not (sigma > 0).all():
        raise ValueError(f"a network that predicts {prediction} has no score at t = 0, where sigma is 0")
    r, s = _eps_form(sde.alpha(time), sigma, prediction)
    return -r / sigma, -s / sigma


def _table(
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
    """A table in its cheapest form: without clip D = p x + q f is affine, and e D is folded into a x + b f.

    ``data`` is (p, q); columns that are not given are zero.
    """
    zero = torch.zeros_like(time)
    b, c, d, e = (zero if column is None else column for column in (b, c, d, e))
    # A row without e has no use for D, which may then not exist: where alpha is next to 0, x_t tells nothing of x_0.
    is_usable = (e != 0) | torch.isfinite(torch.stack(data).float()).all(dim=0)
    p, q = (torch.where(is_usable, column, zero) for column in data)
    if clip is None:
        a, b, e = a + e * p, b + e * q, zero
    return StepTable(time=time, a=a, b=b, c=c, d=d, e=e, p=p, q=q, clip=clip)


def euler_maruyama(sde: VPSDE, times: Tensor | Sequence[float], prediction: str = "score") -> StepTable:
    """Euler-Maruyama on the reverse SDE (Song et al. 2021, eq. 6), noise on every row.

    Args:
        times: ``[K + 1]``, decreasing in [0, 1].
        prediction: what the network predicts: "score", "eps", "x0" or "v".
    """
    times = _continuous_times(sde, times, prediction)
    time, step = times[:-1], -times.diff()
    rate = sde.beta(time) * step
    r, s = score_form(sde, time, prediction)
    data = _data_form(sde.alpha(time), sde.sigma(time), prediction)
    return _table(time, a=1 + rate / 2 + rate * r, b=rate * s, d=rate.sqrt(), data=data)


def exponential_euler_maruyama(sde: VPSDE, times: Tensor | Sequence[float], prediction: str = "score") -> StepTable:
    """Exponential Euler-Maruyama: the linear part and the noise of the reverse SDE exact, the score held over a step.

    With I the integral of beta over the step: x' = e^(I/2) x + 2 (e^(I/2) - 1) score + sqrt(e^I - 1) z.
    """
    times = _continuous_times(sde, times, prediction)
    time, integral = times[:-1], -sde.integral_beta(times).diff()
    growth = torch.expm1(integral / 2)
    r, s = score_form(sde, time, prediction)
    data = _data_form(sde.alpha(time), sde.sigma(time), prediction)
    noise = torch.expm1(integral).sqrt()
    return _table(time, a=1 + growth + 2 * growth * r, b=2 * growth * s, d=noise, data=data)


def heun(
    sde: VPSDE, times: Tensor | Sequence[float], prediction: str = "score", euler_final: bool | None = None
) -> StepTable:
    """Heun's method on the probability-flow ODE dx = -1/2 beta (x + score) dt (Song et al. 2021, eq. 13).

    Two rows an interval: an Euler step whose H is ``x + h/2 f``, then the correction from H with the slope at the new
    point.

    Args:
        times: ``[K + 1]``, decreasing in [0, 1].
        prediction: what the network predicts.
        euler_final: whether the last interval is a lone Euler row. By default only where the correction does not
            exist: at t = 0, for a network that predicts no score (as Karras et al. 2022 do).
    """
    times = _continuous_times(sde, times, prediction)
    if euler_final is None:
        euler_final = bool(times[-1] == 0) and prediction != "score"
    rows: list[list[float]] = []
    intervals = len(times) - 1
    for k in range(intervals):
        here, there = times[k : k + 1], times[k + 1 : k + 2]
        half = (here - there) / 2
        # The slope in backward time is slope_x x + slope_f f.
        r, s = score_form(sde, here, prediction)
        slope_x, slope_f = sde.beta(here) / 2 * (1 + r), sde.beta(here) / 2 * s
        euler = (here, 1 + 2 * half * slope_x, 2 * half * slope_f, 0.0, 1 + half * slope_x, half * slope_f)
        rows.append([float(value) for value in euler])
        if euler_final and k == intervals - 1:
            break
        r, s = score_form(sde, there, prediction)
        slope_x, slope_f = sde.beta(there) / 2 * (1 + r), sde.beta(there) / 2 * s
        rows.append([float(value) for value in (there, half * slope_x, half * slope_f, 1.0, 0.0, 0.0)])
    time, a, b, c, p, q = torch.tensor(rows, dtype=torch.float64, device="cpu").unbind(1)
    return _table(time, a=a, b=b, c=c, data=(p, q))


def ddpm(
    alpha: Tensor | Sequence[float],
    sigma: Tensor | Sequence[float],
    time: Tensor | Sequence[float],
    prediction: str = "eps",
    clip: float | None = None,
) -> StepTable:
    """Ancestral sampling from the posterior q(x_prev | x_t, x_0) with the small variance (Ho et al. 2020, eq. 7).

    Args:
        alpha, sigma: ``[K + 1]``, the factor of x_0 and the standard deviation of the noise, before each row and after
            the last. The first alpha may be 0 (zero terminal SNR; Lin et al. 2024, arXiv:2305.08891) where the network
            predicts v or x_0, and the last sigma may be 0.
        time: ``[K]``, what the network is called with.
        prediction: what the network predicts.
        clip: bound of the predicted x_0, or None.
    """
    alpha, sigma, time = _schedule(alpha, sigma, time, prediction)
    before, after = (alpha[:-1], sigma[:-1]), (alpha[1:], sigma[1:])
    ratio = before[0] / after[0]
    variance = (before[1] ** 2 - ratio**2 * after[1] ** 2).clamp(min=0)  # of points that differ by a rounding, too
    return _table(
        time,
        a=ratio * after[1] ** 2 / before[1] ** 2,
        d=variance.sqrt() * after[1] / before[1],
        e=after[0] * variance / before[1] ** 2,
        data=_data_form(*before, prediction),
        clip=clip,
    )


def ddim(
    alpha: Tensor | Sequence[float],
    sigma: Tensor | Sequence[float],
    time: Tensor | Sequence[float],
    prediction: str = "eps",
    eta: float = 0.0,
    clip: float | None = None,
) -> StepTable:
    """DDIM (Song, Meng & Ermon 2021, eq. 12 and 16): deterministic at eta = 0, DDPM at eta = 1.

    The direction towards x_t uses the unclipped eps. Arguments as for `ddpm`, and ``eta`` in [0, 1].
    """
    alpha, sigma, time = _schedule(alpha, sigma, time, prediction)
    check_number("eta", eta, "in [0, 1]", lambda eta: 0 <= eta <= 1)
    before, after = (alpha[:-1], sigma[:-1]), (alpha[1:], sigma[1:])
    variance = (before[1] ** 2 - (before[0] / after[0]) ** 2 * after[1] ** 2).clamp(min=0)
    noise = eta * variance.sqrt() * after[1] / before[1]
    direction = (after[1] ** 2 - noise**2).clamp(min=0).sqrt()
    r, s = _eps_form(*before, prediction)
    data = _data_form(*before, prediction)
    return _table(time, a=direction * r, b=direction * s, d=noise, e=after[0], data=data, clip=clip)


def dpm_solver_pp_2m(
    alpha: Tensor | Sequence[float],
    sigma: Tensor | Sequence[float],
    time: Tensor | Sequence[float],
    prediction: str = "eps",
    stochastic: bool = False,
    lower_order_final: bool = True,
    clip: float | None = None,
) -> StepTable:
    """DPM-Solver++ 2M, midpoint form, of the ODE or of the SDE (Lu et al. 2022, "DPM-Solver++", eq. 4.2 and app. B).

    Arguments as for `ddpm`, and:
        stochastic: SDE-DPM-Solver++ 2M, with noise.
        lower_order_final: whether the last row is of first order. It always is where the last sigma is 0, since the
            second-order row does not exist there.
    """
    alpha, sigma, time = _schedule(alpha, sigma, time, prediction)
    half_log_snr = torch.log(alpha / sigma)  # -inf at zero terminal SNR, where h is infinite, and a row from pure noise
    h = half_log_snr.diff()
    decay = torch.exp(-h)
    gain = -torch.expm1(-2 * h if stochastic else -h) * alpha[1:]
    previous = torch.zeros_like(h)  # the weight of (D - H), 1 / (2 r) with r = h_prev / h
    previous[1:] = h[1:] / (2 * h[:-1])
    if lower_order_final or sigma[-1] == 0:
        previous[-1] = 0
    return _table(
        time,
        a=sigma[1:] / sigma[:-1] * (decay if stochastic else 1),
        c=-gain * previous,
        d=sigma[1:] * torch.sqrt(-torch.expm1(-2 * h)) if stochastic else None,
        e=gain * (1 + previous),
        data=_data_form(alpha[:-1], sigma[:-1], prediction),
        clip=clip,
    )


# Solvers on the times of the SDE, and solvers on a schedule of alpha and sigma, which may clip.
_SDE_SOLVERS: dict[str, Callable[..., StepTable]] = {
    "euler_maruyama": euler_maruyama,
    "exponential_euler_maruyama": exponential_euler_maruyama,
    "heun": heun,
}
_SCHEDULE_SOLVERS: dict[str, Callable[..., StepTable]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
}


def build(
    solver: str,
    sde: VPSDE,
    steps: int,
    *,
    t_end: float = 0.0,
    prediction: str = "score",
    clip: float | None = None,
) -> StepTable:
    """The table of a named solver with ``steps`` rows, on equidistant times from 1 down to ``t_end``.

    Raises:
        ValueError: for an unknown solver or prediction, steps below 1, t_end outside [0, 1), or a clip with a solver
            that does not predict x_0.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, or a StepTable, got {solver!r}")
    check_instance("sde", sde, VPSDE)
    check_int("steps", steps, 1)
    check_number("t_end", t_end, "in [0, 1)", lambda t: 0 <= t < 1)
    _check_prediction(prediction)
    if solver in _SCHEDULE_SOLVERS:
        times = torch.linspace(1, t_end, steps + 1, dtype=torch.float64, device="cpu")
        return _SCHEDULE_SOLVERS[solver](sde.alpha(times), sde.sigma(times), times[:-1], prediction, clip=clip)
    if clip is not None:
        raise ValueError(
            f"clip bounds a predicted x_0, which {solver} does not use; pick {', '.join(_SCHEDULE_SOLVERS)}"
        )
    if solver == "heun":
        return _heun_of_rows(sde, steps, t_end, prediction)
    return _SDE_SOLVERS[solver](sde, torch.linspace(1, t_end, steps + 1, dtype=torch.float64, device="cpu"), prediction)


def _heun_of_rows(sde: VPSDE, rows: int, t_end: float, prediction: str) -> StepTable:
    """Heun with two rows an interval; an odd row is a last Euler step, which prediction kinds need at t = 0."""
    if rows % 2 == 0 and t_end == 0 and prediction != "score":
        raise ValueError(
            f"heun down to t = 0 with prediction={prediction!r} takes an odd number of steps, since its last row is "
            f"a lone Euler step: got steps={rows}, take {rows - 1} or {rows + 1}, or a t_end above 0"
        )
    times = torch.linspace(1, t_end, (rows + 1) // 2 + 1, dtype=torch.float64, device="cpu")
    return heun(sde, times, prediction, euler_final=rows % 2 == 1)
