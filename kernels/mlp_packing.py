"""The numbers of a network's program in the buffers that the kernel ``mlp_sampler`` reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .elements import FUNCTIONS
from .mlp_network import OPERANDS
from .program_analysis import BLOCK, GROUPED, MIN_WIDTH, is_chain
from .program_blocks import BINARY, Blocks
from .program_registers import FIXED, Buffer

_KINDS = (*FUNCTIONS, *BINARY, *GROUPED, "linear", "fill")


class Packed:
    """A program as the kernel takes it, and where its numbers go.

    The weights are stored block by block, each ``[out, in]``, with zeros as padding, and so are the vectors.

    Args:
        program: a `fastsde.lowering.Program`.
        dtype: of the weights; everything else is fp32.

    Raises:
        ValueError: for an instruction that the kernel does not have.
    """

    def __init__(self, program: Any, device: torch.device, dtype: torch.dtype) -> None:
        unknown = unknown_instruction(program.names)
        if unknown is not None:
            raise ValueError(f"the kernel has no instruction {unknown!r}")
        self.program, self.dim, self.dtype = program, program.dim, dtype
        made = Blocks(program)
        self.names = tuple(k[1] if k[0] in ("unary", "binary") else k[0] for k in made.code)
        self.code = tuple(tuple(_numbers(k)) for k in made.code)
        self.result, self.blocks = made.result, tuple(made.blocks)
        self.widest = max(made.widths[1:], default=MIN_WIDTH)  # of the blocks
        self.most_blocks = -(-made.widest // BLOCK)  # of a value
        self.is_chain = is_chain(program)
        self._sources = list(made.sources)
        self._fixed = torch.tensor(FIXED, dtype=torch.float32, device=device)
        self._weights_end = made.weights.size
        self._numbers = _Numbers((made.weights, made.constants), device)
        self._rows, self.row_width = _Numbers((made.rows,), device), made.rows.size
        self._known: tuple[Tensor, Tensor | None] | None = None  # rows, and as the kernel reads them
        self.nbytes = self._weights_end * dtype.itemsize

    def compile_seconds(self, precision: str) -> float:
        """Returns about how long the kernel takes to compile.

        Measured for sm_90 with Triton 3.8 (products of blocks: seconds in bf16, fp32): 4: 1, 2; 9: 2, 3; 22: 4, 4;
        40: 4 to 8, 9; 84: 10 to 17, 35. Sixty instructions without a product take a second.
        """
        products = len(self.blocks)
        each = (0.08 + 0.0012 * products) * (2 if precision == "fp32" else 1)
        return 1 + 0.04 * len(self.code) + each * products

    def read(self, vectors: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Returns the numbers of a program (`fastsde.lowering.Vectors`), in few launches.

        Returns:
            The weights, the constants, the rows ``[K, n]``, and what samples are given; None for what there is not.
        """
        kinds = {"matrix": vectors.matrices, "constant": vectors.constants}
        source = torch.cat([self._fixed, *(kinds[kind][number].reshape(-1) for kind, number in self._sources)])
        numbers = self._numbers.of(source)
        known = self._known
        if known is None or known[0] is not vectors.rows:  # made anew only where times or weights have changed
            rows = self._rows.of(torch.nn.functional.pad(vectors.rows, (1, 0))) if self.row_width else None
            self._known = known = vectors.rows, rows
        given = vectors.given.contiguous() if vectors.given.numel() else None
        return numbers[: self._weights_end].to(self.dtype), numbers[self._weights_end :], known[1], given


def _numbers(instruction: tuple[Any, ...]) -> Iterator[float]:
    """Yields the numbers of an instruction, without names and tuples."""
    for each in instruction:
        if each is None:
            yield from (0, 0, 0)
        elif isinstance(each, tuple):
            yield from _numbers(each)
        elif each in OPERANDS:
            yield OPERANDS.index(each)
        elif not isinstance(each, str):
            yield int(each) if isinstance(each, bool) else each


class _Numbers:
    """What buffers hold: elements of a source, with factors."""

    def __init__(self, buffers: Sequence[Buffer], device: torch.device) -> None:
        self._elements = torch.cat([each.elements() for each in buffers]).to(device)
        factors = torch.cat([each.factors() for each in buffers])
        self._factors = None if bool((factors == 1).all()) else factors.to(device)

    def of(self, source: Tensor) -> Tensor:
        found = source.index_select(-1, self._elements)
        return found if self._factors is None else found.mul_(self._factors)


def unknown_instruction(names: Sequence[str]) -> str | None:
    """Returns the first of the kinds of instructions that the kernel does not have, or None."""
    return next((name for name in names if name not in _KINDS), None)
