"""Processes, scores, predictors and correctors of `fastsde.compat.score_sde` (arXiv:2011.13456, appendices D to G)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..sde import VESDE, VPSDE
from ..sde.process import Process, check_process, match_dims
from ..validation import check_int

__all__ = ["PREDICTORS", "Discretized", "Model", "langevin", "score_of"]

Model = Callable[[Tensor, Tensor], Tensor]
Pair = tuple[Tensor, Tensor]


class Discretized:
    """A process of this package with the repository's interface.

    Args:
        process: such as ``fastsde.VPSDE()``.
        steps: N, the number of steps from the prior to the data.
    """

    def __init__(self, process: Process, steps: int = 1000) -> None:
        check_process("process", process)
        self.process, self.N, self.T = process, check_int("steps", steps, 1), process.t_max
        if isinstance(process, VPSDE):
            self.discrete_betas = torch.linspace(
                process.beta_min / steps, process.beta_max / steps, steps, dtype=torch.float32
            )
            self.alphas = 1 - self.discrete_betas
            self.sqrt_1m_alphas_cumprod = (1 - self.alphas.cumprod(0)).sqrt()
        if isinstance(process, VESDE):
            self.discrete_sigmas = process.sigma(torch.linspace(0, 1, steps, dtype=torch.float64)).float()

    def sde(self, x: Tensor, t: Tensor) -> Pair:
        """Returns drift ``[B, *shape]`` and diffusion ``[B]`` at times t ``[B]``."""
        return match_dims(self.process.drift_coefficient(t), x) * x, self.process.diffusion(t)

    def marginal_prob(self, x: Tensor, t: Tensor) -> Pair:
        """Returns the mean ``[B, *shape]`` and standard deviation ``[B]`` of x_t for data ``x``."""
        return match_dims(self.process.alpha(t), x) * x, self.process.sigma(t)

    def prior_sampling(self, shape: Sequence[int]) -> Tensor:
        """Draws from the prior with PyTorch's generator, fp32."""
        return self.process.prior_std * torch.randn(*shape, dtype=torch.float32)

    def discretize(self, x: Tensor, t: Tensor) -> Pair:
        """Returns the change of x in a forward step and its noise's width: the paper's eq. 17 and 18, or Euler's."""
        if isinstance(self.process, VPSDE):
            beta = _at(self, self.discrete_betas, t)
            return match_dims((1 - beta).sqrt(), x) * x - x, beta.sqrt()
        if isinstance(self.process, VESDE):
            now, before = _sigmas(self, t)
            return 0 * x, (now**2 - before**2).sqrt()
        drift, diffusion = self.sde(x, t)
        return drift / self.N, diffusion / self.N**0.5


def _index(sde: Any, t: Tensor) -> Any:
    return (t * (sde.N - 1) / sde.T).long()


def _at(sde: Any, values: Tensor, t: Tensor) -> Tensor:
    found: Tensor = values.to(t.device)[_index(sde, t)]
    return found


def _sigmas(sde: Any, t: Tensor) -> Pair:
    """Returns the sigmas of the VE process at t and one step before."""
    i, sigmas = _index(sde, t), sde.discrete_sigmas.to(t.device)
    return sigmas[i], torch.where(i == 0, 0.0, sigmas[i - 1])


def score_of(sde: Any, model: Model, continuous: bool) -> Model:
    """Returns the score of a network of the repository: it predicts noise (VP), or the score itself (VE)."""

    def variance_exploding(x: Tensor, t: Tensor) -> Tensor:
        step = ((sde.T - t) * (sde.N - 1)).round().long()
        return model(x, sde.marginal_prob(x, t)[1] if continuous else step)

    def variance_preserving(x: Tensor, t: Tensor) -> Tensor:
        if continuous or not hasattr(sde, "sqrt_1m_alphas_cumprod"):
            return -model(x, t * 999) / match_dims(sde.marginal_prob(x, t)[1], x)
        return -model(x, t * (sde.N - 1)) / match_dims(_at(sde, sde.sqrt_1m_alphas_cumprod, t), x)

    return variance_exploding if hasattr(sde, "discrete_sigmas") else variance_preserving


# Predictors and correctors: each returns the next state, and the same without its last noise. -------------------------


def _euler_maruyama(sde: Any, score: Model, x: Tensor, t: Tensor, flow: bool) -> Pair:
    drift, diffusion = sde.sde(x, t)
    share = 0.5 if flow else 1.0
    noise, mean = torch.randn_like(x), x - (drift - share * match_dims(diffusion, x) ** 2 * score(x, t)) / sde.N
    return (mean if flow else mean + match_dims(diffusion, x) / sde.N**0.5 * noise), mean


def _reverse_diffusion(sde: Any, score: Model, x: Tensor, t: Tensor, flow: bool) -> Pair:
    change, width = sde.discretize(x, t)
    share = 0.5 if flow else 1.0
    mean, noise = x - (change - share * match_dims(width, x) ** 2 * score(x, t)), torch.randn_like(x)
    return (mean if flow else mean + match_dims(width, x) * noise), mean


def _ancestral_sampling(sde: Any, score: Model, x: Tensor, t: Tensor, flow: bool) -> Pair:
    if hasattr(sde, "discrete_sigmas"):
        now, before = _sigmas(sde, t)
        mean = x + match_dims(now**2 - before**2, x) * score(x, t)
        width = before * (now**2 - before**2).sqrt() / now
    else:
        beta = _at(sde, sde.discrete_betas, t)
        mean = (x + match_dims(beta, x) * score(x, t)) / match_dims((1 - beta).sqrt(), x)
        width = beta.sqrt()
    return mean + match_dims(width, x) * torch.randn_like(x), mean


def _alpha(sde: Any, t: Tensor) -> Tensor:
    return _at(sde, sde.alphas, t) if hasattr(sde, "alphas") else torch.ones_like(t)


def langevin(sde: Any, score: Model, x: Tensor, t: Tensor, snr: float, steps: int, by_norms: bool) -> Pair:
    """Takes Langevin steps, whose size follows from the norms of the noise and the score, or from the time."""
    ratio, mean = snr * sde.marginal_prob(x, t)[1], x
    alpha = _at(sde, sde.alphas, t) if hasattr(sde, "alphas") else torch.ones_like(t)
    for _ in range(steps):
        slope, noise = score(x, t), torch.randn_like(x)
        if by_norms:
            of_noise, of_slope = (each.reshape(len(each), -1).norm(dim=-1).mean() for each in (noise, slope))
            ratio = snr * of_noise / of_slope
        size = match_dims(ratio**2 * 2 * alpha, x)
        mean = x + size * slope
        x = mean + (2 * size).sqrt() * noise
    return x, mean


PREDICTORS = {
    "euler_maruyama": _euler_maruyama,
    "reverse_diffusion": _reverse_diffusion,
    "ancestral_sampling": _ancestral_sampling,
}
