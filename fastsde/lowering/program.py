"""The program of a lowered network: what is left of it once all that the time or the conditions alone decide is known.

It computes on *values*, one array ``[samples, units]`` each. Value 0 is the network's input x, flattened, and value 1
what each sample is given (empty without conditions). An instruction makes a new value, or adds to the one that the
instruction before it has made, out of parts of earlier values and *vectors*: numbers per unit that are the same for all
samples, and either constant or different in each row of a table. Kernels run it (``mlp_sampler``); `evaluate` is the
plain PyTorch that they are checked against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["GROUPED", "Instruction", "Part", "Program", "Vector", "Vectors", "evaluate"]

GROUPED = ("mean", "layer_norm", "rms_norm")


@dataclass(frozen=True)
class Part:
    """Units ``first`` to ``first + width - 1`` of a value or, with step 0, unit ``first`` repeated."""

    value: int
    first: int
    width: int
    step: int = 1


@dataclass(frozen=True)
class Vector:
    """Numbers per unit: the constant vector of a number, or columns of the rows' vectors from ``number`` on."""

    number: int
    width: int
    is_row: bool


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    - "linear": out = W a + b, with matrix ``weight`` ``[out, in]``; a has step 1; b is absent, a vector, or a part of
      a value.
    - an activation's name (`fastsde.models.activations`), or a function's: "exp", "sqrt", "rsqrt", "reciprocal", "abs",
      "cos", "erf", "affine" (p a + q), "clamp" (to [p, q]); p and q are the ``parameters``, and LeakyReLU's slope or
      ELU's alpha is p.
    - "add", "subtract", "multiply", "divide": of a and b; "fill": b itself, a vector.
    - "mean", "layer_norm", "rms_norm": of each of ``groups`` runs of a's units; p is the norms' epsilon.

    The result is units ``first`` to ``first + width - 1`` of the value ``out``.
    """

    kind: str
    out: int
    width: int
    a: Part | None = None
    b: Part | Vector | None = None
    first: int = 0
    weight: int = -1
    groups: int = 1
    parameters: tuple[float, ...] = ()


@dataclass(frozen=True)
class Program:
    """A program.

    Args:
        widths: of all values.
        instructions: in order.
        result: what the network returns, a part of a value.
        row_width: the length of the vectors of a row, which follow one another.
    """

    widths: tuple[int, ...]
    instructions: tuple[Instruction, ...]
    result: Part
    row_width: int

    @property
    def dim(self) -> int:
        """The number of elements of a sample."""
        return self.result.width

    @property
    def inputs(self) -> int:
        """The units of value 0: the elements of a sample and, in training, its time."""
        return self.widths[0]

    @property
    def products(self) -> int:
        """Multiply-adds per sample of all linear instructions."""
        return sum(k.width * k.a.width for k in self.instructions if k.kind == "linear" and k.a is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """The kinds of its instructions, each once."""
        return tuple(dict.fromkeys(k.kind for k in self.instructions))

    def __str__(self) -> str:
        return "\n".join(f"v{k.out} = {_described(k)}" for k in self.instructions)


@dataclass
class Vectors:
    """The numbers of a program at one state of the network's weights.

    Args:
        matrices: fp32 ``[out, in]``, with any strides.
        constants: fp32 ``[width]``.
        rows: fp32 ``[K, row_width]``.
        given: fp32 ``[B, width of value 1]``.
    """

    matrices: Sequence[Tensor]
    constants: Sequence[Tensor]
    rows: Tensor
    given: Tensor


def evaluate(program: Program, vectors: Vectors, x: Tensor, row: int) -> Tensor:
    """Returns the network's output ``[B, d]`` for x ``[B, inputs]`` in a row of the table."""
    values: list[Tensor] = [x, vectors.given]
    values += [x.new_full((len(x), width), torch.nan) for width in program.widths[2:]]

    def read(operand: Part | Vector | None) -> Any:
        if isinstance(operand, Part):
            columns = values[operand.value]
            if not operand.step:
                return columns[:, operand.first : operand.first + 1].expand(-1, operand.width)
            return columns[:, operand.first : operand.first + operand.width]
        if operand is None:
            return 0.0
        if operand.is_row:
            return vectors.rows[row, operand.number : operand.number + operand.width].to(x.dtype)
        return vectors.constants[operand.number].to(x.dtype)

    for k in program.instructions:
        a, b = read(k.a), read(k.b)
        found = a @ vectors.matrices[k.weight].to(x.dtype).T + b if k.kind == "linear" else _computed(k, a, b)
        values[k.out][:, k.first : k.first + k.width] = found
    result: Tensor = read(program.result)
    return result


def _computed(k: Instruction, a: Tensor, b: Any) -> Tensor:
    if k.kind not in GROUPED:
        return _FUNCTIONS[k.kind](a, b, *k.parameters)
    groups = a.reshape(len(a), k.groups, -1)
    mean = groups.mean(-1, keepdim=True)
    if k.kind == "mean":
        return mean.flatten(1)
    off = groups - mean if k.kind == "layer_norm" else groups
    scale: Tensor = torch.rsqrt(off.square().mean(-1, keepdim=True) + k.parameters[0])
    return (off * scale).flatten(1)


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "fill": lambda a, b: b,
    "affine": lambda a, b, p, q: p * a + q,
    "clamp": lambda a, b, p, q: a.clamp(p, q),
    "exp": lambda a, b: a.exp(),
    "sqrt": lambda a, b: a.sqrt(),
    "rsqrt": lambda a, b: a.rsqrt(),
    "reciprocal": lambda a, b: a.reciprocal(),
    "abs": lambda a, b: a.abs(),
    "cos": lambda a, b: a.cos(),
    "erf": lambda a, b: a.erf(),
    "Identity": lambda a, b: a,
    "LogSigmoid": lambda a, b: functional.logsigmoid(a),
    "SiLU": lambda a, b: functional.silu(a),
    "ReLU": lambda a, b: a.relu(),
    "LeakyReLU": lambda a, b, p: functional.leaky_relu(a, p),
    "ELU": lambda a, b, p: functional.elu(a, p),
    "Tanh": lambda a, b: a.tanh(),
    "Sigmoid": lambda a, b: a.sigmoid(),
    "GELU": lambda a, b: functional.gelu(a),
    "GELU_tanh": lambda a, b: functional.gelu(a, approximate="tanh"),
    "Softplus": lambda a, b: functional.softplus(a),
    "Mish": lambda a, b: functional.mish(a),
    "Sin": lambda a, b: a.sin(),
}


def _described(k: Instruction) -> str:
    def of(operand: Part | Vector | None) -> str:
        if isinstance(operand, Vector):
            return f"{'row' if operand.is_row else 'constant'}[{operand.number}]"
        if operand is None:
            return ""
        return f"v{operand.value}[{operand.first}:{operand.first + operand.width}]{'' if operand.step else ' repeated'}"

    more = ", ".join(filter(None, (of(k.a), of(k.b), *(f"{p:g}" for p in k.parameters))))
    return f"{k.kind}({more})  [{k.width}]"
