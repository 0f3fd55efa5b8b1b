"""diffusers: its schedulers as tables, its networks sampled by them, and its pipelines accelerated.

Nothing of diffusers is rewritten: a scheduler's or a pipeline's own code is traced (see `fastsde.trace`), on a copy of
the scheduler, so that the one that is given stays as it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..engines.inspection import device_of, dtype_of
from ..solvers import StepTable
from ..tracing import Traced, TraceError, record
from ..validation import check_number, check_shape
from .diffusers_pipelines import AcceleratedPipeline, accelerate

__all__ = ["AcceleratedPipeline", "accelerate", "sample", "table"]

_SHAPE = (2, 3, 2, 2)  # of the state that a scheduler is traced on: the table does not depend on it
_TRACE = "trace the loop that steps it by fastsde.trace"


def table(
    scheduler: Any,
    num_inference_steps: int | None = None,
    *,
    set_timesteps: Mapping[str, Any] | None = None,
    **step_kwargs: Any,
) -> StepTable:
    """Returns a scheduler as a table, for `fastsde.sample` and `fastsde.Sampler`.

    Its time is what the pipelines give to the network, and it starts from a standard normal draw. The network is called
    with the scheduler's scaled input, and predicts what the scheduler's config says.

    Args:
        scheduler: any scheduler that is stepped by ``step(model_output, t, sample)``.
        num_inference_steps: of its ``set_timesteps``; None if that is given other arguments instead.
        set_timesteps: more arguments of its ``set_timesteps``, such as ``{"sigmas": [...]}`` or ``{"mu": 0.5}``.
        step_kwargs: of its ``step``, such as ``eta=0.5``.

    Raises:
        TraceError: if no table can follow it, such as with dynamic thresholding or a learned variance.
        ValueError: if it is stepped in another way, or refuses its arguments.
    """
    has_variance = getattr(getattr(scheduler, "config", None), "variance_type", None) in ("learned", "learned_range")
    network = _Learned() if has_variance else nn.Identity()
    _check_step(scheduler, step_kwargs)
    try:
        program = record(
            _loop,
            lambda x, t: network(x),
            scheduler,
            _SHAPE,
            num_inference_steps,
            set_timesteps,
            step_kwargs,
            network="network",
            double=True,
        )
    except TraceError:
        raise
    except Exception as error:  # the scheduler's own
        raise ValueError(f"{type(scheduler).__name__} cannot be stepped with these arguments: {error}") from error
    traced = Traced(program, type(scheduler).__name__)
    if traced.tabulated is None:
        raise TraceError("table", str(traced.why_no_table), traced.name, _TRACE)
    own, first, last = traced.tabulated.table, traced.tabulated.scale, _last_factor(traced)
    time = torch.tensor([float(call.leaves[1]) for call in program.calls], dtype=torch.float64)
    columns = {name: getattr(own, name).clone() for name in ("n", "p", "q", "A", "b", "e", "d")}
    for rows in (columns["n"][0], columns["p"][0], columns["A"][0].T):  # slot 0 starts as a standard normal draw
        rows[0] *= first
    for name in "Abed":  # and ends as the result
        columns[name][-1, 0] *= last
    return StepTable(time, clip=own.clip, **columns)


class _Learned(nn.Module):
    """Returns a prediction and a variance."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], dim=1)


def _last_factor(traced: Traced) -> float:
    """Returns what the loop's result is of its last state."""
    assert traced.tabulated is not None
    ((node, end),) = traced.tabulated.returned.items()
    (value,) = traced.program.outputs[0].parts
    factor = value.terms.get((node, None))
    if end.after or end.const != 0 or value.const != 0 or len(value.terms) != 1 or not isinstance(factor, float):
        raise TraceError("table", "it changes its result after the last row", traced.name, _TRACE)
    return factor * end.scale


def _check_step(scheduler: Any, step_kwargs: Mapping[str, Any]) -> None:
    name = type(scheduler).__name__
    if not callable(getattr(scheduler, "step", None)) or not callable(getattr(scheduler, "set_timesteps", None)):
        raise ValueError(f"scheduler must have set_timesteps and step, got {name}: {_TRACE}")
    known = inspect.signature(scheduler.step).parameters
    needed = [each for each, one in known.items() if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    if needed[:1] + needed[2:3] != ["model_output", "sample"] or not set(needed[3:]) <= set(step_kwargs):
        raise ValueError(f"{name} is stepped with {', '.join(needed)}, not model_output, timestep, sample: {_TRACE}")


def _loop(
    network: Callable[..., Any],
    scheduler: Any,
    shape: Sequence[int],
    num_inference_steps: int | None,
    set_timesteps: Mapping[str, Any] | None,
    step_kwargs: Mapping[str, Any] | None,
    **draw: Any,
) -> Tensor:
    """Runs the loop that the pipelines have, with network(x, t)."""
    own = copy.deepcopy(scheduler)
    steps = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
    own.set_timesteps(**steps, **(set_timesteps or {}))
    x = torch.randn(tuple(shape), **draw) * getattr(own, "init_noise_sigma", 1.0)
    for t in own.timesteps:
        scaled = own.scale_model_input(x, t) if hasattr(own, "scale_model_input") else x
        x = own.step(network(scaled, t), t, x, **(step_kwargs or {})).prev_sample
    return x


def sample(
    unet: nn.Module,
    scheduler: Any,
    shape: Sequence[int],
    num_inference_steps: int | None = None,
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    guidance_scale: float | None = None,
    set_timesteps: Mapping[str, Any] | None = None,
    step_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """Draws samples with a network and a scheduler of diffusers, by the noise contract.

    Args:
        unet: a network such as UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel, or any other that is called
            as ``unet(x, t)``. It may return an output object with ``sample``, a tuple or a tensor.
        scheduler: any scheduler that `table` takes. Integer times stay integers.
        shape: ``(B, *shape)`` of the samples; of latents for a latent model.
        num_inference_steps: of the scheduler's ``set_timesteps``.
        model_kwargs: arguments of the network, such as ``class_labels`` or ``encoder_hidden_states``; tensors have the
            batch first.
        uncond_kwargs: those of them that are others without the condition.
        guidance_scale: w of classifier-free guidance, f = f_uncond + w (f_cond - f_uncond), in one call for both.
        set_timesteps: more arguments of the scheduler's ``set_timesteps``.
        step_kwargs: arguments of the scheduler's ``step``, such as ``{"eta": 0.5}``.
        options: seed, first_sample, keys, progress, dtype, device, backend, compile and max_batch, as for
            `fastsde.sample`.

    Returns:
        The samples ``[B, *shape]`` as the scheduler's last step gives them.

    Raises:
        TraceError: if no table can follow the scheduler, as for `table`.
        ValueError, TypeError: for an invalid argument.
    """
    shape = check_shape("shape", shape)
    _check_step(scheduler, step_kwargs or {})
    is_guided, w, given = guidance_scale is not None, 1.0, dict(model_kwargs or {})
    if is_guided != (uncond_kwargs is not None):
        raise ValueError("guidance_scale and uncond_kwargs must be given together")
    if uncond_kwargs is not None:
        w = check_number("guidance_scale", guidance_scale)
        if not set(uncond_kwargs) <= set(given):
            raise ValueError(f"uncond_kwargs must replace model_kwargs {sorted(given)}, got {sorted(uncond_kwargs)}")
        given = {name: tree_map(_joined, uncond_kwargs.get(name, value), value) for name, value in given.items()}
    by_name = "timestep" in inspect.signature(type(unet).forward).parameters
    own, device = dtype_of(unet), device_of(unet)
    dtype = torch.float64 if torch.float64 in (own, options.get("dtype")) else torch.float32

    def sampling(network: nn.Module) -> Tensor:
        def predict(x: Tensor, t: Any) -> Tensor:
            x_in = (torch.cat([x, x]) if is_guided else x).to(own)
            times = torch.as_tensor(t, device=x.device).expand(len(x_in))
            found = network(x_in, timestep=times, **given) if by_name else network(x_in, times, **given)
            f: Any = getattr(found, "sample", found[0] if isinstance(found, tuple) else found)
            if is_guided:
                uncond, cond = f.chunk(2)
                f = uncond + w * (cond - uncond)
            result: Tensor = f.to(x.dtype)
            return result

        times = (num_inference_steps, set_timesteps, step_kwargs)
        return _loop(predict, scheduler, shape, *times, device=device, dtype=dtype)

    traced = Traced(record(sampling, unet, network="network"), type(scheduler).__name__)
    result: Tensor = traced(unet, shape[0], **options)
    return result


def _joined(uncond: Any, cond: Any) -> Any:
    return torch.cat([uncond, cond]) if isinstance(cond, Tensor) else cond
