"""Norms, means and variances as instructions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .builder import Builder
from .elementwise import Rule
from .program import Part
from .recording import NotLowered, Operation, Value

__all__ = ["RULES"]


def _layer_norm(builder: Builder, operation: Operation) -> None:
    (x, shape, weight, bias, epsilon), _ = operation.arguments()
    groups = x.tensor.numel() // builder.batch // math.prod(shape)
    _norm(builder, operation, "layer_norm", groups, epsilon, weight, bias, lambda own: _repeated(own, groups))


def _rms_norm(builder: Builder, operation: Operation) -> None:
    (x, shape, weight, epsilon), _ = operation.arguments()
    groups = x.tensor.numel() // builder.batch // math.prod(shape)
    epsilon = torch.finfo(torch.float32).eps if epsilon is None else epsilon
    _norm(builder, operation, "rms_norm", groups, epsilon, weight, None, lambda own: _repeated(own, groups))


def _repeated(own: Tensor, groups: int) -> Tensor:
    """Returns a norm's weights for all groups; those of one group are looked at, not copied."""
    return own.reshape(-1) if groups == 1 else own.reshape(-1).repeat(groups)


def _group_norm(builder: Builder, operation: Operation) -> None:
    (_, weight, bias, _, _, size, groups, epsilon), _ = operation.arguments()
    _norm(
        builder,
        operation,
        "layer_norm",
        groups,
        epsilon,
        weight,
        bias,
        lambda own: own if size == 1 else own.repeat_interleave(size),
    )


def _norm(
    builder: Builder,
    operation: Operation,
    kind: str,
    groups: int,
    epsilon: float,
    weight: Value | None,
    bias: Value | None,
    spread: Callable[[Tensor], Tensor],
) -> None:
    codes = builder.codes_of(operation.inputs[0])
    part = builder.run_of_units(codes)
    out = builder.new(part.width)
    builder.emit(kind, out, part.width, part, groups=groups, parameters=(epsilon,))
    found = Part(out, 0, part.width)
    for name, each in (("multiply", weight), ("add", bias)):
        if each is not None:
            builder.recorder.uses(operation, each)
            with builder.recorder:
                numbers = spread(each.tensor)
            found = builder.made(name, found, builder.vector_of(numbers))
    order = torch.arange(codes.numel(), device="cpu").reshape(builder.batch, -1)
    builder.finish(operation, found, order)


def _batch_norm(builder: Builder, operation: Operation) -> None:
    """Batch norm with its running statistics: a factor and a shift per channel."""
    (x, weight, bias, mean, variance, *flags), _ = operation.arguments()
    if operation.name == "native_batch_norm" and flags[0]:
        raise NotLowered("it mixes samples")
    for each in (weight, bias, mean, variance):
        if each is not None:
            builder.recorder.uses(operation, each)
    size = x.tensor.numel() // builder.batch // len(mean.tensor)
    with builder.recorder:
        factor = torch.rsqrt(variance.tensor + flags[-1])
        factor = factor if weight is None else factor * weight.tensor
        shift = -mean.tensor * factor
        shift = shift if bias is None else shift + bias.tensor
        factor, shift = factor.repeat_interleave(size), shift.repeat_interleave(size)
    positions, (numbers,) = builder.per_sample(builder.codes_of(x))
    part = builder.made("multiply", builder.part(numbers), builder.vector_of(factor))
    part = builder.made("add", part, builder.vector_of(shift))
    builder.finish(operation, part, positions)


def _mean(builder: Builder, operation: Operation) -> None:
    (x, *given), kwargs = operation.arguments()
    part, shape = _reduced(builder, x, given[0] if given else None)
    if kwargs.get("dtype") not in (None, torch.float32):
        raise NotLowered(f"it computes in {kwargs['dtype']}")
    if operation.name == "sum":
        part = builder.made("affine", part, None, float(x.tensor.numel() // math.prod(shape)), 0.0)
    _set_reduced(builder, operation.outputs[0], part, shape)


def _variance(builder: Builder, operation: Operation) -> None:
    """var and var_mean."""
    (x, *given), kwargs = operation.arguments()
    mean, shape = _reduced(builder, x, given[0] if given else None)
    count = x.tensor.numel() // math.prod(shape)
    own = builder.elements.base(mean.value, builder.widths[mean.value]) + torch.arange(mean.width, device="cpu")
    spread = builder.part(own.repeat_interleave(count))
    codes = _reduced_last(builder, x, given[0] if given else None).reshape(builder.batch, -1)
    off = builder.made("subtract", builder.part(builder.by_row(codes)), spread)
    square = builder.made("multiply", off, off)
    out = builder.new(mean.width)
    builder.emit("mean", out, square.width, square, groups=mean.width)
    correction = kwargs.get("correction")
    factor = count / (count - (1 if correction is None else correction))
    variance = builder.made("affine", Part(out, 0, mean.width), None, factor, 0.0)
    _set_reduced(builder, operation.outputs[0], variance, shape)
    if len(operation.outputs) > 1:
        _set_reduced(builder, operation.outputs[1], mean, shape)


def _reduced_last(builder: Builder, x: Value, dims: Sequence[int] | None) -> Tensor:
    """Returns codes ``[batch, groups, units]`` with the dimensions that are reduced flattened at the end."""
    codes = builder.codes_of(x)
    last = sorted(dim % codes.ndim for dim in dims or range(codes.ndim))
    kept = [dim for dim in range(codes.ndim) if dim not in last]
    if not kept or codes.shape[kept[0]] != builder.batch:
        raise NotLowered("it mixes samples")
    groups = math.prod(codes.shape[dim] for dim in kept[1:])
    return codes.permute(*kept, *last).reshape(builder.batch, groups, -1)


def _reduced(builder: Builder, x: Value, dims: Sequence[int] | None) -> tuple[Part, tuple[int, ...]]:
    """Returns the means over some dimensions, and the shape ``[batch, groups]`` of them."""
    codes = _reduced_last(builder, x, dims)
    part = builder.run_of_units(codes)
    out = builder.new(codes.shape[1])
    builder.emit("mean", out, part.width, part, groups=codes.shape[1])
    return Part(out, 0, codes.shape[1]), tuple(codes.shape[:2])


def _set_reduced(builder: Builder, output: Value | None, part: Part, shape: Sequence[int]) -> None:
    assert output is not None
    order = torch.arange(math.prod(shape), device="cpu").reshape(builder.batch, -1)
    builder.set(output, builder.result(part, order, output.tensor.shape))


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("mean", "sum"), _mean),
    **dict.fromkeys(("var", "var_mean"), _variance),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "native_batch_norm"), _batch_norm),
    "_fused_rms_norm": _rms_norm,
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
}
