"""What each of PyTorch's operations becomes in a program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .builder import Builder
from .elements import coded
from .program import Part, Vector
from .recording import Needs, NotLowered, Operation, Value

__all__ = ["lower_operation"]

Rule = Callable[[Builder, Operation], None]

# Operations that move elements and do not compute.
_MOVES = """
    _reshape_alias _unsafe_view alias as_strided cat clone contiguous copy detach diagonal expand expand_as flip
    index index_select lift_fresh movedim narrow permute repeat reshape roll select slice split split_with_sizes
    squeeze stack t transpose unbind unfold unsqueeze unsafe_split view view_as _to_copy to unsafe_chunk
    """.split()  # noqa: SIM905
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


def lower_operation(builder: Builder, operation: Operation) -> None:
    """Adds to a program what an operation computes.

    Raises:
        NotLowered: if a program cannot compute it.
    """
    name = operation.name
    builder.at = operation
    try:
        if name not in _MOVES and name not in _FUNCTIONS and name not in _RULES:
            raise NotLowered("a program has no such operation")
        for output in operation.outputs:
            if output is not None and output.tensor.dtype != torch.float32:
                raise NotLowered(f"it computes in {output.tensor.dtype}")
        if name in _MOVES:
            _move(builder, operation)
        elif name in _FUNCTIONS:
            _unary(builder, operation, _FUNCTIONS[name])
        else:
            _RULES[name](builder, operation)
    except NotLowered as error:
        raise NotLowered(f"{name}: {error}", operation.module) from None


def _move(builder: Builder, operation: Operation) -> None:
    """Runs an operation on the codes of its arguments."""
    if operation.writes:
        raise NotLowered("it works in place")
    leaves: list[Any] = []
    for leaf in operation.leaves:
        if not isinstance(leaf, Value):
            leaves.append(torch.int64 if isinstance(leaf, torch.dtype) else leaf)
        elif leaf.tensor.dtype == torch.int64 and not builder.is_traced(leaf) and operation.name.startswith("index"):
            if builder.recorder.needs(leaf) != Needs.NOTHING:
                raise NotLowered("its index follows the time or a condition")
            builder.recorder.read.append(leaf)
            leaves.append(leaf.tensor.cpu())
        else:
            leaves.append(builder.codes_of(leaf))
    args, kwargs = tree_unflatten(leaves, operation.spec)
    kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    found, _ = tree_flatten(operation.function(*args, **kwargs))
    for output, codes in zip(operation.outputs, found, strict=True):
        assert output is not None
        builder.set(output, codes)


def _unary(builder: Builder, operation: Operation, kind: str, *parameters: float) -> None:
    """An elementwise function. Elements that are known ahead, as in a concatenation with a constant, stay so."""
    positions, (numbers,) = builder.per_sample(builder.codes_of(operation.inputs[0]))
    ahead = builder.are_ahead(numbers)
    if not bool(ahead.any()) or bool(ahead.all()):
        part = builder.made(kind, builder.part(numbers), None, *parameters)
        return _finish(builder, operation, part, positions)
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


def _finish(builder: Builder, operation: Operation, part: Part, positions: Tensor) -> None:
    output = operation.outputs[0]
    assert output is not None
    builder.set(output, builder.result(part, positions, output.tensor.shape))


# Elementwise --------------------------------------------------------------------------------------------------------


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
        return _unary(builder, operation, _POWERS[exponent])
    if exponent not in (2, 3, 4):
        raise NotLowered(f"it raises to the power {exponent}" if exponent == exponent else "its exponent is a tensor")
    positions, (numbers,) = builder.per_sample(builder.codes_of(x))
    part = builder.part(numbers)
    found = builder.made("multiply", part, part)
    if exponent > 2:
        found = builder.made("multiply", found, part if exponent == 3 else found)
    return _finish(builder, operation, found, positions)


def _square(builder: Builder, operation: Operation) -> None:
    positions, (numbers,) = builder.per_sample(builder.codes_of(operation.inputs[0]))
    part = builder.part(numbers)
    _finish(builder, operation, builder.made("multiply", part, part), positions)


def _negative(builder: Builder, operation: Operation) -> None:
    _unary(builder, operation, "affine", -1.0, 0.0)


def _gelu(builder: Builder, operation: Operation) -> None:
    _, kwargs = operation.arguments()
    _unary(builder, operation, "GELU_tanh" if kwargs.get("approximate") == "tanh" else "GELU")


def _leaky_relu(builder: Builder, operation: Operation) -> None:
    (_, *slope), _ = operation.arguments()
    _unary(builder, operation, "LeakyReLU", *(slope or (0.01,)))


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
    _finish(builder, operation, part, positions)


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
    _finish(builder, operation, part, positions)


def _clamp(builder: Builder, operation: Operation) -> None:
    (_, *given), kwargs = operation.arguments()
    if operation.name == "clamp_min":
        given = [given[0] if given else kwargs["min"], None]
    elif operation.name == "clamp_max":
        given = [None, given[0] if given else kwargs["max"]]
    low, high = (*given, *(kwargs.get("min"), kwargs.get("max"))[len(given) :])[:2]
    if isinstance(low, Value) or isinstance(high, Value):
        raise NotLowered("its bounds are tensors")
    _unary(builder, operation, "clamp", -math.inf if low is None else low, math.inf if high is None else high)


def _addcmul(builder: Builder, operation: Operation) -> None:
    """out = x + value a b."""
    (x, a, b), kwargs = operation.arguments()
    shape = operation.outputs[0].tensor.shape  # type: ignore[union-attr]
    positions, found = builder.per_sample(*(builder.codes_of(each).expand(shape) for each in (x, a, b)))
    base, first, second = (builder.operand(numbers) for numbers in found)
    product = _combined(builder, "mul", first, second)
    _finish(builder, operation, _combined(builder, "add", base, product, float(kwargs.get("value", 1))), positions)


# Linear layers ------------------------------------------------------------------------------------------------------


def _addmm(builder: Builder, operation: Operation) -> None:
    (bias, a, b), kwargs = operation.arguments()
    if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
        raise NotLowered("it has factors")
    _product(builder, operation, a, b, bias)


def _mm(builder: Builder, operation: Operation) -> None:
    (a, b), _ = operation.arguments()
    _product(builder, operation, a, b)


def _bmm(builder: Builder, operation: Operation) -> None:
    (a, b), _ = operation.arguments()
    if len(a.tensor) != 1:
        raise NotLowered("it multiplies a matrix per sample, or for several parts of each sample")
    _product(builder, operation, a, b)


def _product(builder: Builder, operation: Operation, a: Value, b: Value, bias: Value | None = None) -> None:
    """a b + bias, where either factor follows the state and the other is a weight."""
    if builder.is_traced(a) and builder.is_traced(b):
        raise NotLowered("both of its factors follow the state, as in attention")
    turned = builder.is_traced(b)
    x, weight = (b, a) if turned else (a, b)
    codes, matrix = builder.codes_of(x), weight.tensor
    if codes.ndim == 3:
        codes = codes[0]
    if turned:
        codes = codes.t()
    with builder.recorder:
        if matrix.ndim == 3:
            matrix = matrix[0]
        if matrix.ndim == 1:
            matrix = matrix[None]
        elif not turned:
            matrix = matrix.t()
    if len(codes) != builder.batch:
        raise NotLowered("it is applied to several parts of each sample")
    part = _linear(builder, builder.by_row(codes), matrix, bias)
    output = operation.outputs[0]
    assert output is not None
    order = torch.arange(builder.batch * part.width, device="cpu").reshape(builder.batch, part.width)
    found = builder.result(part, order, (builder.batch, part.width))
    builder.set(output, (found.t() if turned else found).reshape(output.tensor.shape))


def _linear(builder: Builder, numbers: Tensor, matrix: Tensor, bias: Value | None) -> Part:
    """Returns matrix x + bias. What is known ahead of x is multiplied ahead."""
    runs = builder.elements.runs(numbers)
    ends = torch.tensor([run.length for run in runs], device="cpu").cumsum(0).tolist()
    kept: list[int] = []
    known = []
    for run, end in zip(runs, ends, strict=True):
        if isinstance(run.source, Value):
            builder.recorder.uses(builder.at, run.source)
            known.append((run, run.source, end))
        else:
            kept += range(end - run.length, end)
    start, per_sample = None if bias is None else _bias(builder, bias, len(matrix)), None
    with builder.recorder:
        for run, source, end in known:
            columns = matrix[:, end - run.length : end]
            if builder.recorder.needs(source) == Needs.CONDITION:
                product = builder.gathered_conditions(run) @ columns.t()
                per_sample = product if per_sample is None else per_sample + product
            else:
                product = columns @ builder.gathered(run).to(columns.dtype)
                start = product if start is None else start + product
    out = builder.new(len(matrix))
    begin: Part | Vector | None = None if start is None else builder.vector_of(start)
    if per_sample is not None:
        given = builder.part_of_conditions(per_sample)
        begin = given if begin is None else builder.made("add", given, begin)
    if not kept:
        assert begin is not None
        return builder.as_part(begin)
    _products(builder, out, numbers[kept], matrix, kept, begin)
    return Part(out, 0, len(matrix))


def _bias(builder: Builder, bias: Value, width: int) -> Tensor:
    builder.recorder.uses(builder.at, bias)
    if builder.recorder.needs(bias) not in (Needs.NOTHING, Needs.TIME) or bias.tensor.numel() not in (1, width):
        raise NotLowered("its bias is not one number per unit")
    with builder.recorder:
        return bias.tensor.reshape(-1).expand(width)


def _products(
    builder: Builder, out: int, numbers: Tensor, matrix: Tensor, columns: Sequence[int], begin: Part | Vector | None
) -> None:
    """Adds the products of columns of a matrix with units, run by run."""
    runs = builder.elements.runs(numbers)
    part = None
    if len(runs) > 4 or any(run.step == 0 for run in runs):
        part = builder.part(numbers)
    parts = (
        [builder.part(each) for each in torch.split(numbers, [run.length for run in runs])] if part is None else [part]
    )
    first = 0
    for each in parts:
        own = list(columns[first : first + each.width])
        is_range = own == list(range(own[0], own[0] + len(own)))
        with builder.recorder:
            weight = matrix[:, own[0] : own[0] + len(own)] if is_range else matrix[:, own]
        builder.emit("linear", out, len(matrix), each, begin, weight=builder.matrix_of(weight))
        first, begin = first + each.width, Part(out, 0, len(matrix))


# Norms and means ----------------------------------------------------------------------------------------------------


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
    part = builder.part(builder.by_row(codes.reshape(builder.batch, -1)))
    if not part.step:
        part = builder.made("Identity", part)
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
    _finish(builder, operation, found, order)


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
    _finish(builder, operation, part, positions)


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
    part = builder.part(builder.by_row(codes.reshape(builder.batch, -1)))
    if not part.step:
        part = builder.made("Identity", part)
    out = builder.new(codes.shape[1])
    builder.emit("mean", out, part.width, part, groups=codes.shape[1])
    return Part(out, 0, codes.shape[1]), tuple(codes.shape[:2])


def _set_reduced(builder: Builder, output: Value | None, part: Part, shape: Sequence[int]) -> None:
    assert output is not None
    order = torch.arange(math.prod(shape), device="cpu").reshape(builder.batch, -1)
    builder.set(output, builder.result(part, order, output.tensor.shape))


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div"), _binary),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "hardtanh"), _clamp),
    **dict.fromkeys(("mean", "sum"), _mean),
    **dict.fromkeys(("var", "var_mean"), _variance),
    **dict.fromkeys(("mm", "mv"), _mm),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "native_batch_norm"), _batch_norm),
    "_fused_rms_norm": _rms_norm,
    "addcmul": _addcmul,
    "addmm": _addmm,
    "bmm": _bmm,
    "elu": _elu,
    "gelu": _gelu,
    "leaky_relu": _leaky_relu,
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
    "neg": _negative,
    "pow": _power,
    "softplus": _softplus,
    "square": _square,
}
