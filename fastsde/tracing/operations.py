"""What each ATen operation does to affine values. What is not here, and not made of what is here, is not affine."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import TraceError
from .probe import Probe
from .tape import Handler, Tape, name_of_operation, registered, shape_of, tensors_in
from .values import Joined, Value, added, scaled, uniform

__all__ = ["FINAL", "HANDLERS", "reason_of"]

aten = torch.ops.aten
HANDLERS: dict[Any, Handler] = {}
_handles = functools.partial(registered, HANDLERS)
# Nothing can stand for their results: numbers on the host, and tensors that change their shape.
FINAL = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.item, aten.squeeze_, aten.unsqueeze_,
         aten.transpose_, aten.t_, aten.swapaxes_, aten.resize_}  # fmt: skip
_UNROLLED = 32  # a contraction over at most this many elements, such as over a stack of past outputs, is unrolled
_REASONS = {
    "_local_scalar_dense": "the loop decides by a value of the state (if, while, float(), .item())",
    "is_nonzero": "the loop decides by a value of the state",
    "equal": "the loop decides by a value of the state",
    "linalg_vector_norm": "a norm of the state",
    "norm": "a norm of the state",
    "sort": "a quantile of the state",
    "mean": "a mean over the state",
    "std": "a spread of the state",
    "var": "a spread of the state",
    "amax": "a maximum over the state",
    "amin": "a minimum over the state",
    "max": "a maximum over the state",
    "min": "a minimum over the state",
    "abs": "a magnitude of the state",
    "exp": "an exponential of the state (a learned variance?)",
    "sign": "the sign of the state",
    "pow": "a power of the state",
    "round": "the state is rounded",
    **dict.fromkeys(("le", "lt", "ge", "gt", "any", "all"), "the loop decides by values of the state"),
}


def reason_of(name: str) -> str:
    """Returns why an operation is not affine."""
    return _REASONS.get(name.removesuffix("_"), "is not affine in the state")


def _result(tape: Tape, func: Any, args: Any, value: Value, shape: torch.Size, dtype: torch.dtype) -> Any:
    """Returns the result of an operation, written in place if its name ends with an underscore."""
    if not func._schema.name.endswith("_"):
        return tape.named(value, shape, dtype)
    target = tape.memory(args[0])
    if target.shape != shape:
        raise TraceError(name_of_operation(func), "an in-place operation that broadcasts its target")
    target.write(tape.shortened(value, shape))
    return args[0]


# Arithmetic ----------------------------------------------------------------------------------------------------------


def _by_parts(
    tape: Tape, func: Any, a: Any, b: Any, scale: Callable[[float], float], shift: Callable[[float], float]
) -> Any:
    """Returns scale(b) a + shift(b) part by part, if ``a`` is made of parts, such as states, and b is a number."""
    if func._schema.name.endswith("_") or not isinstance(a, Probe) or isinstance(b, Probe):
        return None
    whole = a.whole if not isinstance(b, Tensor) or b.numel() == 1 else None
    if not isinstance(whole, Joined):
        return None
    number = float(b)
    parts = [
        (added(scaled(value, scale(number)), Value(value.numel, {}, shift(number))), shape)
        for value, shape in whole.parts
    ]
    return tape.probe(Joined(parts, whole.dim), a.shape, tape.dtype_of(a, b))


def _alpha(args: Any, kwargs: Any) -> float:
    return float(args[2] if len(args) > 2 else kwargs.get("alpha", 1))


def _weighted(tape: Tape, func: Any, args: Any, a: Any, b: Any, ka: float, kb: float) -> Any:
    found = _by_parts(tape, func, a, b, lambda n: ka, lambda n: kb * n)
    if found is None:
        found = _by_parts(tape, func, b, a, lambda n: kb, lambda n: ka * n)
    if found is not None:
        return found
    shape = shape_of(a, b)
    total = added(scaled(tape.value(a, shape), ka), scaled(tape.value(b, shape), kb))
    return _result(tape, func, args, total, shape, tape.dtype_of(a, b))


@_handles("add", "add_")
def _add(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    return _weighted(tape, func, args, args[0], args[1], 1.0, _alpha(args, kwargs))


@_handles("sub", "sub_")
def _sub(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    return _weighted(tape, func, args, args[0], args[1], 1.0, -_alpha(args, kwargs))


@_handles("rsub")
def _rsub(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    return _weighted(tape, func, args, args[1], args[0], 1.0, -_alpha(args, kwargs))


def _product(tape: Tape, func: Any, a: Any, b: Any, shape: torch.Size) -> Value:
    v, k = tape.operand(a, shape), tape.operand(b, shape)
    if not isinstance(v, Value):
        v, k = k, v
    if isinstance(v, Value) and isinstance(k, Value):
        if v.terms and k.terms:
            raise TraceError(name_of_operation(func), "a product of two traced tensors")
        v, k = (v, k.const) if v.terms else (k, v.const)
    if not isinstance(v, Value) or isinstance(k, Value):
        raise TraceError(name_of_operation(func), "a product without a traced tensor")
    return scaled(v, k)


@_handles("mul", "mul_")
def _mul(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    a, b = args[0], args[1]
    for x, y in ((a, b), (b, a)):
        found = _by_parts(tape, func, x, y, lambda n: n, lambda n: 0.0)
        if found is not None:
            return found
    shape = shape_of(a, b)
    return _result(tape, func, args, _product(tape, func, a, b, shape), shape, tape.dtype_of(a, b))


@_handles("div", "div_", "true_divide")
def _div(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    a, b = args[0], args[1]
    divisor = tape.as_probe(b)
    if divisor is not None and divisor.value.terms:
        raise TraceError(name_of_operation(func), "a division by a traced tensor")
    if kwargs.get("rounding_mode"):
        raise TraceError(name_of_operation(func), "a rounded division of the state")
    found = _by_parts(tape, func, a, b, lambda n: 1 / n if n else math.inf, lambda n: 0.0)
    if found is not None:
        return found
    shape = shape_of(a, b)
    k = tape.operand(b, shape)
    k = k.const if isinstance(k, Value) else k
    inverse = 1 / k if isinstance(k, Tensor) else (1.0 / k if k else math.inf)
    return _result(tape, func, args, scaled(tape.value(a, shape), inverse), shape, tape.dtype_of(a, b))


@_handles("neg", "neg_")
def _neg(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    return _result(tape, func, args, scaled(tape.value(x, x.shape), -1.0), x.shape, x.dtype)


@_handles("lerp", "lerp_")
def _lerp(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    start, end, weight = args[:3]
    shape = shape_of(start, end, weight)
    k = tape.operand(weight, shape)
    if isinstance(k, Value):
        raise TraceError(name_of_operation(func), "a traced weight")
    total = added(scaled(tape.value(start, shape), 1 - k), scaled(tape.value(end, shape), k))
    return _result(tape, func, args, total, shape, start.dtype)


@_handles("addcmul", "addcmul_", "addcdiv", "addcdiv_")
def _addc(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    x, a, b = args[:3]
    shape = shape_of(x, a, b)
    if "div" in func._schema.name:
        if tape.as_probe(b) is not None:
            raise TraceError(name_of_operation(func), "a division by a traced tensor")
        b = 1 / b
    k = float(kwargs.get("value", 1))
    if tape.as_probe(a) is None and tape.as_probe(b) is None:
        product = tape.value(a * b, shape)
    else:
        product = _product(tape, func, a, b, shape)
    return _result(tape, func, args, added(tape.value(x, shape), scaled(product, k)), shape, tape.dtype_of(x, a, b))


@_handles("where")
def _where(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    mask, a, b = args
    if tape.as_probe(mask) is not None:
        raise TraceError(name_of_operation(func), "a choice by values of the state")
    shape = shape_of(mask, a, b)
    weight = uniform(mask.to("cpu").expand(shape).reshape(-1).double())
    total = added(scaled(tape.value(a, shape), weight), scaled(tape.value(b, shape), 1 - weight))
    return tape.named(total, shape, tape.dtype_of(a, b))


@_handles("masked_fill", "masked_fill_")
def _masked_fill(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    x, mask, fill = args
    if tape.as_probe(mask) is not None:
        raise TraceError(name_of_operation(func), "a choice by values of the state")
    weight = uniform(mask.to("cpu").expand(x.shape).reshape(-1).double())
    total = added(scaled(tape.value(x, x.shape), 1 - weight), scaled(tape.value(fill, x.shape), weight))
    return _result(tape, func, args, total, x.shape, x.dtype)


# Clamps --------------------------------------------------------------------------------------------------------------


def _clamped(tape: Tape, func: Any, args: Any, low: Any, high: Any) -> Any:
    x = tape.as_probe(args[0])
    if x is None:
        raise TraceError(name_of_operation(func), "a bound that depends on the state")
    bounds = []
    for bound, default in ((low, -math.inf), (high, math.inf)):
        if tape.as_probe(bound) is not None:
            raise TraceError(name_of_operation(func), "a bound that depends on the state (dynamic thresholding)")
        value = default if bound is None else tape.operand(bound, x.shape)
        if not isinstance(value, float):
            raise TraceError(name_of_operation(func), "a bound that differs from element to element")
        bounds.append(value)
    in_place = func._schema.name.endswith("_")
    whole = x.whole
    if isinstance(whole, Joined) and not in_place:
        parts = [(_clamp_of(tape, value, shape, bounds, early=True), shape) for value, shape in whole.parts]
        return tape.probe(Joined(parts, whole.dim), x.shape, x.dtype)
    value = _clamp_of(tape, x.value, x.shape, bounds)
    if in_place:
        x.write(value)
        return args[0]
    return tape.probe(value, x.shape, x.dtype)


def _clamp_of(tape: Tape, value: Value, shape: Sequence[int], bounds: Sequence[float], early: bool = False) -> Value:
    if not value.terms or (bounds[0] == -math.inf and bounds[1] == math.inf):
        return value
    node = tape.node("clamp", shape, value=value, bounds=(bounds[0], bounds[1]))
    if early:  # as soon as its argument is known, which need not wait
        node.epoch = max(child.epoch for child in node.children())
    return Value(node.numel, {(node, None): 1.0})


@_handles("clamp", "clamp_", "clip", "clip_", "hardtanh", "hardtanh_")
def _clamp(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    names = dict(zip(("min", "max"), args[1:], strict=False)) | kwargs
    if "hardtanh" in func._schema.name:
        names = dict(zip(("min_val", "max_val"), args[1:], strict=False)) | kwargs
        return _clamped(tape, func, args, names.get("min_val", -1.0), names.get("max_val", 1.0))
    return _clamped(tape, func, args, names.get("min"), names.get("max"))


@_handles("clamp_min", "clamp_min_", "maximum", "relu", "relu_")
def _clamp_min(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    if tape.as_probe(args[0]) is None:
        args = (args[1], args[0])
    return _clamped(tape, func, args, args[1] if len(args) > 1 else 0.0, None)


@_handles("clamp_max", "clamp_max_", "minimum")
def _clamp_max(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    if tape.as_probe(args[0]) is None:
        args = (args[1], args[0])
    return _clamped(tape, func, args, None, args[1])


# Copies and constants ------------------------------------------------------------------------------------------------


@_handles("clone", "_to_copy", "nan_to_num", "contiguous", "positive")
def _copy(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    x = tape.as_probe(args[0])
    assert x is not None
    dtype = kwargs.get("dtype") or x.dtype
    if not dtype.is_floating_point:
        raise TraceError(name_of_operation(func), f"the state is rounded to {dtype}")
    if dtype.itemsize < x.dtype.itemsize:
        tape.notes[f"casts {x.dtype} to {dtype}"] = None
    keeps = tape.double and x.dtype == torch.float64
    return tape.probe(x.whole, x.shape, x.dtype if keeps else dtype)


@_handles("isnan", "isinf", "isneginf", "isposinf", "isfinite")
def _is_finite(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    tape.notes["asks whether the state is finite: taken as yes"] = None
    return torch.full(args[0].shape, name_of_operation(func) == "isfinite", dtype=torch.bool, device=tape.device)


@_handles("eq", "ne")
def _equal_to_itself(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    x, y = (tape.as_probe(each) for each in args[:2])
    if x is None or y is None or (x.memory, x.positions) != (y.memory, y.positions):
        raise TraceError(name_of_operation(func), "the loop decides by values of the state")
    tape.notes["asks whether the state is finite: taken as yes"] = None  # NaN differs from itself
    return torch.full(x.shape, name_of_operation(func) == "eq", dtype=torch.bool, device=tape.device)


@_handles("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
          "new_empty_strided")  # fmt: skip
def _constant(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    stand_in = torch.empty(args[0].shape, dtype=args[0].dtype, device=tape.device)
    made = func(stand_in, *args[1:], **kwargs)
    return made.zero_() if "empty" in func._schema.name else made


@_handles("resize_")
def _resize_(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    if tuple(args[0].shape) != tuple(args[1]):
        raise TraceError(name_of_operation(func), "changes the shape of the state in place")
    return args[0]


@_handles("copy_")
def _copy_(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    tape.memory(args[0]).write(tape.value(args[1], args[0].shape))
    return args[0]


@_handles("zero_", "fill_")
def _fill_(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    tape.memory(args[0]).write(tape.value(args[1] if len(args) > 1 else 0.0, args[0].shape))
    return args[0]


# Moves of elements: the operation itself is applied to positions, once per shape --------------------------------------

_SAME_ORDER = ("view", "_unsafe_view", "unsqueeze", "squeeze", "detach", "alias", "lift_fresh", "view_as",
               "_reshape_alias", "reshape", "flatten", "unflatten")  # fmt: skip
_VIEWS = ("select", "slice", "permute", "transpose", "t", "expand", "split", "split_with_sizes", "unbind", "chunk",
          "narrow", "diagonal", "movedim", "as_strided", "unfold", "swapaxes", "T", "mT", "expand_as")  # fmt: skip
_COPIES = ("flip", "repeat", "roll", "index", "index_select", "gather", "repeat_interleave", "tile",
           "rot90")  # fmt: skip


def _key(func: Any, shape: Sequence[int], args: Any, kwargs: Any) -> Any:
    """Returns what a move depends on; unhashable, and so never known, where it has tensors."""

    def plain(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return tuple(map(plain, x))
        return [x] if isinstance(x, Tensor) else x  # a list is not hashable

    return func, tuple(shape), plain(args), tuple(sorted((k, plain(v)) for k, v in kwargs.items()))


@_handles(*_SAME_ORDER)
def _same_order(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    x = tape.as_probe(args[0])
    assert x is not None
    if func.overloadpacket in (aten.detach, aten.alias, aten.lift_fresh):
        return Probe(tape, x.memory, x.shape, x.dtype, x.positions)
    key = _key(func, x.shape, args[1:], kwargs)
    known = tape.shapes.get(key) if _is_hashable(key) else None
    if known is None:
        known = tuple(func(torch.empty(x.shape, dtype=x.dtype, device="meta"), *args[1:], **kwargs).shape)
        if _is_hashable(key):
            tape.shapes[key] = known
    return Probe(tape, x.memory, known, x.dtype, x.positions)


def _is_hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


@_handles(*_VIEWS)
def _view(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    x = tape.as_probe(args[0])
    assert x is not None
    key = _key(func, x.shape, args[1:], kwargs)
    found = tape.mover.moves(key, x.shape, lambda i: func(i, *args[1:], **kwargs))
    return x.moved(*found) if isinstance(found, tuple) else [x.moved(*each) for each in found]


@_handles(*_COPIES)
def _moved(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    x = tape.as_probe(args[0])
    if x is None or any(tape.as_probe(a) is not None for a in tensors_in(args[1:])):
        raise TraceError(name_of_operation(func), "an index that depends on the state")
    positions, shape = tape.mover.moves(
        _key(func, x.shape, args[1:], kwargs), x.shape, lambda i: func(i, *_on_cpu(args[1:]), **kwargs)
    )
    return tape.probe(tape.mover.gather(x.value, positions), shape, x.dtype)


def _on_cpu(args: Any) -> Any:
    def moved(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(map(moved, x))
        return x.cpu() if isinstance(x, Tensor) else x

    return moved(tuple(args))


@_handles("cat", "concat", "concatenate")
def _cat(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    tensors = list(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    tensors = [x for x in tensors if x.ndim > 1 or x.numel()]  # an empty vector counts as nothing
    return _joined(tape, tensors, [tuple(x.shape) for x in tensors], dim % tensors[0].ndim)


@_handles("stack")
def _stack(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    tensors = list(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    dim %= tensors[0].ndim + 1
    shapes = [(*x.shape[:dim], 1, *x.shape[dim:]) for x in tensors]
    return _joined(tape, tensors, shapes, dim)


def _joined(tape: Tape, tensors: list[Tensor], shapes: list[tuple[int, ...]], dim: int) -> Any:
    parts = [(tape.value(x, x.shape), shape) for x, shape in zip(tensors, shapes, strict=True)]
    shape = list(shapes[0])
    shape[dim] = sum(each[dim] for each in shapes)
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    value: Value | Joined = Joined(parts, dim)
    merged = tape.one_draw([value for value, _ in parts], shapes, dim)
    return tape.probe(merged if merged is not None else value, shape, dtype)


@_handles("index_put_", "index_put")
def _index_put(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) > 3 and args[3]:
        raise TraceError(name_of_operation(func), "an indexed sum")
    x, indices, values = args[:3]
    if any(tape.as_probe(i) is not None for i in indices if i is not None):
        raise TraceError(name_of_operation(func), "an index that depends on the state")
    target = tape.memory(x) if func.overloadpacket is aten.index_put_ else tape.as_probe(x)
    idx = aten.index(torch.arange(x.numel(), device="cpu").reshape(x.shape), _on_cpu((indices,))[0])
    value = tape.value(values, idx.shape)
    positions = tape.mover.intern(idx, x.numel())
    written = tape.mover.scatter(tape.value(x, x.shape), positions, value)
    if func.overloadpacket is aten.index_put:
        return tape.probe(written, x.shape, x.dtype)
    assert target is not None
    target.write(written)
    return x


# Small contractions are unrolled --------------------------------------------------------------------------------------


def _unrolled(func: Any, n: int, term: Callable[[int], Value]) -> Value:
    if n > _UNROLLED:
        raise TraceError(name_of_operation(func), _REASONS.get(name_of_operation(func), "mixes elements of the state"))
    total = term(0)
    for k in range(1, n):
        total = added(total, term(k))
    return total


@_handles("sum", "mean")
def _reduce(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    x = tape.as_probe(args[0])
    assert x is not None
    dims = args[1] if len(args) > 1 and args[1] is not None else kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(x.ndim))  # no dims are all
    shape = func(torch.empty(x.shape, dtype=x.dtype, device="meta"), *args[1:], **kwargs).shape
    grid = torch.arange(x.numel(), device="cpu").reshape(x.shape)
    rows = grid.movedim(dims, list(range(len(dims)))).reshape(-1, shape.numel()) if dims else grid.reshape(1, -1)

    def term(k: int) -> Value:
        return tape.mover.gather(x.value, tape.mover.intern(rows[k], x.numel()))

    total = _unrolled(func, len(rows), term)
    total = scaled(total, 1.0 / len(rows)) if func.overloadpacket is aten.mean else total
    return tape.named(total, shape, x.dtype)


@_handles("mm", "bmm", "matmul", "mv", "dot")
def _matmul(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    a, b = args[:2]
    left, right = tape.as_probe(a), tape.as_probe(b)
    if left is not None and right is not None:
        raise TraceError(name_of_operation(func), "a product of two traced tensors")
    shape = func(*(torch.empty(x.shape, dtype=torch.float32, device="meta") for x in (a, b))).shape
    traced = left if left is not None else right
    assert traced is not None
    constant = (b if left is not None else a).detach().to("cpu", torch.float64)
    grid = torch.arange(traced.numel(), device="cpu").reshape(traced.shape)
    first, second = (grid, constant) if left is not None else (constant, grid)

    def column(x: Tensor, k: int, is_first: bool) -> Tensor:
        pick = x.select(-1, k) if is_first else x.select(-2 if x.ndim > 1 else 0, k)
        if is_first:
            return pick.unsqueeze(-1) if second.ndim > 1 else pick
        return pick if x.ndim < 2 else pick.unsqueeze(-2)

    def term(k: int) -> Value:
        parts = [column(x, k, i == 0).expand(shape).reshape(-1) for i, x in enumerate((first, second))]
        index, weight = parts if left is not None else parts[::-1]
        return scaled(tape.mover.gather(traced.value, tape.mover.intern(index, traced.numel())), uniform(weight))

    return tape.named(_unrolled(func, a.shape[-1], term), shape, tape.dtype_of(a, b))
