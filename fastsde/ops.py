"""The operations of `fastsde.reference`, with their arguments checked and sent to the fastest code that can run them.

That is a Triton kernel for an fp32 state on a CUDA GPU (or on the CPU while Triton's interpreter is on), and the
reference everywhere else: without Triton, in float64, and where a gradient is wanted that a kernel does not have.
`perturb` and `dsm_loss` are ``torch.library`` operations to ``torch.compile``, which takes them whole.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import noise, reference
from .models.mlp import MLP, ConcatTime, linear_layers
from .reference import WEIGHTINGS, non_finite
from .sde import VPSDE
from .solvers import PREDICTIONS, StepTable
from .validation import check_instance, check_int, check_keys, check_number, check_tensor

__all__ = [
    "check_status",
    "counted_step",
    "device_table",
    "dsm_loss",
    "fused_step",
    "has_kernels",
    "launch_mlp_sampler",
    "mlp_sampler",
    "new_status",
    "normal",
    "pack_mlp",
    "perturb",
    "solver_step",
    "step_counter",
]

_MAX_STEP = 2**28
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device: a GPU of capability 8.0 up, or the CPU under TRITON_INTERPRET."""
    if not _HAS_TRITON:
        return False
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


# The step of a solver -----------------------------------------------------------------------------------------------

_device_tables: WeakKeyDictionary[StepTable, dict[torch.device, Tensor]] = WeakKeyDictionary()


def device_table(table: StepTable, device: torch.device) -> Tensor:
    """The table as the kernels read it, fp32 ``[K, 8]`` on the device; made once."""
    copies = _device_tables.setdefault(table, {})
    if device not in copies:
        columns = torch.stack([getattr(table, name) for name in StepTable.columns()], dim=1)
        copies[device] = columns.to(device, torch.float32)
    return copies[device]


def fused_step(
    x: Tensor,
    f: Tensor,
    table: StepTable,
    row: int,
    *,
    history: Tensor | None = None,
    z: Tensor | None = None,
    keys: Tensor | None = None,
    f_uncond: Tensor | None = None,
    guidance: float | None = None,
    store_data: bool = True,
    status: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`solver_step` by the Triton kernel, for an fp32 state where `has_kernels` holds. Arguments are trusted.

    Args:
        store_data: whether D is stored and returned.
        status: a `new_status`, which the kernel notes in what is not finite.
        out: where x' goes: contiguous, and possibly ``x`` itself.
    """
    from .kernels import solver_step as kernel

    k = table.row(row)
    x, f, f_uncond = _contiguous(x, f, f_uncond)
    history, z, keys = _contiguous(history if k["c"] else None, z if k["d"] else None, keys if k["d"] else None)
    out = torch.empty_like(x) if out is None else out
    data = torch.empty_like(x) if store_data else None
    kernel.solver_step(
        x,
        f,
        device_table(table, x.device),
        row,
        history=history,
        z=z,
        keys=keys,
        f_uncond=f_uncond,
        guidance=guidance,
        clip=table.clip,
        uses_data=k["e"] != 0,
        status=status,
        out=out,
        data=data,
    )
    return out, data


def counted_step(
    x: Tensor,
    f: Tensor,
    rows: Tensor,
    counter: Tensor,
    *,
    time: Tensor,
    status: Tensor,
    history: Tensor | None,
    keys: Tensor | None,
    f_uncond: Tensor | None,
    guidance: float | None,
    clip: float | None,
    uses_data: bool,
) -> None:
    """`fused_step` in place, of the row that a counter on the device stands at: the same launch for every row.

    Args:
        rows: a `device_table`.
        counter: a `step_counter`, moved on by one.
        time: fp32 ``[B]``, set to the time of the next row.
        status: a `new_status`.
        history, keys: None where no row of the table has c, or d.
        uses_data: whether a row has e.
    """
    from .kernels import solver_step as kernel

    f, f_uncond = _contiguous(f, f_uncond)
    given = {"history": history, "keys": keys, "f_uncond": f_uncond, "guidance": guidance}
    kernel.solver_step(
        x,
        f,
        rows,
        0,
        clip=clip,
        uses_data=uses_data,
        counter=counter,
        time=time,
        status=status,
        out=x,
        data=history,
        **given,
    )


def step_counter(batch: int, size: int, device: torch.device) -> Tensor:
    """A counter for `counted_step` on samples of ``size`` elements, at row 0."""
    from .kernels import solver_step as kernel

    return torch.zeros(kernel.counter_slots(batch, size), dtype=torch.int64, device=device)


def new_status(device: torch.device) -> Tensor:
    """What the step notes in that the state or the network's output is not finite: int32 ``[1]``."""
    from .kernels import solver_step as kernel

    return torch.full((1,), kernel.FINITE, dtype=torch.int32, device=device)


def check_status(status: Tensor, table: StepTable) -> None:
    """Waits for the device and raises `NonFiniteError` for the first row with a value that was not finite."""
    from .kernels import solver_step as kernel

    value = int(status)
    if value != kernel.FINITE:
        row, kind = divmod(value, 2)
        raise non_finite(kernel.STATUS_KINDS[kind], row, float(table.time[row]))


def normal(keys: Tensor, step: int, shape: Sequence[int], stream: int = noise.STREAM_SAMPLING) -> Tensor:
    """`fastsde.noise.normal` of one step: one launch where the kernel runs."""
    if not has_kernels(keys.device):
        return noise.normal(keys, step, shape, stream)
    from .kernels import normal as kernel

    out = torch.empty((len(keys), *shape), device=keys.device)
    kernel.normal(keys.contiguous(), step, stream, out)
    return out


def solver_step(
    x: Tensor,
    f: Tensor,
    table: StepTable,
    row: int,
    *,
    history: Tensor | None = None,
    z: Tensor | None = None,
    keys: Tensor | None = None,
    f_uncond: Tensor | None = None,
    guidance: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastsde.reference.solver_step` for x fp32 or float64 and f of any floating-point dtype.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    check_tensor("x", x, floating=True)
    if x.ndim < 1 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64 [B, *shape], got {x.dtype} {list(x.shape)}")
    check_instance("table", table, StepTable)
    check_int("row", row, 0, len(table))
    check_tensor("f", f, shape=x.shape, device=x.device, floating=True)
    options: dict[str, Any] = {"history": history, "z": z, "f_uncond": f_uncond}
    for name, value in options.items():
        if value is not None:
            options[name] = check_tensor(name, value, shape=x.shape, device=x.device, floating=True).to(x.dtype)
    if z is None and table.d[row] != 0:
        if keys is None:
            raise ValueError(f"z or keys must be given for row {row}, where d is {table.d[row]:g}, got neither")
        keys = check_keys(keys, len(x), x.device)
    if history is None and table.c[row] != 0:
        raise ValueError(f"history must be given for row {row}, where c is {table.c[row]:g}, got None")
    if (f_uncond is None) != (guidance is None):
        raise ValueError("f_uncond and guidance go together: give both or neither")
    if guidance is not None:
        check_number("guidance", guidance)
    if x.dtype == torch.float32 and has_kernels(x.device) and not _needs_grad(x, f, *options.values()):
        x_next, data = fused_step(x, f, table, row, keys=keys, guidance=guidance, **options)
        assert data is not None
        return x_next, data
    return reference.solver_step(x, f, table, row, keys=keys, guidance=guidance, **options)


# Posterior noising and the loss -------------------------------------------------------------------------------------


def _check_data(
    x_0: Tensor,
    keys: Tensor | None,
    step: int,
    sde: VPSDE,
    index: Tensor | None,
    t: Tensor | None,
    z: Tensor | None,
    counter: Tensor | None,
) -> None:
    check_tensor("x_0", x_0)
    if x_0.ndim < 1 or not (x_0.is_floating_point() or x_0.dtype == torch.uint8):
        raise ValueError(f"x_0 must be uint8 or floating-point [B, *shape], got {x_0.dtype} {list(x_0.shape)}")
    check_int("step", step, 0, _MAX_STEP)
    check_instance("sde", sde, VPSDE)
    n = len(x_0)
    if index is not None:
        check_tensor("index", index, device=x_0.device)
        if index.dtype != torch.int64 or index.ndim != 1:
            raise ValueError(f"index must be int64 [B], got {index.dtype} {list(index.shape)}")
        # A check of values would wait for a GPU, and cut the graph of torch.compile or CUDA: a kernel then gives NaN.
        waits = index.device.type != "cpu" or torch.compiler.is_compiling() or counter is not None
        checks = len(index) and not waits
        if checks and not (index.min() >= 0 and index.max() < n):
            raise ValueError(f"index must be in [0, {n}), got {index.min()} .. {index.max()}")
        n = len(index)
    if t is not None:
        check_tensor("t", t, shape=(n,), device=x_0.device, floating=True)
    if z is not None:
        check_tensor("z", z, shape=(n, *x_0.shape[1:]), device=x_0.device, floating=True)
    if keys is not None:
        check_keys(keys, n, x_0.device)
    elif t is None or z is None:
        raise ValueError("keys must be given unless t and z both are, got None")


def _kernel_takes(x_0: Tensor, t: Tensor | None, z: Tensor | None) -> bool:
    """Whether the training kernels run on these: their arithmetic is that of the reference for uint8 and fp32 alone."""
    dtypes = [each.dtype for each in (t, z) if each is not None]
    if x_0.dtype not in (torch.uint8, torch.float32) or any(dtype != torch.float32 for dtype in dtypes):
        return False
    return has_kernels(x_0.device) and not _needs_grad(x_0, t, z)


def _refuse_counter(counter: Tensor | None) -> None:
    if counter is not None:
        raise ValueError("counter must be None where the kernel does not run (fp32 or uint8 data on a CUDA GPU)")


def perturb(
    x_0: Tensor,
    keys: Tensor | None,
    step: int,
    sde: VPSDE,
    *,
    index: Tensor | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    t: Tensor | None = None,
    z: Tensor | None = None,
    t_min: float = 1e-4,
    dtype: torch.dtype | None = None,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastsde.reference.perturb`. Raises as `solver_step` does.

    Args:
        counter: int64, one element on the device, that is added to the step where the kernel runs, and only there.
    """
    _check_data(x_0, keys, step, sde, index, t, z, counter)
    check_number("scale", scale), check_number("shift", shift)
    check_number("t_min", t_min, "in (0, 1)", lambda t: 0 < t < 1)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    if dtype != torch.float64 and _kernel_takes(x_0, t, z):
        dtype = torch.float32 if dtype is None else dtype
        numbers = (sde.beta_min, sde.beta_max, float(scale), float(shift), t_min)
        given = (x_0, keys, index, t, z, counter)
        result: tuple[Tensor, Tensor] = torch.ops.fastsde.perturb(*given, step, *numbers, dtype)
        return result
    _refuse_counter(counter)
    return reference.perturb(
        x_0, keys, step, sde, index=index, scale=scale, shift=shift, t=t, z=z, t_min=t_min, dtype=dtype
    )


def dsm_loss(
    f: Tensor,
    x_0: Tensor,
    t: Tensor,
    keys: Tensor | None,
    step: int,
    sde: VPSDE,
    *,
    index: Tensor | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    z: Tensor | None = None,
    prediction: str = "score",
    weighting: str = "sigma2",
    counter: Tensor | None = None,
) -> Tensor:
    """`fastsde.reference.dsm_loss`, with a ``counter`` as for `perturb`. The kernel has a first derivative alone.

    Raises as `solver_step` does.
    """
    _check_data(x_0, keys, step, sde, index, check_tensor("t", t), z, counter)
    check_number("scale", scale), check_number("shift", shift)
    for name, value, choices in (("prediction", prediction, PREDICTIONS), ("weighting", weighting, WEIGHTINGS)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    check_tensor("f", f, shape=(len(t), *x_0.shape[1:]), device=x_0.device, floating=True)
    if f.dtype != torch.float64 and f.numel() and _kernel_takes(x_0, t, z):
        numbers = (sde.beta_min, sde.beta_max, float(scale), float(shift))
        given = (f, x_0, t, keys, index, z, counter)
        loss: Tensor = torch.ops.fastsde.dsm_loss(*given, step, *numbers, prediction, weighting)
        return loss
    _refuse_counter(counter)
    return reference.dsm_loss(
        f,
        x_0,
        t,
        keys,
        step,
        sde,
        index=index,
        scale=scale,
        shift=shift,
        z=z,
        prediction=prediction,
        weighting=weighting,
    )


# Whole trajectories of an MLP ---------------------------------------------------------------------------------------

PRECISIONS = ("fp32", "tf32", "bf16")
MAX_MLP_DIM, MAX_MLP_WIDTH = 64, 256  # that the kernel takes


def pack_mlp(linears: Sequence[nn.Linear], activations: Sequence[str], dtype: torch.dtype) -> Any:
    """The layers of an MLP (`fastsde.models.mlp.linear_layers`) as `launch_mlp_sampler` takes them."""
    from .kernels.mlp_sampler import Packed

    packed = Packed([(linear.weight, linear.bias) for linear in linears], activations, dtype)
    if linears[0].weight.is_cuda:
        torch.cuda.current_stream(linears[0].weight.device).synchronize()  # another stream may be the first to read it
    return packed


def launch_mlp_sampler(
    packed: Any,
    table: StepTable,
    keys: Tensor,
    *,
    x_init: Tensor | None = None,
    precision: str = "fp32",
    every: int = 1,
    states: Tensor | None = None,
) -> Tensor:
    """`mlp_sampler` by the Triton kernel, for an MLP that is packed. Arguments are trusted.

    Args:
        states: contiguous fp32 ``[K // every + 1, B, d]`` that the states go to, or None.
    """
    from .kernels import mlp_sampler as kernel

    out = torch.empty((len(keys), packed.dim), device=keys.device)
    x_init, keys = _contiguous(x_init, keys)
    kernel.mlp_sampler(
        packed,
        device_table(table, out.device),
        keys,
        x_init=x_init,
        clip=table.clip,
        has_noise=bool((table.d != 0).any()),
        has_history=bool((table.c != 0).any()),
        uses_data=bool((table.e != 0).any()),
        precision=precision,
        every=every,
        states=states,
        out=out,
    )
    return out


def mlp_sampler(
    model: nn.Module,
    table: StepTable,
    keys: Tensor,
    *,
    x_init: Tensor | None = None,
    precision: str = "fp32",
    every: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """All rows of a table for an MLP of x and t: by one launch where the kernel runs, else `fastsde.reference.sample`.

    Args:
        model: an ``nn.Sequential`` of Linear layers and activations (LogSigmoid, SiLU, ReLU, Tanh, GELU, Softplus) that
            is fed with ``cat((x, t), -1)``, or a `fastsde.models.MLP` or `ConcatTime`. Its weights are fp32.
        keys: int64 ``[B, 2]``.
        x_init: fp32 ``[B, d]`` instead of a draw from the prior.
        precision: of the kernel's products: "fp32", "tf32" or "bf16". The reference's are fp32.
        every: m, to return the states after 0, m, 2m, ... rows too.

    Returns:
        The samples fp32 ``[B, d]``; with ``every`` a pair of them and the states ``[K // every + 1, B, d]``.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    layers = linear_layers(model)
    if layers is None:
        raise TypeError(f"model must be an MLP: a Sequential of Linear layers and activations, got {model!r}")
    check_instance("table", table, StepTable)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    linears, activations = layers
    weight, dim, widths = linears[0].weight, linears[-1].out_features, [linear.out_features for linear in linears]
    if linears[0].in_features != dim + 1:
        raise ValueError(f"model must take its {dim} outputs and the time, {dim + 1} inputs: {linears[0].in_features}")
    check_tensor("the model's weights", weight, floating=True)
    if weight.dtype != torch.float32:
        raise TypeError(f"the model's weights must be torch.float32, got {weight.dtype}")
    keys = check_keys(keys, len(check_tensor("keys", keys)), weight.device)
    if x_init is not None:
        check_tensor("x_init", x_init, shape=(len(keys), dim), device=weight.device, floating=True)
        x_init = x_init.float()
    count = len(table) // check_int("every", every, 1) + 1 if every is not None else 0
    states = torch.empty((count, len(keys), dim), device=weight.device) if every is not None else None
    with torch.no_grad():
        if has_kernels(weight.device) and dim <= MAX_MLP_DIM and max(widths) <= MAX_MLP_WIDTH:
            packed = pack_mlp(linears, activations, torch.bfloat16 if precision == "bf16" else torch.float32)
            given: dict[str, Any] = {"x_init": x_init, "precision": precision, "every": every or 1, "states": states}
            x = launch_mlp_sampler(packed, table, keys, **given)
        else:
            x = _reference_mlp_sampler(model, table, keys, x_init, dim, every, states)
    return x if states is None else (x, states)


def _reference_mlp_sampler(
    model: nn.Module,
    table: StepTable,
    keys: Tensor,
    x_init: Tensor | None,
    dim: int,
    every: int | None,
    states: Tensor | None,
) -> Tensor:
    network = ConcatTime(model.net if isinstance(model, (MLP, ConcatTime)) else model)
    if states is not None:
        states[0] = noise.normal(keys, 0, (dim,)) if x_init is None else x_init

    def keep(row: int, time: float, x: Tensor) -> None:
        if states is not None and every is not None and (row + 1) % every == 0:
            states[(row + 1) // every] = x

    return reference.sample(network, (len(keys), dim), table, keys, x_init=x_init, after_row=keep)


# What torch.library knows of the kernels ----------------------------------------------------------------------------


@torch.library.custom_op("fastsde::perturb", mutates_args=())
def _perturb(
    x_0: Tensor,
    keys: Tensor | None,
    index: Tensor | None,
    t: Tensor | None,
    z: Tensor | None,
    counter: Tensor | None,
    step: int,
    beta_min: float,
    beta_max: float,
    scale: float,
    shift: float,
    t_min: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from .kernels import perturb as kernel

    x_t, t_out = _perturb_outputs(x_0, index, dtype)
    x_0, keys, index, t, z = _contiguous(x_0, keys, index, t, z)
    given = {"index": index, "scale": scale, "shift": shift, "t": t, "z": z, "t_min": t_min, "counter": counter}
    kernel.perturb(x_0, keys, step, beta_min, beta_max, out=x_t, t_out=t_out, **given)
    return x_t, t_out


def _perturb_outputs(x_0: Tensor, index: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n = len(x_0) if index is None else len(index)
    return x_0.new_empty((n, *x_0.shape[1:]), dtype=dtype), x_0.new_empty((n,), dtype=torch.float32)


@_perturb.register_fake
def _(x_0: Tensor, keys: Any, index: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return _perturb_outputs(x_0, index, rest[-1])


@torch.library.custom_op("fastsde::dsm_loss", mutates_args=())
def _dsm_loss(
    f: Tensor,
    x_0: Tensor,
    t: Tensor,
    keys: Tensor | None,
    index: Tensor | None,
    z: Tensor | None,
    counter: Tensor | None,
    step: int,
    beta_min: float,
    beta_max: float,
    scale: float,
    shift: float,
    prediction: str,
    weighting: str,
) -> Tensor:
    out = f.new_empty((), dtype=torch.float32)
    numbers = (beta_min, beta_max, scale, shift)
    return _launch_dsm_loss(None, out, f, x_0, t, keys, index, z, counter, step, *numbers, prediction, weighting)


@torch.library.custom_op("fastsde::dsm_loss_backward", mutates_args=())
def _dsm_loss_backward(
    grad: Tensor,
    f: Tensor,
    x_0: Tensor,
    t: Tensor,
    keys: Tensor | None,
    index: Tensor | None,
    z: Tensor | None,
    counter: Tensor | None,
    step: int,
    beta_min: float,
    beta_max: float,
    scale: float,
    shift: float,
    prediction: str,
    weighting: str,
) -> Tensor:
    out = torch.empty_like(f, memory_format=torch.contiguous_format)
    numbers = (beta_min, beta_max, scale, shift)
    return _launch_dsm_loss(grad, out, f, x_0, t, keys, index, z, counter, step, *numbers, prediction, weighting)


def _launch_dsm_loss(
    grad: Tensor | None,
    out: Tensor,
    f: Tensor,
    x_0: Tensor,
    t: Tensor,
    keys: Tensor | None,
    index: Tensor | None,
    z: Tensor | None,
    counter: Tensor | None,
    step: int,
    beta_min: float,
    beta_max: float,
    scale: float,
    shift: float,
    prediction: str,
    weighting: str,
) -> Tensor:
    from .kernels import dsm_loss as kernel

    grad, f, x_0, t, keys, index, z = _contiguous(grad, f, x_0, t, keys, index, z)
    given = {"index": index, "scale": scale, "shift": shift, "z": z, "prediction": prediction, "weighting": weighting}
    given["counter"] = counter
    kernel.dsm_loss(f, x_0, t, keys, step, beta_min, beta_max, grad=grad, out=out, **given)
    return out


@_dsm_loss.register_fake
def _(f: Tensor, *rest: Any) -> Tensor:
    return f.new_empty((), dtype=torch.float32)


@_dsm_loss_backward.register_fake
def _(grad: Tensor, f: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(f, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.rest = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.fastsde.dsm_loss_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (gradient, *[None] * (6 + len(ctx.rest)))


_dsm_loss.register_autograd(_backward, setup_context=_save_for_backward)
