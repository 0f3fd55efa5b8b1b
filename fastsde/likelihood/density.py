"""The log density of samples under a score network, by the probability-flow ODE, and bits per dimension of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import checkpoints, conditions, noise, subject
from ..checkpoints import Checkpoint
from ..dynamo import untraced
from ..engines import Network
from ..engines.inspection import check_call, device_of, dtype_of, for_gradients, random_layers
from ..models import unwrap
from ..models.mlp import check_sample_shape
from ..notices import warn_once
from ..randomness import Seed, seed_of
from ..reference import Model
from ..request import make_keys
from ..sde import Process
from ..solvers import AdaptiveODE
from ..subject import ModelLike
from ..validation import check_bool, check_int, check_kwargs, check_range, check_tensor
from .divergence import DEQUANTISATION_STEP, Divergence, probes_of
from .flow import make_flow

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LikelihoodOptions", "bits_per_dim", "log_prob"]

_LEVELS = 256  # of a pixel


class LikelihoodOptions(TypedDict, total=False):
    """The options of `log_prob`, for type checkers only."""

    sde: Process | None
    prediction: str | None
    solver: str | AdaptiveODE
    steps: int | None
    t_start: float | None
    spacing: str | None
    rho: float | None
    trace: str
    probes: int
    seed: Seed
    first_sample: int
    keys: Tensor | Sequence[int] | None
    model_kwargs: Mapping[str, Any] | None
    dtype: torch.dtype | None
    device: torch.device | str | None
    max_batch: int | None
    compile: bool
    progress: bool


@untraced
def log_prob(
    model: ModelLike,
    x: Tensor,
    *,
    sde: Process | None = None,
    prediction: str | None = None,
    solver: str | AdaptiveODE = "rk4",
    steps: int | None = None,
    t_start: float | None = None,
    spacing: str | None = None,
    rho: float | None = None,
    trace: str = "auto",
    probes: int = 1,
    seed: Seed = 0,
    first_sample: int = 0,
    keys: Tensor | Sequence[int] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    max_batch: int | None = None,
    compile: bool = False,
    progress: bool = False,
) -> Tensor:
    """Returns the log density of samples, in nats, as the probability-flow ODE of a score network transports it.

        dx/dt = v(x, t) = f x - 1/2 g^2 score,    d log p(x(t)) / dt = -div v
        log p(x) = log prior(x(t_max)) + integral of div v from t_start to t_max

    (Song et al. 2021, arXiv:2011.13456, section 4.3 and appendix D.2.) It is the density that the deterministic
    samplers draw from when they stop at ``t_start``. A sample's result does not depend on its batch beyond rounding.
    A small network in fp32 on the CPU runs natively, as in `fastsde.Sampler`, if it has no hooks; its derivatives are
    then part of its program.

    Args:
        model: the network, called as ``model(x, t, **model_kwargs)`` and differentiable in x; or a
            `fastsde.checkpoints.Checkpoint`, a file or folder of one, or the name of a shipped model.
        x: the samples ``[B, *shape]``, floating-point, scaled as the network sees them.
        sde: the process, by default ``VPSDE()``; a checkpoint has its own.
        prediction: what the network predicts, by default "score"; a checkpoint has its own.
        solver: "rk4", "heun" or another Runge-Kutta method of `fastsde.solvers.REGISTRY`, whose own weights integrate
            the divergence; or a `fastsde.solvers.AdaptiveODE`, whose error norm then includes log p.
        steps: the calls of the network; by default 100. An adaptive solver has none.
        t_start: the time that x is taken to be at, in [0, t_max); by default ``sde.t_min``, the smallest time that
            networks are trained at. (score_sde takes 1e-5, below the times that many networks know.)
        spacing: of the times, by default "log_snr"; see `fastsde.solvers.times.spaced`.
        rho: the exponent of "karras" spacing.
        trace: the divergence: "exact", at the cost of one backward pass for each element; "hutchinson", an unbiased
            estimate; or "auto", exact up to 32 elements.
        probes: how many random vectors of signs Hutchinson's estimate averages over, each a backward pass. They are
            drawn by the noise contract, and are the same along the whole trajectory of a sample.
        seed: of these draws, as for `fastsde.sample`.
        first_sample: the global index of the first sample.
        keys: one key or one seed per sample, instead of ``seed``.
        model_kwargs: further arguments of the network, with the batch first, such as labels: the density is then
            conditional. What is not given of a checkpoint's conditions is "no condition".
        dtype: the dtype that the network runs in, by default that of its weights. The state is float64 if that is, else
            fp32; log p is summed in float64, except as a part of the state of an `AdaptiveODE`.
        device: by default the network's, or x's for a function.
        max_batch: the most samples that run at once.
        compile: run the network and its backward pass through ``torch.compile``.
        progress: show a progress bar on stderr.

    Returns:
        log p(x), float64 ``[B]``, without a gradient.

    Raises:
        ValueError, TypeError: for an invalid argument; the message names it, the value given and what was expected.
        NonFiniteError: if the network's output or the state becomes NaN or infinite.
    """
    check_tensor("x", x, floating=True, finite=True)
    if not x.ndim:
        raise ValueError("x must have the batch first, got a single number")
    check_bool("compile", compile), check_bool("progress", progress)
    if max_batch is not None:
        check_int("max_batch", max_batch, 1)
    if device is None and device_of(model) is None and not isinstance(model, Checkpoint):
        device = x.device
    run, shape, sde, prediction, checkpoint = subject.resolve(model, x.shape[1:], sde, prediction, device)
    on_device = subject.make_device(device, run)
    network = _network(run, dtype, on_device, compile)
    check_sample_shape(network.model, shape)
    if layers := random_layers(network.model):
        warn_once(
            f"the network has {', '.join(layers)} in training mode, so that densities depend on chance or on the "
            f"batch; call model.eval() first",
            network.kept.told,
        )
    state = torch.float64 if network.dtype == torch.float64 else torch.float32
    check_tensor("x", x, shape=(len(x), *shape), device=on_device)
    flow = make_flow(sde, prediction, solver, steps, t_start, spacing, rho)
    count = probes_of(trace, probes, math.prod(shape))
    keys = make_keys(keys, len(x), seed, first_sample, on_device, False)
    if checkpoint is not None and checkpoint.conditions:
        model_kwargs = conditions.completed(checkpoint.conditions, model_kwargs or {}, keys, checkpoint.has_null)
        conditions.check_labels("model_kwargs", model_kwargs, checkpoint.conditions)
    given = check_kwargs("model_kwargs", {} if model_kwargs is None else model_kwargs, len(x), on_device)
    check_call(network.model, "model_kwargs", given)
    given = for_gradients(given)
    batch = max(len(x) if max_batch is None else max_batch, 1)
    found = torch.empty(len(x), dtype=torch.float64, device=on_device)
    with (
        _reusable_graphs(compile),
        torch.no_grad(),
        tqdm(total=-(-len(x) // batch) * flow.calls, disable=not progress, unit="row") as bar,
    ):
        for first in range(0, len(x), batch):
            part = slice(first, first + batch)
            divergence = Divergence(network, keys[part], shape, count, may_be_native=not compile)
            kwargs, own = conditions.rows_of(given, part), x[part].detach().to(state, copy=True)
            found[part] = flow.log_prob(own, divergence, kwargs, bar)
    return found


def bits_per_dim(
    model: ModelLike,
    images: Tensor,
    *,
    value_range: tuple[float, float] | None = None,
    **options: Unpack[LikelihoodOptions],
) -> Tensor:
    """Returns the bits per dimension of images of 256 levels, by their density after uniform dequantisation.

    A level k = 0 .. 255 becomes y = low + (high - low) (k + u) / 256 with u uniform on [0, 1), a bin of the width
    (high - low) / 256, and with N elements in an image

        bits per dimension = -log2 p(y) / N + 8 - log2(high - low),

    an upper bound of the discrete model's, in the mean (Theis et al. 2016, arXiv:1511.01844, section 3.1). For data in
    [-1, 1] the offset is 7, for [0, 1] it is 8, as score_sde counts (arXiv:2011.13456, appendix D.2). u is drawn by the
    noise contract from the keys of `log_prob`, in step 1 of stream 4.

    Args:
        model: as for `log_prob`.
        images: uint8 ``[B, *shape]``, or floating-point in ``value_range``, of which the nearest levels are taken.
        value_range: black and white as the network sees them; by default a checkpoint's, else (-1, 1).
        options: of `log_prob`.

    Returns:
        float64 ``[B]``; the mean over a test set is what papers report.

    Raises:
        ValueError, TypeError, NonFiniteError: as for `log_prob`.
    """
    if isinstance(model, (str, Path)):
        model = checkpoints.load(model, options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    known = model.value_range if isinstance(model, Checkpoint) else None
    low, high = check_range("value_range", (known or (-1.0, 1.0)) if value_range is None else value_range)
    levels, seed = _levels(images, low, high), options.get("seed", 0)
    if options.get("keys") is None:
        options["seed"] = seed = seed_of(seed)  # of the dequantisation and the probes
    keys = make_keys(options.get("keys"), len(levels), seed, options.get("first_sample", 0), levels.device, False)
    u = noise.uniform(keys, DEQUANTISATION_STEP, levels.shape[1:], noise.STREAM_OTHER)
    y = low + (high - low) * (levels + u.double()) / _LEVELS
    # As exact as the state that they become, whatever the network runs in.
    found = log_prob(model, y if options.get("dtype") == torch.float64 else y.float(), **options)
    return -found / math.log(2) / math.prod(y.shape[1:]) + math.log2(_LEVELS) - math.log2(high - low)


def _levels(images: Tensor, low: float, high: float) -> Tensor:
    """Returns the levels of images from 0 to 255, float64."""
    images = check_tensor("images", images, finite=True)
    if images.ndim < 2:
        raise ValueError(f"images must be [B, *shape], got {list(images.shape)}")
    if images.dtype == torch.uint8:
        return images.double()
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating-point, got {images.dtype}")
    if images.numel() and not low <= float(images.min()) <= float(images.max()) <= high:
        raise ValueError(
            f"images must lie in value_range, {low:g} .. {high:g}, got {float(images.min()):g} .. "
            f"{float(images.max()):g}"
        )
    return ((images.double() - low) / (high - low) * (_LEVELS - 1)).round()


def _reusable_graphs(compile: bool) -> AbstractContextManager[Any]:
    """Lets a compiled backward pass run several times, rather than overwrite what the forward pass has kept."""
    return torch._functorch.config.patch(donated_buffer=False) if compile else nullcontext()


def _network(model: Model, dtype: torch.dtype | None, device: torch.device, compile: bool) -> Network:
    """Returns the network in a form that has gradients: inference forms have none."""
    if not compile:
        return Network(model, dtype, device=device, optimize=True, gradients=True)
    if dtype not in (None, dtype_of(model)):
        raise ValueError(f"compile=True runs the network in its own dtype: move it with model.to({dtype}) first")
    return Network(torch.compile(unwrap(model) if isinstance(model, nn.Module) else model), device=device)
