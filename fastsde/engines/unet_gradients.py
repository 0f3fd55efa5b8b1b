"""The U-Net with its gradients, forward and backward each in one native kernel."""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from .. import ops
from ..models.labels import check_conditions
from ..models.unet import Modulation, UNet
from ..validation import check_tensor
from .unet_inference import supports

__all__ = ["FixedUNet", "NativeUNet", "has_native_gradients"]

_MOST_KEPT = 1 << 26  # floats of memory beside a network that may live on: enough for 150 images of 28 x 28 pixels


def has_native_gradients(model: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    """Returns whether the native kernel differentiates a network: an unmodified `UNet` in fp32 on the CPU.

    The channels of its levels are multiples of 16.

    Args:
        dtype: of the products: fp32, or bf16 if the CPU multiplies it.
    """
    if not supports(model):
        return False
    unet, parameters = cast(UNet, model), list(model.parameters())
    plain = all(each.dtype == torch.float32 and each.is_contiguous() for each in parameters)
    if not (plain and ops.has_native(parameters[0].device, "unet_training_forward")):
        return False
    takes: bool = ops.kernel("unet_training", parameters[0].device).takes(unet.image_channels, unet.channels, dtype)
    return takes


class NativeUNet(nn.Module):
    """A `UNet` with gradients, called in the same way, whose convolutions are native kernels, forward and backward.

    It has the network as a submodule, and its gradients are those of the network's weights and of x. Without any of the
    weights, as in a product e^T (df/dx), a backward pass takes about half the time. Under autocast to bf16 its signals
    and products are bf16, if the CPU multiplies it; its sums and its output are fp32. What the kernels do not compute,
    the network itself does: gradients of t, other autocast dtypes, a network that has been changed or hooked,
    ``torch.compile``, and the transformations of ``torch.func``. Results do not depend on the threads.

    There is no second derivative.

    Args:
        unet: the network, for which `has_native_gradients` holds.
    """

    is_fixed = False  # whether the memory that is kept holds the present weights

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet
        self._free: list[Tensor] = []  # memory of earlier passes, kept, since new memory costs a tenth of a step

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """As `UNet.forward`.

        Raises:
            RuntimeError: in a backward pass with ``create_graph=True``.
        """
        unet = self.unet
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        if not self._fits(x, t, dtype):
            return cast(Tensor, unet(x, t) if label is None else unet(x, t, label))
        check_conditions(unet, label=(label, unet.modulation if unet.classes else None))
        check_tensor("x", x, shape=(len(t), *unet.shape))
        films = None if unet.modulation is None else self._films(unet.modulation, t, label)
        layers = cast("list[nn.Conv2d]", [*unet.encoder, *unet.decoder, *unet.head])
        parameters = [*(layer.weight for layer in layers), *(cast(Tensor, layer.bias) for layer in layers)]
        network = ops.kernel("unet_training", x.device).Network(unet.channels, dtype)
        given = (x.contiguous(), t.contiguous(), films, *parameters)
        return cast(Tensor, _Pass.apply(self._free, self.is_fixed, network, *given))

    def _fits(self, x: Tensor, t: Tensor, dtype: torch.dtype) -> bool:
        if not (len(x) and x.dtype == t.dtype == torch.float32 and x.is_cpu and t.is_cpu and ops.is_plain(x, t)):
            return False
        if torch.is_grad_enabled() and t.requires_grad:
            return False
        return self._takes(dtype)

    def _takes(self, dtype: torch.dtype) -> bool:
        return has_native_gradients(self.unet, dtype)

    def _films(self, modulation: Modulation, t: Tensor, label: Tensor | None) -> Tensor:
        """Returns the scales - 1 and the shifts of each layer ``[B, widths]``, fp32."""
        return torch.cat(modulation(t, label), dim=1).float()


class FixedUNet(NativeUNet):
    """A copy of a `UNet`, for gradients of x alone, whose weights only `refresh` changes.

    So the kernel packs them once, and the scales and shifts of all layers are one product.

    Args:
        unet: the network, for which `has_native_gradients` holds.
    """

    is_fixed = True

    def __init__(self, unet: UNet) -> None:
        super().__init__(copy.deepcopy(unet).requires_grad_(False))
        self.config = unet.config
        self._derive()

    @torch.no_grad()
    def refresh(self, unet: UNet) -> None:
        """Copies the weights of a U-Net of the same architecture again."""
        ours, theirs = list[Tensor](self.parameters()), list[Tensor](unet.parameters())
        if all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            return
        torch._foreach_copy_(ours, theirs)
        self._derive()

    def _derive(self) -> None:
        self._free = []  # a new list, so that passes with the old weights do not return their memory to it
        if self.unet.modulation is not None:
            levels = cast("list[nn.Linear]", list(self.unet.modulation.levels))
            self._film_weight = torch.cat([level.weight for level in levels])
            self._film_bias = torch.cat([level.bias for level in levels])

    def _takes(self, dtype: torch.dtype) -> bool:
        return dtype == torch.float32

    def _films(self, modulation: Modulation, t: Tensor, label: Tensor | None) -> Tensor:
        return F.linear(modulation.embed(t, label), self._film_weight, self._film_bias)


@dataclass
class _Memory:
    """Memory of a pass, which goes back to the list of free memory with the last reference: that of the graph."""

    tensor: Tensor
    is_used: bool  # in an earlier pass
    free: list[Tensor]
    most: float  # floats that are kept

    @classmethod
    def taken(cls, free: list[Tensor], count: int, most: float) -> Self:
        """Takes memory of ``count`` floats from a list, in which none of another size remains, or makes it."""
        with suppress(IndexError):  # the list is empty; another thread may have taken its last one
            while True:
                tensor = free.pop()
                if len(tensor) == count:
                    return cls(tensor, True, free, most)
        return cls(torch.empty(count, device="cpu", dtype=torch.float32), False, free, most)

    def __del__(self) -> None:
        if len(self.tensor) <= self.most:
            self.free.append(self.tensor)


class _Pass(torch.autograd.Function):
    """The network from images, times and films to its output."""

    @staticmethod
    def forward(
        ctx: Any,
        free: list[Tensor],
        is_fixed: bool,
        network: Any,
        x: Tensor,
        t: Tensor,
        films: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        kernel, out = ops.kernel("unet_training", x.device), torch.empty_like(x)
        ctx.trains = any(ctx.needs_input_grad[5:])
        count = kernel.floats(network, x, films is not None, ctx.trains)
        memory = _Memory.taken(free, count, _MOST_KEPT if is_fixed else math.inf)
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        is_packed = is_fixed and memory.is_used
        kernel.forward(network, weights, biases, x, t, films, memory.tensor, out, ctx.trains, is_packed)
        ctx.save_for_backward(films, *(weights if ctx.trains else ()))  # the memory has what the rest needs
        ctx.network, ctx.memory = network, memory
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the native U-Net has no second derivatives: leave out create_graph=True")
        films, *weights = ctx.saved_tensors  # raises if the graph was not retained for a second pass
        needs = ctx.needs_input_grad
        kernel = ops.kernel("unet_training", d_out.device)
        given = films, d_out.contiguous(), ctx.memory.tensor, weights if ctx.trains else None
        found = kernel.backward(ctx.network, *given, needs[3])
        if not ctx.trains:
            return None, None, None, found.x, *(None for _ in needs[4:])
        gradients = (None, None, None, found.x, None, found.films, *found.weights, *found.biases)
        return tuple(each if needed else None for each, needed in zip(gradients, needs, strict=True))
