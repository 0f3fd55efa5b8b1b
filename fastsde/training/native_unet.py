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


def can_train(model: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    """Returns whether the native kernel trains a network: an unmodified `UNet` in fp32 on the CPU.

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
    """A `UNet` in training, called in the same way, whose convolutions are native kernels, forward and backward.

    It has the network as a submodule, and its gradients are those of the network's weights. Under autocast to bf16 its
    signals and products are bf16, if the CPU multiplies it; its sums and its output are fp32. What the kernels do not
    compute, the network itself does: gradients of x or t, other autocast dtypes, a network that has been changed or
    hooked, ``torch.compile``, and the transformations of ``torch.func``. Results do not depend on the threads.

    A backward pass frees the memory of its forward pass, so that there is no second one, and no second derivative.

    Args:
        unet: the network, for which `can_train` holds.
    """

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet
        self._free: list[Tensor] = []  # memory of earlier passes, kept, since new memory costs a tenth of a step

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """As `UNet.forward`."""
        unet = self.unet
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        if not self._fits(x, t, dtype):
            return cast(Tensor, unet(x, t) if label is None else unet(x, t, label))
        check_conditions(unet, label=(label, unet.modulation if unet.classes else None))
        check_tensor("x", x, shape=(len(t), *unet.shape))
        films = None if unet.modulation is None else torch.cat(unet.modulation(t, label), dim=1).float()
        layers = cast("list[nn.Conv2d]", [*unet.encoder, *unet.decoder, *unet.head])
        parameters = [*(layer.weight for layer in layers), *(cast(Tensor, layer.bias) for layer in layers)]
        network = ops.kernel("unet_training", x.device).Network(unet.channels, dtype)
        passed = _Pass.apply(self._free, network, x.contiguous(), t.contiguous(), films, *parameters)
        return cast(Tensor, passed)

    def _fits(self, x: Tensor, t: Tensor, dtype: torch.dtype) -> bool:
        if not (len(x) and x.dtype == t.dtype == torch.float32 and x.is_cpu and t.is_cpu and ops.is_plain(x, t)):
            return False
        if torch.is_grad_enabled() and (x.requires_grad or t.requires_grad):
            return False
        return can_train(self.unet, dtype)


class _Pass(torch.autograd.Function):
    """The network from images, times and films to its output."""

    @staticmethod
    def forward(
        ctx: Any, free: list[Tensor], network: Any, x: Tensor, t: Tensor, films: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        kernel = ops.kernel("unet_training", x.device)
        count, out = kernel.floats(network, x, films is not None), torch.empty_like(x)
        fitting = [each for each in free if len(each) == count]
        free.clear()  # also of what no longer fits
        memory = fitting[0] if fitting else x.new_empty(count)
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        kernel.forward(network, weights, biases, x, t, films, memory, out)
        ctx.save_for_backward(films, *weights)
        ctx.free, ctx.network, ctx.memory = free, network, memory
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        films, *weights = ctx.saved_tensors
        memory, ctx.memory = ctx.memory, None
        if memory is None:
            raise RuntimeError("this backward pass of the native U-Net has run before, and freed its memory")
        kernel = ops.kernel("unet_training", d_out.device)
        d_weights, d_biases, d_films = kernel.backward(ctx.network, films, d_out.contiguous(), memory, weights)
        ctx.free.append(memory)
        gradients = (None, None, None, None, d_films, *d_weights, *d_biases)
        return tuple(each if needs else None for each, needs in zip(gradients, ctx.needs_input_grad, strict=True))
