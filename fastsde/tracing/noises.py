"""Where the noises of a traced loop come from: the loop's own draws, given tensors, or the noise contract."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .. import noise, ops
from .program import Program
from .tape import Draw, cdata
from .values import Node

__all__ = ["Draws", "Given", "contract", "labels_of"]


class Draws:
    """The draws of a loop from PyTorch's generators, in the loop's own order.

    Args:
        program: whose draws they are.
        generators: generators instead of those of the trace, by the `cdata` of these.
        outside: generators that outlive the loop, by their `cdata`: the others are made by the loop, which starts them
            anew in every call. By default all of them outlive it.
    """

    def __init__(
        self,
        program: Program,
        generators: Mapping[int, torch.Generator] | None = None,
        outside: Collection[int] | None = None,
    ) -> None:
        self._draws, self._device = program.draws, program.device
        self._generators = dict(generators or {})
        for own, state in program.generator_states.items():
            if outside is not None and own not in outside and own not in self._generators:
                self._generators[own] = torch.Generator(self._device).set_state(state)
        self._next = 0
        self._waiting: dict[int, Tensor] = {}
        self._uses = Counter(label for row in program.rows for node in row.noises for label in labels_of(node))

    def __getitem__(self, number: int) -> Tensor:
        while self._next <= number:
            self._waiting[self._next] = self._draw(self._draws[self._next])
            self._next += 1
        self._uses[number] -= 1
        return self._waiting.pop(number) if self._uses[number] <= 0 else self._waiting[number]

    def finish(self) -> None:
        """Makes the draws that are left, which the loop makes and does not use."""
        while self._next < len(self._draws):
            self._draw(self._draws[self._next])
            self._next += 1

    def _draw(self, draw: Draw) -> Tensor:
        generator = draw.generator
        if generator is not None:
            generator = self._generators.get(cdata(generator), generator)
        device = draw.device or (generator.device if generator is not None else self._device)
        if draw.strides is None:
            z = torch.randn(draw.shape, dtype=draw.dtype, device=device, generator=generator)
        else:  # the order of the elements follows the memory
            z = torch.empty_strided(draw.shape, draw.strides, dtype=draw.dtype, device=device)
            z.normal_(generator=generator)
        return z.to(self._device).contiguous()


class Given(Draws):
    """Given tensors in the place of a loop's draws."""

    def __init__(self, noises: Sequence[Tensor]) -> None:
        self._noises = noises

    def __getitem__(self, number: int) -> Tensor:
        return self._noises[number]

    def finish(self) -> None:
        """There is nothing left to draw."""


def contract(program: Program, n: int, keys: Tensor) -> Callable[[Node], Tensor]:
    """Returns the noise of the contract for each draw: the first of a row is that of the row's step in stream 0, and
    further ones follow in stream 4.
    """
    places: dict[Node, tuple[int, int]] = {}
    others = 0
    for step, row in enumerate(program.rows):
        nodes = [node for node in row.noises if node.kind == "noise"]
        for i, node in enumerate(nodes):
            places[node] = (step, 0) if i == 0 else (others, noise.STREAM_OTHER)
            others += i > 0

    def draw(node: Node) -> Tensor:
        step, stream = places[node]
        if node.shape[:1] == (n,):
            make = ops.normal if stream == 0 else noise.normal
            shape = node.shape[1:]
            z = make(keys, step, shape) if stream == 0 else noise.normal(keys, step, shape, stream)
        else:  # one for all samples
            z = noise.normal(keys[:1], step, node.shape, stream)
        return z.reshape(-1)

    return draw


def labels_of(node: Node) -> Iterator[int]:
    """Yields the numbers of the draws that a node of noise is made of."""
    label = node.label
    return iter(label) if isinstance(label, tuple) else iter((label,))
