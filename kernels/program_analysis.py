"""What is found in a network's program before it is cut into blocks (`program_blocks`), and where it is cut."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

MIN_WIDTH, BLOCK = 16, 64
GROUPED = ("mean", "layer_norm", "rms_norm")
BINARY_LOGARITHM = ("LogSigmoid", "Softplus")  # which the kernel computes in units of ln 2
LOG2_E, LN_2 = math.log2(math.e), math.log(2)


class Block(NamedTuple):
    """Units ``first`` to ``first + count - 1`` of a value, padded to a width; or one unit, of width 1."""

    first: int
    count: int
    width: int


def blocks_of(size: int) -> tuple[int, int]:
    """Returns how many blocks a width is cut into, and the width of a block: a power of two up to 64."""
    width = min(BLOCK, max(MIN_WIDTH, 1 << (size - 1).bit_length()))
    return -(-size // width), width


def cut(program: Any) -> list[list[Block]]:
    """Returns the blocks of each value.

    A value is cut where its parts are written and read one by one, and where what elementwise instructions combine it
    with, or make of it, is cut; but not if that would more than double its padded width.
    """
    of_product = {k.out for k in program.instructions if k.kind == "linear"}
    whole = {0, 1}  # values that are not cut
    while True:
        cuts = _cuts(program, whole)
        found = [_blocks(sorted(each), value in of_product) for value, each in enumerate(cuts)]
        wide = {
            value
            for value, blocks in enumerate(found)
            if value not in whole and _padded(blocks) > 2 * _padded(_blocks([0, program.widths[value]], True))
        }
        if not wide:
            found[0] = _blocks([0, program.widths[0]], True)
            return found
        whole |= wide


def _cuts(program: Any, whole: set[int]) -> list[set[int]]:
    cuts = [{0, width} for width in program.widths]
    pairs = []  # (value, its first unit, another value, its first unit, units): cut alike
    for k in (*program.instructions, None):
        parts = (program.result,) if k is None else (k.a, k.b)
        parts = tuple(part for part in parts if part is not None and hasattr(part, "value") and part.step)
        if k is not None:
            width = k.groups if k.kind == "mean" else k.width
            if k.out not in whole:
                cuts[k.out] |= {k.first, k.first + width}
            if k.kind in GROUPED:
                parts = ()
            elif k.kind == "linear":
                parts = tuple(part for part in parts if part is k.b)
        for part in parts:
            if part.value not in whole:
                cuts[part.value] |= {part.first, part.first + part.width}
                if k is not None and k.out not in whole:
                    pairs += [(part.value, part.first, k.out, k.first, part.width)]
                    pairs += [(k.out, k.first, part.value, part.first, part.width)]
    changes = True
    while changes:
        changes = False
        for value, first, other, place, width in pairs:
            moved = {place + at - first for at in cuts[value] if first < at < first + width}
            if not moved <= cuts[other]:
                cuts[other] |= moved
                changes = True
    return cuts


def _blocks(cuts: list[int], is_of_product: bool) -> list[Block]:
    blocks = []
    for first, end in pairwise(cuts):
        if end - first == 1 and not is_of_product:
            blocks.append(Block(first, 1, 1))
            continue
        _, width = blocks_of(end - first)
        blocks += [Block(at, min(width, end - at), width) for at in range(first, end, width)]
    return blocks


def _padded(blocks: list[Block]) -> int:
    return sum(max(MIN_WIDTH, block.width) for block in blocks)


def is_chain(program: Any) -> bool:
    """Returns whether a program keeps no more than one value at a time, besides its input and what it is given."""
    last = {program.result.value: len(program.instructions)}
    for at, k in enumerate(program.instructions):
        last |= {part.value: at for part in (k.a, k.b) if part is not None and hasattr(part, "value")}
    kept: set[int] = set()
    for at, k in enumerate(program.instructions):
        kept = {value for value in {*kept, k.out} if last.get(value, at) > at}
        if len(kept) > 1:
            return False
    return True


def in_binary(program: Any) -> tuple[dict[int, float], dict[int, float]]:
    """Returns which values are in units of ln 2, with the factor of what reads and of what writes them: those of which
    LogSigmoid or Softplus is the only reader, and those that these alone write and only products read.
    """
    readers: dict[int, list[Any]] = {program.result.value: [None]}
    writers: dict[int, list[Any]] = {}
    products: dict[int, bool] = {}
    for k in program.instructions:
        writers.setdefault(k.out, []).append(k)
        for part in (k.a, k.b):
            if part is not None and hasattr(part, "value") and part.value != k.out:
                readers.setdefault(part.value, []).append(k)
                products[part.value] = products.get(part.value, True) and k.kind == "linear" and part is k.a
    inputs, outputs = {}, {}
    for k in program.instructions:
        if k.kind not in BINARY_LOGARITHM:
            continue
        before = writers.get(k.a.value, [])
        starts_anew = all(w.kind == "linear" and (not hasattr(w.b, "value") or w.b.value == w.out) for w in before)
        if before and starts_anew and readers[k.a.value] == [k]:
            outputs[k.a.value] = LOG2_E
        if len(writers[k.out]) == 1 and k.out != program.result.value and products.get(k.out, False):
            inputs[k.out] = LN_2
    return inputs, outputs
