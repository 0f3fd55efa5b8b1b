"""Latents: `encode` runs the probability flow upwards, from samples to their latents; `decode` runs it down again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from . import solvers, subject
from .dynamo import untraced
from .engines.inspection import device_of
from .guidance import Guidance
from .sampler import sample
from .sde import Process
from .subject import ModelLike
from .validation import check_instance, check_number, check_tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LatentOptions", "decode", "encode"]


class LatentOptions(TypedDict, total=False):
    """Further options of `encode` and `decode`, for type checkers only; as for `fastsde.sample`."""

    sde: Process | None
    prediction: str | None
    rho: float | None
    solver_options: Mapping[str, Any] | None
    dtype: torch.dtype | None
    device: torch.device | str | None
    guidance: float | Tensor | Guidance | None
    uncond_kwargs: Mapping[str, Any] | None
    backend: str
    compile: bool | str
    max_batch: int | str | None
    progress: bool


@untraced
def encode(
    model: ModelLike,
    x: Tensor,
    *,
    solver: str = "dpm_solver_pp_2m",
    steps: int = 100,
    t_start: float | None = None,
    spacing: str | None = "log_snr",
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[LatentOptions],
) -> Tensor:
    """Returns the latents of samples: where the probability flow takes them at ``t_max``, the time of the prior.

    (Song et al. 2021, arXiv:2011.13456, section 4.3, "manipulating latent representations"; with ddim the inversion of
    Song, Meng & Ermon 2021, arXiv:2010.02502, section 4.3.) `decode` with the same solver, steps, spacing, conditions
    and time takes them back, up to the errors of the two trajectories. Measured with the defaults on the shipped
    models: 99 % of the swiss roll within 1e-3, and the farthest of 5,000 points within 1e-2; test digits given their
    labels within a root mean square of 1e-2 for each of 100 digits, and 95 of these within 1e-2 in every pixel; samples
    of the model within 1e-2 in every pixel. Images unlike the data, and wrong or missing labels, take many more steps.

    Args:
        model: the network, called as ``model(x, t, **model_kwargs)``, or whatever else `fastsde.sample` takes.
        x: the samples ``[B, *shape]``, floating-point, scaled as the network sees them.
        solver: one of `fastsde.solvers.SOLVERS` that draws no noise, such as "heun", "rk4", "ddim" or "unipc"; one of
            the first two if alpha is 0 at ``t_max``, as for rectified flow.
        steps: the calls of the network.
        t_start: the time that x is taken to be at; by default ``sde.t_min``, since networks are not trained below, and
            most solvers have no step from t = 0, where there is no noise.
        spacing: of the times, see `fastsde.solvers.times.spaced`.
        model_kwargs: further arguments of the network. What is not given of a checkpoint's conditions is "no
            condition", rather than drawn.
        options: of `fastsde.sample`: sde, prediction, rho, solver_options, dtype, device, guidance, uncond_kwargs,
            backend, compile, max_batch, progress.

    Returns:
        The latents ``[B, *shape]``, distributed as the process's prior if x is as the flow's own samples at
        ``t_start``. Data without the little noise of that time, such as the flat background of digits, have smaller
        ones.

    Raises:
        ValueError, TypeError, NonFiniteError: as for `fastsde.sample`, and for a solver that draws noise.
    """
    check_tensor("x", x, floating=True, finite=True)
    network, process, low = _prepared("t_start", model, x, t_start, solver, steps, spacing, options)
    return sample(
        network,
        x.shape,
        x_init=x,
        solver=solver,
        steps=steps,
        t_start=low,
        t_end=process.t_max,
        spacing=spacing,
        model_kwargs=model_kwargs or {},
        **options,
    )


@untraced
def decode(
    model: ModelLike,
    z: Tensor,
    *,
    solver: str = "dpm_solver_pp_2m",
    steps: int = 100,
    t_end: float | None = None,
    spacing: str | None = "log_snr",
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[LatentOptions],
) -> Tensor:
    """Returns the samples of latents ``z`` ``[B, *shape]`` at ``t_max``: `fastsde.sample` from there, without noise.

    Args:
        model: the network, as for `encode`.
        z: the latents ``[B, *shape]``.
        solver: as for `encode`; to come back to the samples, the same one.
        steps: the calls of the network.
        t_end: the time that the samples are at; by default ``sde.t_min``, as in `encode`.
        spacing: of the times, see `fastsde.solvers.times.spaced`.
        model_kwargs: further arguments of the network. What is not given of a checkpoint's conditions is "no
            condition", rather than drawn.
        options: of `fastsde.sample`, as for `encode`.

    Returns:
        The samples ``[B, *shape]``.

    Raises:
        ValueError, TypeError, NonFiniteError: as for `encode`.
    """
    check_tensor("z", z, floating=True, finite=True)
    network, process, low = _prepared("t_end", model, z, t_end, solver, steps, spacing, options)
    return sample(
        network,
        z.shape,
        x_init=z,
        solver=solver,
        steps=steps,
        t_start=process.t_max,
        t_end=low,
        spacing=spacing,
        model_kwargs=model_kwargs or {},
        **options,
    )


def _prepared(
    name: str,
    model: ModelLike,
    x: Tensor,
    time: float | None,
    solver: str,
    steps: int,
    spacing: str | None,
    options: LatentOptions,
) -> tuple[ModelLike, Process, float]:
    """Returns the network, its process and the time of the data, which came as the argument ``name``.

    Raises:
        ValueError, TypeError: for an invalid argument, or a solver that draws noise, which no table upwards has.
    """
    check_instance("solver", solver, str)
    sde, prediction, device = options.get("sde"), options.get("prediction"), options.get("device")
    if device is None and device_of(model) is None:
        device = x.device
    known = subject.resolve(model, x.shape[1:], sde, prediction, device)
    low = known.sde.t_min if time is None else time
    check_number(name, low, f"in [0, {known.sde.t_max:g})", lambda t: 0 <= t < known.sde.t_max)
    given: Any = {each: options.get(each) for each in ("rho", "solver_options")}
    ends: Any = {"t_start": low, "t_end": known.sde.t_max}
    try:
        solvers.build(solver, known.sde, steps, **ends, spacing=spacing, prediction=known.prediction, **given)
    except ValueError as error:
        raise ValueError(f"solver={solver!r} cannot run from data to noise: {error}") from error
    return known.model if known.checkpoint is None else known.checkpoint, known.sde, low
