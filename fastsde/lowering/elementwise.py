"""Elementwise operations as instructions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from .builder import Builder
from .elements import coded
from .program import Part, Vector
from .recording import NotLowered, Operation, Value

__all__ = ["RULES", "Rule"]

Rule = Callable[[Builder, Operation], None]

_FUNCTIONS = {
    "abs": "abs",
    "cos": "cos",
    "erf": "erf",
    "exp": "exp",
    "log_sigmoid_forward": "LogSigmoid",
    "mish": "Mish",
    "reciprocal": "reciprocal",
    "relu": "ReLU",
    "rsqrt": "rsqrt",
    "sigmoid": "Sigmoid",
    "silu": "SiLU",
    "sin": "Sin",
    "sqrt": "sqrt",
    "tanh": "Tanh",
}
_POWERS = {-1.0: "reciprocal", -0.5: "rsqrt", 0.5: "sqrt", 1.0: "Identity"}


def _unary(builder: Builder, operation: Operation, *parameters: float, kind: str) -> None:
    """An elementwise function. Elements that are known ahead, as in a concatenation with a constant, stay so."""
    positions, (numbers,) = builder.per_sample(builder.codes_of(operation.inputs[0]))
    ahead = builder.are_ahead(numbers)
    if not bool(ahead.any()) or bool(ahead.all()):
        part = builder.made(kind, builder.part(numbers), None, *parameters)
        return builder.finish(operation, part, positions)
    part = builder.made(kind, builder.part(numbers[~ahead]), None, *parameters)
    runs = builder.elements.runs(numbers[ahead])
    with builder.recorder:
        known = torch.cat([builder.gathered(run) for run in runs])
        (_, *others), kwargs = operation.arguments()
        found, *_ = tree_flatten(operation.function(known, *others, **kwargs))[0]
    output = operation.outputs[0]
    assert output is not None
    codes = builder.result(part, positions[:, ~ahead], output.tensor.shape)
    value = builder.recorder.value_of(found)
    codes.reshape(-1)[positions[:, ahead]] = coded(builder.elements.base(value, len(found)), found.shape)
    return builder.set(output, codes)


def _binary(builder: Builder, operation: Operation) -> None:
    """add, sub, rsub, mul and div of tensors or numbers."""
    (a, b, *_), kwargs = operation.arguments()
    kind, alpha = operation.name, float(kwargs.get("alpha", 1))
    if kwargs.get("rounding_mode") is not None:
        raise NotLowered(f"it rounds ({kwargs['rounding_mode']})")
    if kind == "rsub":
        a, b, kind = b, a, "sub"
    output = operation.outputs[0]
    assert output is not None
    _combine(builder, output, kind, a, b, alpha)


def _combine(builder: Builder, output: Value, kind: str, a: Any, b: Any, alpha: float = 1.0) -> None:
    """Sets ``output`` to a + alpha b, a - alpha b, a b or a / b, of values or numbers."""
    shape = output.tensor.shape
    operands = [x if isinstance(x, Value) else None for x in (a, b)]
    codes = [builder.codes_of(x).expand(shape) for x in operands if x is not None]
    positions, found = builder.per_sample(*codes)
    first, second = (
        float(x) if each is None else builder.operand(found.pop(0)) for x, each in zip((a, b), operands, strict=True)
    )
    builder.set(output, builder.result(_combined(builder, kind, first, second, alpha), positions, shape))


def _combined(builder: Builder, kind: str, a: Any, b: Any, alpha: float = 1.0) -> Part:
    if kind in ("add", "sub") and alpha != 1:
        b = alpha * b if isinstance(b, float) else builder.made("affine", builder.as_part(b), None, alpha, 0.0)
    if isinstance(a, Vector) and isinstance(b, Vector):  # both follow the row: one of them becomes a value
        a = builder.as_part(a)
    if isinstance(b, float):
        factor, shift = {"add": (1.0, b), "sub": (1.0, -b), "mul": (b, 0.0), "div": (1 / b if b else math.inf, 0.0)}[
            kind
        ]
        if kind == "div" and not b:
            raise NotLowered("it divides by zero")
        return builder.made("affine", a, None, factor, shift)
    if isinstance(a, float):
        if kind in ("add", "mul"):
            return _combined(builder, kind, b, a)
        if kind == "sub":
            return builder.made("affine", b, None, -1.0, a)
        return builder.made("affine", builder.made("reciprocal", b), None, a, 0.0)
    if isinstance(a, Vector):
        if kind == "sub":
            b = builder.made("affine", b, None, -1.0, 0.0)
        elif kind == "div":
            b = builder.made("reciprocal", b)
        return builder.made("multiply" if kind in ("mul", "div") else "add", b, a)
    names = {"add": "add", "sub": "subtract", "mul": "multiply", "div": "divide"}
    return builder.made(names[kind], a, b)


def _power(builder: Builder, operation: Operation) -> None:
    (x, exponent), _ = operation.arguments()
    exponent = exponent if isinstance(exponent, (int, float)) else math.nan
    if exponent in _POWERS:
        return _unary(builder, operation, kind=_POWERS[exponent])
    if exponent not in (2, 3, 4):
        raise NotLowered(f"it raises to the power {exponent}" if exponent == exponent else "its exponent is a tensor")
    positions, (numbers,) = builder.per_sample(builder.codes_of(x))
    part = builder.part(numbers)
    found = builder.made("multiply", part, part)
    if exponent > 2:
        found = builder.made("multiply", found, part if exponent == 3 else found)
    return builder.finish(operation, found, positions)


def _square(builder: Builder, operation: Operation) -> None:
    positions, (numbers,) = builder.per_sample(builder.codes_of(operation.inputs[0]))
    part = builder.part(numbers)
    builder.finish(operation, builder.made("multiply", part, part), positions)


def _negative(builder: Builder, operation: Operation) -> None:
    _unary(builder, operation, -1.0, 0.0, kind="affine")


def _gelu(builder: Builder, operation: Operation) -> None:
    _, kwargs = operation.arguments()
    _unary(builder, operation, kind="GELU_tanh" if kwargs.get("approximate") == "tanh" else "GELU")


def _leaky_relu(builder: Builder, operation: Operation) -> None:
    (_, *slope), _ = operation.arguments()
    _unary(builder, operation, *(slope or (0.01,)), kind="LeakyReLU")


def _elu(builder: Builder, operation: Operation) -> None:
    (_, *given), _ = operation.arguments()
    alpha, scale, input_scale = (*given, 1.0, 1.0, 1.0)[:3]
    x = operation.inputs[0]
    positions, (numbers,) = builder.per_sample(builder.codes_of(x))
    part = builder.part(numbers)
    if input_scale != 1:
        raise NotLowered("its input is scaled")
    part = builder.made("ELU", part, None, alpha)
    if scale != 1:
        part = builder.made("affine", part, None, scale, 0.0)
    builder.finish(operation, part, positions)


def _softplus(builder: Builder, operation: Operation) -> None:
    (x, *given), _ = operation.arguments()
    beta, threshold = (given + [1.0, 20.0][len(given) :])[:2]
    if threshold < 20:
        raise NotLowered(f"it is linear from {threshold} on")
    positions, (numbers,) = builder.per_sample(builder.codes_of(x))
    part = builder.part(numbers)
    if beta != 1:
        part = builder.made("affine", part, None, beta, 0.0)
    part = builder.made("Softplus", part)
    if beta != 1:
        part = builder.made("affine", part, None, 1 / beta, 0.0)
    builder.finish(operation, part, positions)


def _clamp(builder: Builder, operation: Operation) -> None:
    (_, *given), kwargs = operation.arguments()
    if operation.name == "clamp_min":
        given = [given[0] if given else kwargs["min"], None]
    elif operation.name == "clamp_max":
        given = [None, given[0] if given else kwargs["max"]]
    low, high = (*given, *(kwargs.get("min"), kwargs.get("max"))[len(given) :])[:2]
    if isinstance(low, Value) or isinstance(high, Value):
        raise NotLowered("its bounds are tensors")
    _unary(builder, operation, -math.inf if low is None else low, math.inf if high is None else high, kind="clamp")


def _addcmul(builder: Builder, operation: Operation) -> None:
    """out = x + value a b."""
    (x, a, b), kwargs = operation.arguments()
    shape = operation.outputs[0].tensor.shape  # type: ignore[union-attr]
    positions, found = builder.per_sample(*(builder.codes_of(each).expand(shape) for each in (x, a, b)))
    base, first, second = (builder.operand(numbers) for numbers in found)
    product = _combined(builder, "mul", first, second)
    builder.finish(operation, _combined(builder, "add", base, product, float(kwargs.get("value", 1))), positions)


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div"), _binary),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "hardtanh"), _clamp),
    **{name: partial(_unary, kind=kind) for name, kind in _FUNCTIONS.items()},
    "addcmul": _addcmul,
    "elu": _elu,
    "gelu": _gelu,
    "leaky_relu": _leaky_relu,
    "neg": _negative,
    "pow": _power,
    "softplus": _softplus,
    "square": _square,
}
