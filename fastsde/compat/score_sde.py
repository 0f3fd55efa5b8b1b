"""The samplers of score_sde (https://github.com/yang-song/score_sde_pytorch), run as tables.

Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", arXiv:2011.13456:
predictors by Euler-Maruyama, reverse diffusion (appendix E) and ancestral sampling (appendix F), Langevin correctors
(appendix G) and the probability flow (appendix D). Written anew from the paper, with the repository's arguments, time
points and order of draws, so that its networks give its numbers.

The process is one of this package's, or an object with the repository's interface: ``sde(x, t)``,
``marginal_prob(x, t)``, ``discretize(x, t)``, ``prior_sampling(shape)``, ``N`` and ``T``, and for some samplers
``discrete_betas``, ``alphas`` or ``discrete_sigmas``, which tell a VP from a VE process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..sde.process import Process
from ..tracing import accelerate
from .score_sde_steps import PREDICTORS, Discretized, Model, langevin, score_of

__all__ = ["Discretized", "get_pc_sampler", "get_sampling_fn"]

_CORRECTORS = ("langevin", "ald")


def get_pc_sampler(
    sde: Any,
    shape: Sequence[int],
    predictor: str = "euler_maruyama",
    corrector: str = "none",
    inverse_scaler: Callable[[Tensor], Tensor] | None = None,
    snr: float = 0.16,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = True,
    denoise: bool = True,
    eps: float = 1e-3,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Callable[[nn.Module], tuple[Tensor, int]]:
    """Returns a predictor-corrector sampler (the paper's Algorithm 1): a function of the network.

    Args:
        sde: a process of this package, in 1,000 steps (`Discretized` takes others), or one of the repository's.
        shape: ``(B, *shape)``.
        predictor: "euler_maruyama", "reverse_diffusion", "ancestral_sampling" (VP and VE only) or "none".
        corrector: "langevin", whose steps follow from norms, which need ``replay=True``; "ald", whose steps follow from
            the time; or "none".
        inverse_scaler: applied to the samples, by default nothing.
        snr: the corrector's signal-to-noise ratio.
        n_steps: the corrector's steps per predictor step.
        probability_flow: the predictor follows the ODE instead of the SDE.
        continuous: the network was trained with continuous times.
        denoise: leave out the last noise.
        eps: the time to stop at.
        device: where to sample.
        options: of `fastsde.accelerate`: noise, seed, backend, compile, check, replay.

    Returns:
        A function that takes a network and returns the samples and the number of network calls as the repository counts
        them. Its attribute ``loop`` is the `fastsde.tracing.Accelerated`.

    Raises:
        ValueError: for an unknown predictor or corrector, or one that the process has not.
    """
    own = Discretized(sde) if isinstance(sde, Process) else sde
    for name, value, known in (("predictor", predictor, PREDICTORS), ("corrector", corrector, _CORRECTORS)):
        if value not in (*known, "none"):
            raise ValueError(f"{name} must be one of {', '.join((*known, 'none'))}, got {value!r}")
    has_steps = hasattr(own, "discrete_sigmas") or hasattr(own, "discrete_betas")
    if predictor == "ancestral_sampling" and (probability_flow or not has_steps):
        raise ValueError("ancestral_sampling needs a VP or VE process, and has no probability flow")

    def loop(model: Model) -> Tensor:
        score = score_of(own, model, continuous)
        with torch.no_grad():
            x = mean = own.prior_sampling(shape).to(device)
            for time in torch.linspace(own.T, eps, own.N, dtype=torch.float32, device=device):
                t = time * torch.ones(len(x), dtype=torch.float32, device=device)
                if corrector != "none":
                    x, mean = langevin(own, score, x, t, snr, n_steps, by_norms=corrector == "langevin")
                if predictor != "none":
                    x, mean = PREDICTORS[predictor](own, score, x, t, probability_flow)
                else:  # as in the repository
                    mean = x
        return mean if denoise else x

    fast = accelerate(loop, network="model", **options)

    def sampler(model: nn.Module) -> tuple[Tensor, int]:
        if isinstance(model, nn.Module):
            model.eval()
        x: Tensor = fast(model)
        return (x if inverse_scaler is None else inverse_scaler(x)), own.N * (n_steps + 1)

    sampler.loop = fast  # type: ignore[attr-defined]
    return sampler


def get_sampling_fn(
    config: Any, sde: Any, shape: Sequence[int], inverse_scaler: Callable[[Tensor], Tensor], eps: float, **options: Any
) -> Callable[[nn.Module], tuple[Tensor, int]]:
    """Returns the sampler of one of the repository's configurations; see `get_pc_sampler`.

    Args:
        config: reads ``sampling`` (method, predictor, corrector, snr, n_steps_each, probability_flow, noise_removal),
            ``training.continuous`` and ``device``.
        sde: as for `get_pc_sampler`.
        shape: ``(B, *shape)``.
        inverse_scaler: applied to the samples.
        eps: the time to stop at.
        options: of `fastsde.accelerate`: noise, seed, backend, compile, check, replay.

    Raises:
        ValueError: for the method "ode", whose solver is adaptive: use "pc" with ``probability_flow``.
    """
    own = config.sampling
    if own.method.lower() != "pc":
        raise ValueError(f"method must be 'pc', got {own.method!r}: set sampling.probability_flow for the ODE's steps")
    return get_pc_sampler(
        sde,
        shape,
        own.predictor.lower(),
        own.corrector.lower(),
        inverse_scaler,
        own.snr,
        own.n_steps_each,
        own.probability_flow,
        config.training.continuous,
        own.noise_removal,
        eps,
        config.device,
        **options,
    )
