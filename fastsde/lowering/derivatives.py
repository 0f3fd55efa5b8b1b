"""The derivatives of a program's instructions, written as instructions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .program import Instruction, Part, Program, Vector

__all__ = ["SLOPES", "Units", "Writer", "factors_of_norm", "tangent_of_norm"]

_LARGEST = 3e38  # times any number that is not subnormal, it is above 1


class Writer:
    """Writes instructions after those of a program, and new values.

    Args:
        widths: of the values so far.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths, self.instructions = list(widths), list[Instruction]()

    def new(self, width: int) -> int:
        """Returns a new value."""
        self.widths.append(width)
        return len(self.widths) - 1

    def emit(
        self,
        kind: str,
        a: Part | None,
        b: Part | Vector | None = None,
        parameters: Sequence[float] = (),
        *,
        width: int | None = None,
        out: Part | None = None,
        **options: Any,
    ) -> Part:
        """Adds an instruction and returns its result: units of a new value, or ``out``."""
        if out is None:
            operand = b if a is None else a
            width = operand.width if width is None and operand is not None else width or 0
            out = Part(self.new(width), 0, width)
        numbers = tuple(map(float, parameters))
        self.instructions.append(
            Instruction(kind, out.value, out.width, a, b, out.first, parameters=numbers, **options)
        )
        return out

    def finished(self, result: Part, row_width: int) -> Program:
        """Returns the program, without what its result does not need."""
        needed, kept = {result.value}, []
        for k in reversed(self.instructions):
            if k.out in needed:
                kept.append(k)
                needed |= {each.value for each in (k.a, k.b) if isinstance(each, Part)}
        return Program(tuple(self.widths), tuple(reversed(kept)), result, row_width)


@dataclass(frozen=True)
class Units:
    """Units of a value, with which arithmetic writes instructions."""

    writer: Writer
    part: Part

    def of(self, kind: str, *parameters: float) -> Units:
        """Returns an elementwise function of them."""
        return Units(self.writer, self.writer.emit(kind, self.part, None, parameters))

    def __add__(self, other: Units | float) -> Units:
        return self._with("add", other) if isinstance(other, Units) else self.of("affine", 1.0, other)

    __radd__ = __add__

    def __sub__(self, other: Units | float) -> Units:
        return self._with("subtract", other) if isinstance(other, Units) else self.of("affine", 1.0, -other)

    def __rsub__(self, other: float) -> Units:
        return self.of("affine", -1.0, other)

    def __neg__(self) -> Units:
        return self.of("affine", -1.0, 0.0)

    def __mul__(self, other: Units | float) -> Units:
        return self._with("multiply", other) if isinstance(other, Units) else self.of("affine", other, 0.0)

    __rmul__ = __mul__

    def _with(self, kind: str, other: Units) -> Units:
        return Units(self.writer, self.writer.emit(kind, self.part, other.part))

    def is_positive(self) -> Units:
        """Returns 1 where they are above 0, else 0."""
        return (self * _LARGEST).of("clamp", 0.0, 1.0)

    def mean(self, groups: int) -> Units:
        """Returns the mean of each group."""
        return Units(self.writer, self.writer.emit("mean", self.part, width=groups, groups=groups))


def _elu(a: Units, out: Units, p: Sequence[float]) -> Units:
    (alpha,) = p
    below = a.of("clamp", -math.inf, 0.0).of("exp")
    return below if alpha == 1 else alpha * below + (1 - alpha) * a.is_positive()


def _gelu(a: Units, out: Units, p: Sequence[float]) -> Units:
    density = (-0.5 * (a * a)).of("exp") * (1 / math.sqrt(2 * math.pi))
    return (0.5 * (a * math.sqrt(0.5)).of("erf") + 0.5) + a * density


def _gelu_tanh(a: Units, out: Units, p: Sequence[float]) -> Units:
    square, factor = a * a, math.sqrt(2 / math.pi)
    tanh = (a * (factor * 0.044715 * square + factor)).of("Tanh")
    inner = 3 * factor * 0.044715 * square + factor
    return (0.5 * tanh + 0.5) + 0.5 * (a * ((1 - tanh * tanh) * inner))


def _silu(a: Units, out: Units, p: Sequence[float]) -> Units:
    sigmoid = a.of("Sigmoid")
    return sigmoid + out * (1 - sigmoid)


def _mish(a: Units, out: Units, p: Sequence[float]) -> Units:
    tanh = a.of("Softplus").of("Tanh")
    return tanh + a * a.of("Sigmoid") * (1 - tanh * tanh)


def _clamp(a: Units, out: Units, p: Sequence[float]) -> Units | float:
    low, high = p
    slope: Units | float = 1.0 if low == -math.inf else (a - low).is_positive()
    return slope if high == math.inf else (high - a).is_positive() * slope


# The derivative of each elementwise function, of its operand a, its result and its parameters. At a kink it is that of
# one of the sides.
SLOPES: Mapping[str, Callable[[Units, Units, Sequence[float]], Units | float]] = {
    "Identity": lambda a, out, p: 1.0,
    "affine": lambda a, out, p: p[0],
    "clamp": _clamp,
    "exp": lambda a, out, p: out,
    "sqrt": lambda a, out, p: 0.5 * out.of("reciprocal"),
    "rsqrt": lambda a, out, p: -0.5 * (out * out * out),
    "reciprocal": lambda a, out, p: -(out * out),
    "abs": lambda a, out, p: a.is_positive() - (-a).is_positive(),
    "cos": lambda a, out, p: -a.of("Sin"),
    "erf": lambda a, out, p: (2 / math.sqrt(math.pi)) * (-(a * a)).of("exp"),
    "LogSigmoid": lambda a, out, p: (-a).of("Sigmoid"),
    "SiLU": _silu,
    "ReLU": lambda a, out, p: a.is_positive(),
    "LeakyReLU": lambda a, out, p: (1 - p[0]) * a.is_positive() + p[0],
    "ELU": _elu,
    "Tanh": lambda a, out, p: 1 - out * out,
    "Sigmoid": lambda a, out, p: out * (1 - out),
    "GELU": _gelu,
    "GELU_tanh": _gelu_tanh,
    "Softplus": lambda a, out, p: a.of("Sigmoid"),
    "Mish": _mish,
    "Sin": lambda a, out, p: a.of("cos"),
}


def factors_of_norm(k: Instruction, a: Units) -> Units:
    """Returns the factor of each group of a norm, 1 / sqrt(mean + epsilon) of the squares."""
    (epsilon,) = k.parameters
    off = a
    if k.kind == "layer_norm":
        mean, off = a.mean(k.groups), Units(a.writer, Part(a.writer.new(a.part.width), 0, a.part.width))
        for group in range(k.groups):
            a.writer.emit(
                "subtract", _group(a, group, k.groups), _repeated(mean, group, k), out=_group(off, group, k.groups)
            )
    return ((off * off).mean(k.groups) + epsilon).of("rsqrt")


def tangent_of_norm(k: Instruction, factors: Units, result: Units, da: Units, out: Part) -> None:
    """Writes r (da - mean(da) - y mean(y da)) of each group to ``out``, with the norm's factor r and result y; of an
    RMS norm without mean(da).
    """
    writer = da.writer
    share = (result * da).mean(k.groups)
    mean = da.mean(k.groups) if k.kind == "layer_norm" else None
    for group in range(k.groups):
        own = _group(da, group, k.groups)
        if mean is not None:
            own = writer.emit("subtract", own, _repeated(mean, group, k))
        along = writer.emit("multiply", _group(result, group, k.groups), _repeated(share, group, k))
        across = writer.emit("subtract", own, along)
        to = _group(Units(writer, out), group, k.groups)
        writer.emit("multiply", across, _repeated(factors, group, k), out=to)


def _group(units: Units, group: int, groups: int) -> Part:
    size = units.part.width // groups
    return Part(units.part.value, units.part.first + group * size, size)


def _repeated(numbers: Units, group: int, k: Instruction) -> Part:
    """Returns the number of a group for each of its units."""
    return Part(numbers.part.value, numbers.part.first + group, k.width // k.groups, 0)
