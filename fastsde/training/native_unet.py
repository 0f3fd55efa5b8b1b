"""The U-Net in training, forward and backward each in one native kernel."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from ..engines.unet_inference import supports
from ..models.labels import check_conditions
from ..models.unet import UNet
from ..validation import check_tensor

__all__ = ["NativeUNet", "can_train"]


def can_train(model: nn.Module) -> bool:
    """Returns whether the native kernel trains a network: an unmodified `UNet` in fp32 on the CPU.

    The channels of its levels are multiples of 16.
    """
    if not supports(model):
        return False
    unet, parameters = cast(UNet, model), list(model.parameters())
    plain = all(each.dtype == torch.float32 and each.is_contiguous() for each in parameters)
    if not (plain and ops.has_native(parameters[0].device, "unet_training_forward")):
        return False
    takes: bool = ops.kernel("unet_training", parameters[0].device).takes(unet.channels)
    return takes


class NativeUNet(nn.Module):
    """A `UNet` in training, called in the same way, whose convolutions are native kernels, forward and backward.

    It has the network as a submodule, and its gradients are those of the network's weights. What they do not compute,
    the network does: under autocast, with gradients of x or t, where it has been hooked or changed, under
    ``torch.compile`` and the transformations of ``torch.func``.

    A backward pass frees the memory of its forward pass, so that there is no second one, and no second derivative.

    Args:
        unet: the network, for which `can_train` holds.
    """

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet
        self._free: list[Tensor] = []  # memory for passes, kept: new memory costs as much as a tenth of a step

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """As `UNet.forward`."""
        unet = self.unet
        if not self._fits(x, t):
            result: Tensor = unet(x, t) if label is None else unet(x, t, label)
            return result
        check_conditions(unet, label=(label, unet.modulation if unet.classes else None))
        check_tensor("x", x, shape=(len(t), *unet.shape))
        films = None if unet.modulation is None else torch.cat(unet.modulation(t, label), dim=1)
        layers = cast("list[nn.Conv2d]", [*unet.encoder, *unet.decoder, *unet.head])
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        result = _Pass.apply(self._free, unet.channels, x.contiguous(), t.contiguous(), films, *weights, *biases)
        return result

    def _fits(self, x: Tensor, t: Tensor) -> bool:
        if not (len(x) and x.dtype == t.dtype == torch.float32 and x.is_cpu and t.is_cpu and ops.is_plain(x, t)):
            return False
        if torch.is_autocast_enabled("cpu") or (torch.is_grad_enabled() and (x.requires_grad or t.requires_grad)):
            return False
        return can_train(self.unet)


class _Pass(torch.autograd.Function):
    """The network from images, times and films to its output."""

    @staticmethod
    def forward(
        ctx: Any,
        free: list[Tensor],
        channels: tuple[int, ...],
        x: Tensor,
        t: Tensor,
        films: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        kernel = ops.kernel("unet_training", x.device)
        count, out = kernel.floats(x, channels, films is not None), torch.empty_like(x)
        fitting = [each for each in free if len(each) == count]
        free.clear()  # of other sizes, too
        memory = fitting[0] if fitting else x.new_empty(count)
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        kernel.forward(channels, weights, biases, x, t, films, memory, out)
        ctx.save_for_backward(*weights, *(() if films is None else (films,)))
        ctx.free, ctx.channels, ctx.memory = free, channels, memory
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        weights, films = ctx.saved_tensors, None
        if ctx.needs_input_grad[4] or len(weights) % 2 == 0:
            *weights, films = weights
        memory, ctx.memory = ctx.memory, None
        if memory is None:
            raise RuntimeError("the native U-Net has been through this backward pass, which frees its memory")
        kernel = ops.kernel("unet_training", d_out.device)
        gradients = kernel.backward(ctx.channels, films, d_out.contiguous(), memory, weights)
        ctx.free.append(memory)
        d_weights, d_biases, d_films = gradients
        needed = ctx.needs_input_grad[5:]
        d_parameters = (each if needs else None for each, needs in zip([*d_weights, *d_biases], needed, strict=True))
        return None, None, None, None, d_films, *d_parameters
