"""What a loop reads besides its arguments: globals, closures and the attributes of objects, to notice their changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engines.fingerprint import OF_MODULES, Fingerprint, Look, Same
from .probe import Probe

__all__ = ["environment"]

_ELEMENTS = 10_000  # of a tensor that is compared by its contents


class _Look(Look):
    """Reads tensors by their contents where they are small, and skips the networks, which are called in every row."""

    def __init__(self, networks: Iterable[Any]) -> None:
        super().__init__()
        self._networks = {id(network) for network in networks}
        for network in networks:
            if isinstance(network, nn.Module):
                self._networks.update(id(module) for module in network.modules())

    def at(self, value: Any, depth: int, is_weight: bool = False) -> None:
        if id(value) in self._networks:
            self.structure.append(id(value))
            if id(value) not in self._seen:  # what the loop may read of it, but no weights
                self._seen[id(value)] = len(self._seen), value
                own = (
                    {name: x for name, x in vars(value).items() if name not in OF_MODULES}
                    if isinstance(value, nn.Module)
                    else {}
                )
                self._at_items(own, 2)
        elif isinstance(value, torch.Generator):
            self.structure.append("generator")
        else:
            super().at(value, depth, is_weight)

    def _at_tensor(self, tensor: Tensor, is_weight: bool) -> None:
        contents: Any
        if isinstance(tensor, Probe):
            contents = "a state of a trace"
        elif tensor.layout != torch.strided or hasattr(tensor, "__tensor_flatten__"):
            raise NotImplementedError("a tensor of several tensors")
        elif tensor.device.type == "cpu" and tensor.numel() <= _ELEMENTS:
            contents = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        else:
            contents = Same(tensor), None if tensor.is_inference() else tensor._version, tensor.data_ptr()
        self.structure.append((tuple(tensor.shape), tensor.dtype, tensor.device, contents))


def environment(loop: Callable[..., Any], objects: Sequence[Any], networks: Sequence[Any]) -> Fingerprint:
    """Reads a loop and objects that it is given. The fingerprints of two moments are equal if nothing has changed."""
    look = _Look(networks)
    look.at(loop, look.DEPTH)
    for each in (*objects, *networks):
        look.at(each, look.DEPTH)
    return Fingerprint(tuple(look.structure), tuple(look.places), tuple(look.versions), look.is_whole)
