"""The reference: training and sampling in plain PyTorch. Read this file first.

Every fast path of the package is checked against these functions. They draw their noise from the contract in
`fastsde.noise`, take any solver as a table (`fastsde.solvers`), and run on any device in fp32 or float64. They do not
check their arguments; `fastsde.ops` and `fastsde.sample` do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import noise
from .guidance import Guidance, Weights
from .objective import Coefficients, Objective
from .sde import match_dims
from .solvers import StepTable

__all__ = [
    "Draws",
    "Noised",
    "NonFiniteError",
    "averaged",
    "clip_gradient",
    "condition_draws",
    "copy_buffers",
    "denoise",
    "drop_conditions",
    "dsm_loss",
    "ema_update",
    "evaluate",
    "flip_images",
    "guided",
    "langevin_size",
    "network_input",
    "perturb",
    "rescale_factor",
    "sample",
    "sample_losses",
    "solver_step",
    "train_step",
    "training_draws",
]

Model = Callable[..., Tensor]
"""A network, called as ``model(x, t, **model_kwargs)`` with x ``[B, *shape]`` and t ``[B]``."""
NoiseFunction = Callable[[int, Tensor], Tensor]
"""``(row, x) -> z``: the noise of a row, of the shape of the state x."""
RowHook = Callable[[int, float, Tensor], "Tensor | None"]
"""``(row, time, x) -> None``, called after each row; or it returns a tensor, which replaces the state."""

MOST_ROWS = 2**24  # of data that one uniform tells apart


class NonFiniteError(RuntimeError):
    """The network's output or the state is NaN or infinite; in sampling, the message gives the row and the time."""


def check_finite(what: str, value: Tensor, row: int, time: float) -> None:
    """Raises `NonFiniteError` if ``value`` is not finite; the message starts with ``what`` (see `non_finite`)."""
    if value.numel() and not torch.isfinite(torch.stack(value.aminmax())).all():  # NaN passes through aminmax
        raise non_finite(what, row, time)


def non_finite(what: str, row: int, time: float) -> NonFiniteError:
    """Returns the error for a row; ``what``, such as "the network returned", is the start of its message."""
    return NonFiniteError(f"{what} NaN or infinity in row {row}, at time {time:g}")


def _given(keys: Tensor | None) -> Tensor:
    if keys is None:
        raise TypeError("keys must be given to draw noise, got None")
    return keys


# Sampling -----------------------------------------------------------------------------------------------------------


def solver_step(
    slots: Sequence[Tensor],
    f: Tensor,
    table: StepTable,
    row: int,
    *,
    z: Tensor | None = None,
    keys: Tensor | None = None,
    f_uncond: Tensor | None = None,
    guidance: float | Tensor | None = None,
    rescale: float = 0.0,
) -> tuple[Tensor, ...]:
    """Computes one row of a table: s' = A s + b f + e D + d z, with D = clamp(p.s + q f).

    In a Langevin row, D and z are first multiplied by eps and sqrt(2 eps) of `langevin_size`.

    Args:
        slots: the state, m tensors ``[B, *shape]``.
        f: the network's output at ``table.time[row]``, shaped like a slot, of any floating-point dtype.
        table: the solver.
        row: the row, from 0.
        z: this row's noise, needed where d is not zero; drawn from ``keys`` if not given.
        keys: int64 ``[B, 2]``.
        f_uncond: the unconditional output, combined as f_uncond + guidance (f - f_uncond).
        guidance: a number, or one a sample, ``[B]``.
        rescale: phi, by which the combined output is rescaled (`rescale_factor`).

    Returns:
        The new slots, each in its own memory. A slot that takes over an old one unchanged is that same tensor.
    """
    f = guided(f.to(slots[0].dtype), f_uncond, guidance, rescale)
    k = table.row(row)
    data = z_row = f  # placeholders, if no slot uses them
    if any(k.e):
        data = _sum((*k.p, k.q), (*slots, f))
        if table.clip is not None:
            data = data.clamp(-table.clip, table.clip)
    if any(k.d):
        z_row = noise.normal(_given(keys), row + 1, f.shape[1:]).to(f) if z is None else z
    if k.snr > 0:
        data, z_row = langevin_terms(data, z_row, k.snr, k.eps_max)
    terms = (*slots, f, data, z_row)
    return tuple(
        _sum((*k.A[slot], k.b[slot], k.e[slot], k.d[slot]), terms) if source is None else slots[source]
        for slot, source in enumerate(table.sources(row))
    )


def guided(f: Tensor, f_uncond: Tensor | None, guidance: float | Tensor | None, rescale: float = 0.0) -> Tensor:
    """Returns the network's output with guidance, if there is any. Arguments as for `solver_step`."""
    if f_uncond is None or guidance is None:
        return f
    f_uncond = f_uncond.to(f.dtype)
    w = match_dims(guidance, f) if isinstance(guidance, Tensor) else guidance
    combined = f_uncond + w * (f - f_uncond)
    if not rescale:
        return combined
    return combined * match_dims(rescale_factor(f, combined, rescale), f)


def rescale_factor(f: Tensor, combined: Tensor, phi: float) -> Tensor:
    """Returns phi std(f) / std(combined) + 1 - phi for each sample, ``[B]``, or 1 where std(combined) is 0.

    (Lin et al. 2023, arXiv:2305.08891, eqs. 14-16.) The deviations are over all elements of a sample.
    """

    def deviation(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        norm: Tensor = torch.linalg.vector_norm(flat - flat.mean(dim=1, keepdim=True), dim=1)
        return norm  # N - 1 cancels in the ratio

    whole, other = deviation(f[:, None]), deviation(combined[:, None])
    exists = other > 0
    return torch.where(exists, phi * (whole / torch.where(exists, other, 1.0)) + (1 - phi), 1.0)


def langevin_size(g: Tensor, z: Tensor, snr: float, largest: float = math.inf) -> Tensor:
    """Returns eps = min(2 (snr |z| / |g|)^2, largest) for each sample, ``[B]``, or 0 where g is 0.

    (Song et al. 2021, arXiv:2011.13456, algorithm 4.) The norms are over all elements of a sample.
    """
    of_g, of_z = (torch.linalg.vector_norm(each[:, None].flatten(1), dim=1) for each in (g, z))
    exists = of_g > 0  # elsewhere a gradient through the division would be NaN
    return torch.where(exists, (2 * (snr * of_z / torch.where(exists, of_g, 1.0)) ** 2).clamp(max=largest), 0.0)


def langevin_terms(g: Tensor, z: Tensor, snr: float, largest: float) -> tuple[Tensor, Tensor]:
    """Returns eps g and sqrt(2 eps) z, with the eps of each sample."""
    size = match_dims(langevin_size(g, z, snr, largest), g)
    root = torch.where(size > 0, 2 * size, 1.0).sqrt()  # whose gradient at 0 is infinite
    return size * g, torch.where(size > 0, root, 0.0) * z


def network_input(slots: Sequence[Tensor], table: StepTable, row: int) -> Tensor:
    """Returns n.s, the network's input in a row."""
    k = table.row(row)
    return slots[0] if k.reads_slot_0 else _sum(k.n, slots)


def _sum(coefficients: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """Returns the sum of the terms, without those whose coefficient is zero, which may be infinite."""
    used = [coefficient * term for coefficient, term in zip(coefficients, terms, strict=True) if coefficient != 0]
    return sum(used[1:], used[0]) if used else torch.zeros_like(terms[0])


def evaluate(
    model: Model,
    x: Tensor,
    t: Tensor,
    model_kwargs: Mapping[str, Any],
    uncond_kwargs: Mapping[str, Any] | None,
    other: Model | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns the network's output and, if there are ``uncond_kwargs``, the unconditional output.

    Args:
        other: the network of the unconditional output, if it is another one.

    Raises:
        IndexError: if an argument is out of the network's range; the message names the arguments.
    """
    f = _call(model, x, t, "model_kwargs", model_kwargs)
    if uncond_kwargs is None:
        return f, None
    f = f.clone()  # a network may return the same memory at every call
    return f, _call(model if other is None else other, x, t, "uncond_kwargs", uncond_kwargs)


def _call(model: Model, x: Tensor, t: Tensor, name: str, kwargs: Mapping[str, Any]) -> Tensor:
    try:
        return model(x, t, **kwargs)
    except IndexError as error:
        ranges = [
            f"{key!r} of {int(value.min())} .. {int(value.max())}"
            for key, value in kwargs.items()
            if isinstance(value, Tensor) and value.numel() and not value.is_floating_point()
        ]
        given = f" with {name} {', '.join(ranges)}" if ranges else ""
        raise IndexError(f"the network failed at time {float(t[0]):g}{given}: {error}") from error


def sample(
    model: Model,
    shape: Sequence[int],
    table: StepTable,
    keys: Tensor,
    *,
    x_init: Tensor | None = None,
    noise_function: NoiseFunction | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    guidance: float | Guidance | Weights | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    after_row: RowHook | None = None,
    recompute: bool = False,
) -> Tensor:
    """Computes a whole trajectory: one network call and one `solver_step` per row, from the prior to the sample.

    Args:
        model: called as ``model(x, t, **model_kwargs)`` with t ``[B]``.
        shape: ``(B, *shape)``.
        table: the solver.
        keys: int64 ``[B, 2]``, one key per sample.
        x_init: the initial state, instead of the draw of step 0.
        noise_function: ``(row, x) -> z``, instead of the draw of step ``row + 1``.
        model_kwargs: further arguments of the network.
        guidance: w of classifier-free guidance between ``model_kwargs`` and ``uncond_kwargs`` (Ho & Salimans 2022,
            arXiv:2207.12598), or a `fastsde.Guidance`, or its weights for this batch.
        uncond_kwargs: the arguments of the unconditional call.
        dtype: the dtype of the state.
        after_row: called as ``after_row(row, time, x)`` with the state after each row. A tensor that it returns
            replaces the state.
        recompute: whether a backward pass computes each row again, instead of keeping its activations.

    Raises:
        NonFiniteError: if the network's output or the state becomes NaN or infinite.
    """
    if guidance is not None and not isinstance(guidance, Weights):
        guidance = Guidance.of(guidance).along(table)
        guidance = guidance.weights(shape[0], table, keys.device, dtype, guidance.model)
    weights = guidance

    def advance(row: int, *slots: Tensor) -> tuple[Tensor, ...]:
        k = table.row(row)
        t = torch.full((len(slots[0]),), k.time, dtype=dtype, device=slots[0].device)
        uncond, w, other = None, None, None
        if weights is not None and weights.guided[row]:
            uncond, w, other = uncond_kwargs or {}, weights.of_row(row), weights.network
        f, f_uncond = evaluate(model, network_input(slots, table, row), t, model_kwargs or {}, uncond, other)
        for output in (f, f_uncond):
            if output is not None:
                check_finite("the network returned", output, row, k.time)
        z = noise_function(row, slots[0]) if noise_function is not None and k.has_noise else None
        phi = 0.0 if guidance is None else guidance.rescale
        slots = solver_step(slots, f, table, row, z=z, keys=keys, f_uncond=f_uncond, guidance=w, rescale=phi)
        check_finite("the state became", slots[0], row, k.time)
        return slots

    x = noise.normal(keys, 0, shape[1:]).to(dtype) if x_init is None else x_init.to(dtype)
    slots = (x, *(torch.zeros_like(x) for _ in range(1, table.slots)))
    for row in range(len(table)):
        slots = checkpoint(advance, row, *slots, use_reentrant=False) if recompute else advance(row, *slots)
        replaced = None if after_row is None else after_row(row, table.row(row).time, slots[0])
        slots = slots if replaced is None else (replaced, *slots[1:])
    return slots[0]


# Training -----------------------------------------------------------------------------------------------------------


class Draws(NamedTuple):
    """The random part of a training step: positions in the data ``[B]``, the coefficients of its times ``[B, 6]`` and
    noise ``[B, *shape]``.
    """

    data_index: Tensor
    coefficients: Tensor
    z: Tensor

    def of(self, rows: slice) -> Draws:
        """Returns the draws of some rows of the batch."""
        return Draws(*(each[rows] for each in self))


def training_draws(keys: Tensor, step: int | Tensor, n: int, shape: Sequence[int], objective: Objective) -> Draws:
    """Draws the random part of one step, or of R steps with a leading axis of R for an int64 tensor of R steps.

    Position i of the global batch has key ``keys[i]``. Positions in a data set of ``n`` come from stream 3, with
    replacement; times from the uniforms of stream 2 (`Objective.draw`); noise from stream 1.
    """
    t = objective.draw(noise.uniform(keys, step, (), noise.STREAM_TRAINING_TIME))
    z = noise.normal(keys, step, shape, noise.STREAM_TRAINING_NOISE)
    return Draws(data_order(keys, step, n), objective.table(t), z)


def data_order(keys: Tensor, step: int | Tensor, n: int) -> Tensor:
    """Draws positions ``[B]`` in a data set of ``n``, or ``[R, B]`` for an int64 tensor of R steps.

    A uniform has 24 bits: larger data sets take 24 more from a second one, or most of their rows would never be drawn.
    """
    if n <= MOST_ROWS:
        return (noise.uniform(keys, step, (), noise.STREAM_DATA_ORDER).double() * n).long()
    high, low = noise.uniform(keys, step, (2,), noise.STREAM_DATA_ORDER).double().unbind(-1)
    return ((high + low / MOST_ROWS) * n).long()


def load_batch(x_0: Tensor, index: Tensor | None = None, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Returns scale x_0 + shift in floating point, for the rows ``index`` if given."""
    x_0 = x_0 if index is None else x_0[index]
    x_0 = x_0 if x_0.is_floating_point() else x_0.float()
    return x_0 if (scale, shift) == (1.0, 0.0) else scale * x_0 + shift


def condition_draws(keys: Tensor, step: int | Tensor) -> Tensor:
    """Draws two fp32 uniforms for each sample of a step from stream 4, ``[B, 2]``, or ``[R, B, 2]`` for R steps.

    Conditions are dropped where the first is below the rate of dropping them; an image is flipped where the second is
    below 1/2.
    """
    return noise.uniform(keys, step, (2,), noise.STREAM_OTHER)


def drop_conditions(
    conditions: Mapping[str, Tensor], nulls: Mapping[str, float], u: Tensor, rate: float
) -> dict[str, Tensor]:
    """Returns conditions ``[B, ...]`` with those of the samples where u < ``rate`` replaced by "no condition".

    All conditions of a sample are dropped together (Ho & Salimans 2022, arXiv:2207.12598).

    Args:
        nulls: the value of "no condition", by name.
        u: the first of a sample's `condition_draws`, ``[B]``.
    """
    if rate == 0:
        return dict(conditions)
    dropped = u < rate
    return {
        name: torch.where(match_dims(dropped, value), torch.full_like(value, nulls[name]), value)
        for name, value in conditions.items()
    }


def flip_images(x_0: Tensor, u: Tensor) -> Tensor:
    """Returns images ``[B, C, H, W]``, mirrored from left to right where the second `condition_draws` is below 1/2."""
    return torch.where(match_dims(u < 0.5, x_0), x_0.flip(-1), x_0)


class Noised(NamedTuple):
    """The network's inputs, x_in ``[B, *shape]`` and tau ``[B]``, and the noise, or None if it was not kept."""

    x_in: Tensor
    tau: Tensor
    z: Tensor | None


def _term(coefficient: Tensor, x: Tensor) -> Tensor:
    """Returns coefficient ``[B]`` times x ``[B, *shape]``; zero where the coefficient is, even if x is not finite."""
    coefficient = match_dims(coefficient, x).to(x.dtype)
    return torch.where(coefficient == 0, coefficient, coefficient * x)


def perturb(
    x_0: Tensor,
    keys: Tensor | None,
    step: int,
    coefficients: Tensor,
    *,
    index: Tensor | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    z: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Noised:
    """Adds noise to data: x_in = u_x x_0 + u_z z.

    Args:
        x_0: the data, uint8 or float ``[B, *shape]``, or ``[N, *shape]`` where an index is given.
        keys: int64 ``[B, 2]``; may be None if ``z`` is given.
        step: the training iteration.
        coefficients: floating-point ``[B, 6]`` (`fastsde.objective.Objective.table`).
        index: int64 ``[B]``, the rows of ``x_0`` to use.
        scale: x_0 is replaced by scale x_0 + shift.
        shift: see ``scale``.
        z: noise ``[B, *shape]``; drawn if not given.
        dtype: the dtype of x_in; by default that of the computation, fp32 for uint8 data.
    """
    x_0 = load_batch(x_0, index, scale, shift)
    if z is None:
        z = noise.normal(_given(keys), step, x_0.shape[1:], noise.STREAM_TRAINING_NOISE)
    k = Coefficients(*coefficients.unbind(-1))
    x_in = _term(k.u_x, x_0) + _term(k.u_z, z.to(x_0.dtype))
    return Noised(x_in.to(dtype or x_0.dtype), k.tau, z)


def dsm_loss(
    f: Tensor,
    x_0: Tensor,
    keys: Tensor | None,
    step: int,
    coefficients: Tensor,
    *,
    index: Tensor | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    z: Tensor | None = None,
) -> Tensor:
    """Computes the loss mean (w_f f + w_x x_0 + w_z z)^2: denoising score matching (`fastsde.objective`).

    Args:
        f: the network's output at the x_in and tau of `perturb`, ``[B, *shape]``.
        x_0: as for `perturb`.
        keys: as for `perturb`.
        step: as for `perturb`.
        coefficients: as for `perturb`.
        index: as for `perturb`.
        scale: as for `perturb`.
        shift: as for `perturb`.
        z: as for `perturb`.

    Returns:
        The loss, a scalar.
    """
    x_0 = load_batch(x_0, index, scale, shift)
    if z is None:
        z = noise.normal(_given(keys), step, x_0.shape[1:], noise.STREAM_TRAINING_NOISE)
    return _residual(f, x_0, coefficients, z).square().mean()


def sample_losses(f: Tensor, x_0: Tensor, coefficients: Tensor, z: Tensor) -> Tensor:
    """Computes the loss of each sample, ``[B]``, whose mean is `dsm_loss`. Arguments as there."""
    return _residual(f, x_0, coefficients, z)[:, None].square().flatten(1).mean(1)


def _residual(f: Tensor, x_0: Tensor, coefficients: Tensor, z: Tensor) -> Tensor:
    """Returns w_f f + w_x x_0 + w_z z."""
    k = Coefficients(*coefficients.unbind(-1))
    return _term(k.w_f, f) + _term(k.w_x, x_0) + _term(k.w_z, z)


def ema_update(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves the weights of ``ema`` towards those of ``model``: ema = decay ema + (1 - decay) model.

    Buffers, such as the running statistics of batch normalization, are copied.
    """
    with torch.no_grad():
        torch._foreach_lerp_(*averaged(ema, model), 1 - decay)
    copy_buffers(ema, model)


def averaged(ema: nn.Module, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the parameters that are averaged, of both networks: integers cannot be trained, and stay as they are."""
    pairs = zip(ema.parameters(), model.parameters(), strict=True)
    kept = [(ours, theirs.detach()) for ours, theirs in pairs if ours.is_floating_point() or ours.is_complex()]
    return [ours for ours, _ in kept], [theirs for _, theirs in kept]


def copy_buffers(ema: nn.Module, model: nn.Module) -> None:
    """Copies the buffers of ``model`` to ``ema``."""
    with torch.no_grad():
        for ours, theirs in zip(ema.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)


def train_step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    data: Tensor,
    keys: Tensor | None,
    step: int,
    objective: Objective,
    *,
    scale: float = 1.0,
    shift: float = 0.0,
    conditions: Mapping[str, Tensor] | None = None,
    nulls: Mapping[str, float] | None = None,
    dropout: float = 0.0,
    flip: bool = False,
    autocast: torch.dtype | None = None,
    clip_norm: float | None = None,
    draws: Draws | None = None,
) -> Tensor:
    """Takes one training step on a batch drawn from ``data`` ``[N, *shape]``.

    Args:
        model: the network.
        optimizer: of its parameters.
        data: uint8 or float ``[N, *shape]``.
        keys: int64 ``[B, 2]``, one key per position in the batch; None if ``draws`` are given and nothing is dropped or
            flipped.
        step: the training iteration.
        objective: what the network learns, and at which times; unused if ``draws`` are given.
        scale: the data are replaced by scale x_0 + shift.
        shift: see ``scale``.
        conditions: further arguments of the network, ``[N, ...]`` by name.
        nulls: the values of "no condition", by name.
        dropout: the share of samples that get them (`drop_conditions`).
        flip: whether half of the images are mirrored (`flip_images`).
        autocast: the dtype that the network runs in under ``torch.autocast``, or None.
        clip_norm: the largest norm of the gradient, which is scaled down to it, or None.
        draws: the `training_draws` of this step, if they were drawn ahead.

    Returns:
        The loss before the step, a scalar.
    """
    if draws is None:
        draws = training_draws(_given(keys), step, len(data), data.shape[1:], objective)
    x_0 = load_batch(data, draws.data_index, scale, shift)
    given = {name: value[draws.data_index] for name, value in (conditions or {}).items()}
    if flip or dropout:
        u = condition_draws(_given(keys), step)
        given = drop_conditions(given, nulls or {}, u[:, 0], dropout)
        x_0 = flip_images(x_0, u[:, 1]) if flip else x_0
    optimizer.zero_grad()
    loss = dsm_loss(denoise(model, x_0, draws, given, autocast), x_0, None, step, draws.coefficients, z=draws.z)
    torch.autograd.backward(loss)
    clip_gradient(model, clip_norm)
    optimizer.step()
    return loss.detach()


def denoise(
    model: Model, x_0: Tensor, draws: Draws, conditions: Mapping[str, Tensor], autocast: torch.dtype | None = None
) -> Tensor:
    """Returns the network's output at the noised data, in the dtype of the data. Arguments as for `train_step`.

    Args:
        x_0: the batch, floating-point ``[B, *shape]``.
        conditions: of the batch.
    """
    x_in, tau, _ = perturb(x_0, None, 0, draws.coefficients, z=draws.z)
    with torch.autocast(x_in.device.type, dtype=autocast, enabled=autocast is not None):
        f = model(x_in, tau, **conditions)
    return f.to(x_in.dtype)


def clip_gradient(model: Any, norm: float | None) -> None:
    """Scales the gradient of a network down to ``norm`` if it is longer; None leaves it as it is."""
    if norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
