"""Predictor-corrector sampling: after each step of a solver, Langevin steps at the new time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..sde import Process
from ..validation import check_int, check_number
from .forms import continuous_times, score_form
from .registry import REGISTRY, Variant, solver
from .table import StepTable

__all__ = ["predictor_corrector"]


def _rows_per_interval(options: Mapping[str, Any]) -> int:
    return 1 + check_int("corrector_steps", options.get("corrector_steps", 1), 0)


@solver(Variant(0, noise=True), needs_alpha=True, rows_per_interval=_rows_per_interval, is_affine=False)
def predictor_corrector(
    sde: Process,
    times: Tensor | Sequence[float],
    prediction: str = "score",
    *,
    predictor: str = "euler_maruyama",
    corrector_steps: int = 1,
    snr: float = 0.16,
    max_size: float | None = 1.0,
    final_rows: int | None = None,
) -> StepTable:
    """Predictor-corrector sampling with annealed Langevin steps (Song et al. 2021, arXiv:2011.13456, algorithm 1).

    Each row of the predictor from t_k to t_{k+1} is followed by ``corrector_steps`` rows at t_{k+1} (algorithms 4 and
    5), each with a step of its own size for each sample,

        x' = x + eps g + sqrt(2 eps) z,   g = score(x, t),   eps = 2 a (snr |z| / |g|)^2

    with norms over all elements of a sample, and a = (alpha(t_{k+1}) / alpha(t_{k+2}))^2: the alpha_i of algorithm 5,
    and 1 on the VE-SDE; below the last time comes clean data. Where g is 0, x stays as it is. There is no corrector
    where sigma is 0. The size of these steps does not fall with the number of intervals, and neither does their error:
    of Gaussian data in many dimensions, many rows at one time settle at 1 + a snr^2 times the right variance. In few
    dimensions N there is more, since eps is larger where the score is small and where z is long. Without a bound of
    eps, short steps settle at a density proportional to |score|^2 p^(N / (N + 2)), where the stationary flux E[eps] g
    q - div(E[eps z z^T] q) of a density q is 0: of Gaussian data at (1 + 2 / N)^2 times the variance.

    The norms of few elements vary: next to a point where the score is 0 the paper's eps has no bound, and samples of
    two elements would be thrown far away. So eps is at most ``max_size`` sigma(t)^2, by default that of a step all the
    way to the mean of the data given x (Tweedie's formula); beyond it a Langevin step overshoots. For images, whose
    scores are about sqrt(N) / sigma(t) long, eps is some 0.05 sigma(t)^2, far below.

    score_sde, the paper's code, differs: its norms are averaged over the batch, so that a sample depends on the others;
    its corrector comes before the predictor, at the same time; its alpha_i are those of 1,000 steps, whatever the
    number of steps; and its last step returns the mean, without noise (``denoise=True`` of `fastsde.sample` is near).

    Args:
        sde: the process.
        times: ``[K + 1]``, decreasing in [0, t_max].
        prediction: what the network predicts, one of `PREDICTIONS`.
        predictor: the name of a solver of one row an interval without history, such as "euler_maruyama", "ddim" or
            "euler_ancestral".
        corrector_steps: Langevin rows an interval.
        snr: r of the paper, its signal-to-noise ratio of a step: 0.16 for images of 32 x 32 on the VE-SDE.
        max_size: the largest eps, in units of sigma(t)^2; None for the paper's step, without a bound.
        final_rows: how many rows the last interval has, from 1, the predictor alone, to 1 + ``corrector_steps``. By
            default all, or 1 if sigma is 0 at the last time.

    Raises:
        TypeError, ValueError: for an invalid argument, or a corrector where sigma is 0.
    """
    times = continuous_times(sde, times, prediction)
    check_int("corrector_steps", corrector_steps, 0)
    check_number("snr", snr, "positive and finite", lambda snr: 0 < snr < math.inf)
    if max_size is not None:
        check_number("max_size", max_size, "positive and finite, or None", lambda size: 0 < size < math.inf)
    has_corrector = float(sde.sigma(times[-1])) > 0
    if final_rows is None:
        final_rows = 1 + corrector_steps if has_corrector else 1
    check_int("final_rows", final_rows, 1, corrector_steps + 2)
    base, rows = _predictor(predictor, sde, times, prediction), 1 + corrector_steps
    if final_rows > 1 and not has_corrector:
        steps = rows * (len(times) - 2)
        raise ValueError(
            f"the corrector has no score at t = {float(times[-1]):g}, where sigma is 0: steps must be 1 more than a "
            f"multiple of {rows}, so that the last row is the predictor's, such as {steps + 1} or {steps + 1 + rows}, "
            f"got {steps + final_rows}; or give a later t_end"
        )
    counts = torch.full((len(base),), corrector_steps, dtype=torch.int64, device="cpu")
    counts[-1] = final_rows - 1
    return _joined(base, _corrector(sde, times, prediction, snr, max_size), counts)


def _predictor(name: str, sde: Process, times: Tensor, prediction: str) -> StepTable:
    kind = REGISTRY.get(name)
    if kind is None or not kind.is_affine or kind.rows_per_interval != 1:
        raise ValueError(f"predictor must be the name of a solver of one row an interval, got {name!r}")
    if kind.is_on_schedule:
        table = kind.builder(sde.alpha(times), sde.sigma(times), times[:-1], prediction)
    else:
        table = kind.builder(sde, times, prediction)
    if table.slots > 1:
        raise ValueError(f"predictor must have no history, which a corrector would outdate, got {name!r}")
    return table


def _corrector(sde: Process, times: Tensor, prediction: str, snr: float, max_size: float | None) -> StepTable:
    """Returns one Langevin row at each time but the first; that of the last is not used where sigma is 0."""
    time = times[1:]
    ratio = sde.alpha(time) / sde.alpha(torch.cat((times[2:], torch.zeros_like(time[:1]))))
    exists = sde.sigma(time) > 0
    r, s = torch.zeros_like(time), torch.ones_like(time)
    r[exists], s[exists] = score_form(sde, time[exists], prediction)
    one = torch.ones_like(time)
    largest = None if max_size is None else torch.where(exists, max_size * sde.sigma(time) ** 2, one)
    return StepTable(time, one, d=one, e=one, p=r, q=s, snr=snr * ratio, eps_max=largest)


def _joined(base: StepTable, corrector: StepTable, counts: Tensor) -> StepTable:
    """Returns a table of each row of ``base``, followed by ``counts`` times the row of the corrector."""
    rows = torch.arange(len(base), dtype=torch.int64, device="cpu").repeat_interleave(1 + counts)
    is_first = torch.cat((rows[:1] == rows[:1], rows[1:] != rows[:-1]))

    def column(name: str) -> Any:
        first, second = getattr(base, name)[rows], getattr(corrector, name)[rows]
        return torch.where(is_first.reshape(-1, *[1] * (first.ndim - 1)), first, second)

    names = ("time", "n", "p", "q", "A", "b", "e", "d", "snr", "eps_max")
    return StepTable(**{name: column(name) for name in names})
