"""The U-Net for sampling: the same function of the same weights, in fewer and cheaper passes over memory."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, tf32
from ..models.hooks import is_hooked
from ..models.labels import LabelEmbedding, check_conditions
from ..models.sinusoidal import Sinusoidal
from ..models.unet import FREQUENCY, Modulation, UNet
from ..validation import check_tensor

__all__ = ["UNetInference", "log_sigmoid_", "supports"]

_MAX_PIXELS = 2**29  # of a batch in the Triton kernels, which count them, with padding, in int32


def supports(model: object) -> bool:
    """Returns whether a network is exactly a `UNet`: no subclass, no other layers, no hooks."""
    if type(model) is not UNet or is_hooked(model) or len(model.head) != 2:
        return False
    convolutions = all(_is_plain(layer, nn.Conv2d, stride=1) for layer in (*model.encoder, *model.head))
    transposed = all(_is_plain(layer, nn.ConvTranspose2d, stride=2) for layer in model.decoder)
    return convolutions and transposed and (model.modulation is None or _is_modulation(model.modulation, model))


def _is_plain(layer: Any, kind: Any, stride: int) -> bool:
    """Returns whether a layer is a 3x3 convolution of the given stride, with zero padding and a bias."""
    if type(layer) is not kind or layer.bias is None:
        return False
    form = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode
    return bool(form == ((3, 3), (stride, stride), (1, 1), (1, 1), 1, "zeros"))


def _is_modulation(module: Any, unet: Any) -> bool:
    """Returns whether a module is exactly the `Modulation` of a U-Net: no subclass, no other layers or frequencies."""
    if type(module) is not Modulation or type(module.time) is not Sinusoidal:
        return False
    if (module.time.width, module.time.scale) != (unet.embedding, FREQUENCY):
        return False
    if module.labels is not None and (type(module.labels) is not LabelEmbedding or module.labels.max_norm is not None):
        return False
    linears = (module.first, module.second, *module.levels)
    if not all(type(each) is nn.Linear and each.bias is not None for each in linears):
        return False
    layers = (*unet.encoder, *unet.decoder, *unet.head[:1])
    return [each.out_features for each in module.levels] == [2 * len(each.bias) for each in layers]


def log_sigmoid_(v: Tensor) -> Tensor:
    """Returns min(v, 0) - log1p(exp(-|v|)); ``v`` may be overwritten.

    On the CPU it works in place and by exp2, in half the time of F.logsigmoid, and in fp32 for narrower dtypes.
    """
    if torch.compiler.is_compiling() or v.device.type != "cpu":
        return F.logsigmoid(v)
    wide = v.float() if v.dtype in (torch.bfloat16, torch.float16) else v
    logarithm = wide.abs().mul_(-math.log2(math.e)).exp2_().log1p_()
    return wide.clamp_(max=0).sub_(logarithm).to(v.dtype)


class UNetInference(nn.Module):
    """A `UNet` for inference, called in the same way. It has no gradients.

    Weights and activations are channels last. Where the Triton kernels run, each convolution is one kernel, which also
    adds the bias, applies the log sigmoid, pools, and writes into the buffer from which the decoder reads signal and
    skip, so that nothing is concatenated. The first one also adds the contribution of the time, t times a fixed image.
    fp32 is multiplied in TF32 if PyTorch's convolutions are, else by three TF32 products, nearly as exact. On the CPU
    the whole network is one native kernel, in fp32 and, if the CPU multiplies it, bf16, for channels that are multiples
    of 16. Elsewhere, under torch.compile and under autocast, it is the U-Net in plain PyTorch.

    The scales and shifts of an embedding are computed for all layers at once, in fp32, and applied with the bias.

    The weights are copies, which only `refresh` may change, in place: the kernels read other forms of them, which it
    makes anew.

    Args:
        unet: the U-Net whose weights to copy, to the same device.
        dtype: the dtype of the copies; by default that of the weights.

    Raises:
        TypeError: for a network that `supports` rejects, or a dtype that is not floating-point.
    """

    # Any, since their layers are read, not called.
    encoder: Any
    decoder: Any
    head: Any
    image_weight: Tensor  # [C, image channels, 3, 3]: the first convolution's weights except those of t
    film_weight: Tensor  # [widths, embedding], of the levels of the modulation, one after the other
    film_bias: Tensor
    plane: Tensor  # [H, W, C], fp32 or wider: the first convolution at t = 1 on an image of zeros, without bias

    def __init__(self, unet: UNet, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not supports(unet):
            raise TypeError(f"unet must be an unmodified UNet, without hooks or other layers, got {unet!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype!r}")
        self.config, self.shape = unet.config, unet.shape
        layers: dict[str, Any] = {"dtype": dtype, "memory_format": torch.channels_last}
        self.encoder, self.decoder, self.head = (
            copy.deepcopy(each).requires_grad_(False).to(**layers) for each in (unet.encoder, unet.decoder, unet.head)
        )
        weight = self.encoder[0].weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        # Small, and t in a narrower dtype would lose most of its digits.
        self.modulation = copy.deepcopy(unet.modulation)
        if self.modulation is not None:
            self.modulation.requires_grad_(False).to(wide)
            widths = sum(level.out_features for level in self.modulation.levels)  # type: ignore[misc]
            width = self.modulation.second.out_features
            self.register_buffer("film_weight", weight.new_empty((widths, width), dtype=wide), persistent=False)
            self.register_buffer("film_bias", weight.new_empty(widths, dtype=wide), persistent=False)
        self.training = unet.training
        images = torch.empty_like(weight[:, :-1], memory_format=torch.channels_last)
        self.register_buffer("image_weight", images)
        self.register_buffer("plane", weight.new_empty((*unet.image_size, len(weight)), dtype=wide))
        if ops.has_triton(weight.device):
            for level, layer in enumerate(self.decoder):
                taps = layer.weight.permute(1, 2, 3, 0)
                self.register_buffer(f"decoder_taps_{level}", taps.new_empty(taps.shape), persistent=False)
            if weight.dtype == torch.float32:
                for number, taps in enumerate(self._taps()):
                    self.register_buffer(f"tf32_taps_{number}", taps.new_empty(taps.shape), persistent=False)
        self._packed: tuple[Any, Any] | None = None  # the weights it was made from, and the native kernel's form
        self._derive()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    @torch.no_grad()
    def refresh(self, unet: UNet) -> None:
        """Copies the weights of the U-Net again, in place.

        Raises:
            ValueError: for a U-Net of another configuration.
        """
        if not supports(unet) or unet.config != self.config:
            raise ValueError(f"unet must be a UNet of {self.config}, got {getattr(unet, 'config', unet)}")
        ours: list[Tensor] = list(self.parameters())
        theirs: list[Tensor] = list(unet.parameters())
        if self.is_native and all(torch.equal(a, b.to(a.dtype)) for a, b in zip(ours, theirs, strict=True)):
            return  # the comparison costs less than packing them again
        torch._foreach_copy_(ours, theirs)
        self._packed = None
        self._derive()

    @property
    def _has_taps(self) -> bool:
        return "decoder_taps_0" in self._buffers

    @property
    def _has_tf32_taps(self) -> bool:
        return "tf32_taps_0" in self._buffers

    def _taps(self) -> list[Tensor]:
        """Returns the weights of all convolutions but the first as the Triton kernels read them, [out, 3, 3, in]."""
        return [
            *(layer.weight.permute(0, 2, 3, 1) for layer in self.encoder[1:]),
            *(self.get_buffer(f"decoder_taps_{level}") for level in range(len(self.decoder))),
            *(layer.weight.permute(0, 2, 3, 1) for layer in self.head),
        ]

    def _tf32_taps(self) -> list[Tensor]:
        """Returns `_taps` rounded to TF32, since tensor cores would truncate them."""
        return [self.get_buffer(f"tf32_taps_{number}") for number in range(len(self.encoder) + len(self.decoder) + 1)]

    @torch.no_grad()
    def _derive(self) -> None:
        if self._has_taps:
            for level, layer in enumerate(self.decoder):
                self.get_buffer(f"decoder_taps_{level}").copy_(layer.weight.permute(1, 2, 3, 0))
            if self._has_tf32_taps:
                taps = self._taps()
                scaled = torch._foreach_mul(taps, 2.0**13 + 1)  # as `fastsde.tf32.rounded`, in few launches
                torch._foreach_copy_(self._tf32_taps(), torch._foreach_sub(scaled, torch._foreach_sub(scaled, taps)))
        if self.modulation is not None:
            torch.cat([level.weight for level in self.modulation.levels], out=self.film_weight)  # type: ignore[misc]
            torch.cat([level.bias for level in self.modulation.levels], out=self.film_bias)  # type: ignore[misc]
        weight = self.encoder[0].weight
        self.image_weight.copy_(weight[:, :-1])
        # Sums the taps that the zero padding leaves, one axis after the other; a convolution might use TF32.
        taps = weight[:, -1].to(self.plane.dtype)
        height, width = (F.pad(taps.new_ones(size), (1, 1)).unfold(0, 3, 1) for size in self.plane.shape[:2])
        rows = (height[None, :, :, None] * taps[:, None]).sum(2)
        self.plane.copy_((width * rows[:, :, None]).sum(3).permute(1, 2, 0))

    def films(self, t: Tensor, label: Tensor | None) -> Tensor | None:
        """Returns what t and a label scale and shift by: of each layer but the last its scales - 1, then its shifts.

        ``[B, widths]`` in fp32, or wider if the weights are, or None for a network without an embedding.
        """
        if self.modulation is None:
            return None
        wide = torch.promote_types(self.film_weight.dtype, torch.float32)  # narrower if the module was converted
        with torch.autocast(t.device.type, enabled=False):
            return F.linear(self.modulation.embed(t.to(wide), label), self.film_weight, self.film_bias).to(wide)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Maps x ``[B, C, H, W]``, t ``[B]`` and labels ``[B]`` to ``[B, C, H, W]``, contiguous.

        Raises:
            RuntimeError: if a gradient is needed.
            TypeError: for a label if the network has no classes.
            ValueError: for another shape or device of x, t or the label.
        """
        check_conditions(self, label=(label, None if self.modulation is None else self.modulation.labels))
        if torch.is_grad_enabled() and (x.requires_grad or t.requires_grad):
            raise RuntimeError("UNetInference has no gradients: use the UNet itself, or torch.no_grad()")
        check_tensor("x", x, shape=(len(x), *self.shape), device=self.plane.device)
        check_tensor("t", t, shape=(len(x),), device=self.plane.device)
        if label is not None:
            check_tensor("label", label, shape=(len(x),), device=self.plane.device)
        films = self.films(t, label)
        # torch.compile fuses plain PyTorch itself, and cannot see into the kernels.
        if not torch.compiler.is_compiling() and self._kernels_run(x):
            if ops.has_triton(x.device) and self._has_taps and math.prod(self.shape[1:]) <= _MAX_PIXELS:
                return self._fused(x, t, films)
            if self.is_native and ops.is_plain(x, t):
                return self._native(x, t, films)
        return self._plain(x, t, films)

    def _kernels_run(self, x: Tensor) -> bool:
        """Returns whether the kernels compute what PyTorch would: in the weights' dtype, and outside of autocast."""
        casts = torch.is_autocast_enabled(x.device.type)
        return x.dtype == self.image_weight.dtype and x.dtype != torch.float64 and not casts

    def _plain(self, x: Tensor, t: Tensor, films: Tensor | None) -> Tensor:
        """Runs `UNet.forward` in another layout and log sigmoid. Shared buffers and folded time do not pay on a CPU."""
        narrow = None if films is None else films.to(x.dtype)[:, :, None, None]
        pairs = self._of_each_layer(narrow)
        plane = t.to(x.dtype)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        signal = torch.cat((x, plane), dim=1).contiguous(memory_format=torch.channels_last)
        skips: list[Tensor] = []
        for level, layer in enumerate(self.encoder):
            if level:
                skips.append(signal)
                height, width = signal.shape[2:]
                signal = F.max_pool2d(signal, 2, padding=(height % 2, width % 2))
            signal = log_sigmoid_(_modulated(F.conv2d(signal, layer.weight, layer.bias, padding=1), pairs))
        for layer in self.decoder:
            signal = log_sigmoid_(_modulated(_upsample(layer, signal, layer.bias), pairs))
            signal = torch.cat((signal, skips.pop()), dim=1)
        first, last = self.head
        signal = log_sigmoid_(_modulated(F.conv2d(signal, first.weight, first.bias, padding=1), pairs))
        return F.conv2d(signal, last.weight, last.bias, padding=1).contiguous()

    def _of_each_layer(self, films: Tensor | None) -> Iterator[Tensor]:
        """Returns from `films` ``[B, widths, ...]`` the part of each layer, or none without an embedding."""
        if films is None or self.modulation is None:
            return iter(())
        widths: list[int] = [level.out_features for level in self.modulation.levels]  # type: ignore[misc]
        return iter(torch.split(films, widths, dim=1))

    @property
    def is_native(self) -> bool:
        """Whether the network is one native kernel on its device."""
        if not ops.has_native(self.plane.device):
            return False
        from ..kernels.cpu import unet as native

        return bool(native.takes(self.config["channels"], self.image_weight.dtype))

    def _native(self, x: Tensor, t: Tensor, films: Tensor | None) -> Tensor:
        """Runs one native kernel, with weights in its own layout."""
        from ..kernels.cpu import unet as native

        convolutions = [
            *(
                (layer.weight if level else self.image_weight, layer.bias, False)
                for level, layer in enumerate(self.encoder)
            ),
            *((layer.weight, layer.bias, True) for layer in self.decoder),
            *((layer.weight, layer.bias, False) for layer in self.head),
        ]
        tensors = [each for weight, bias, _ in convolutions for each in (weight, bias)]
        counted = not any(each.is_inference() for each in tensors)  # whether PyTorch counts writes to them
        of = [(each.data_ptr(), each._version) for each in tensors] if counted else None
        known, packed = self._packed or (None, None)
        if of is None or known != of:
            with torch.no_grad():
                packed = native.Packed(convolutions, self.plane, x.dtype)
            self._packed = (of, packed)
        out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        inputs = x.float().contiguous(), t.float().contiguous()
        native.unet(packed, self.config["channels"], *inputs, None if films is None else films.contiguous(), out)
        return out.to(x.dtype)

    def _precision(self) -> str:
        """Returns how the Triton kernels multiply; in fp32 by PyTorch's switch for convolutions."""
        if self.image_weight.dtype != torch.float32:
            return "narrow"
        may_round = self._has_tf32_taps and tf32.may_multiply(convolutions=True, device=self.plane.device)
        return "tf32" if may_round else "tf32x3"

    def _fused(self, x: Tensor, t: Tensor, films: Tensor | None) -> Tensor:
        """Runs one kernel for each convolution."""
        from ..kernels.convolution import MAX_HEAD, MAX_HEAD_CHANNELS, convolution
        from ..kernels.head_convolution import head_convolution
        from ..kernels.pooled_convolution import pooled_convolution
        from ..kernels.stem_convolution import stem_convolution

        most = _MAX_PIXELS // math.prod(x.shape[2:])
        if len(x) > most:
            return torch.cat(
                [
                    self._fused(x[i : i + most], t[i : i + most], None if films is None else films[i : i + most])
                    for i in range(0, len(x), most)
                ]
            )
        precision = self._precision()
        # Memory that a change of the module's memory format has reordered is copied back; other memory is not.
        taps = (each.contiguous() for each in (self._tf32_taps() if precision == "tf32" else self._taps()))
        convolve = functools.partial(convolution, precision=precision)
        # Views of new memory, so that in every call a layer's is as aligned as the one its kernel was compiled for.
        of_layers = self._of_each_layer(films)
        buffers: list[Tensor] = []  # [B, 2 C, H, W]: the decoder's signal in front, the encoder's behind
        signal = x.contiguous(memory_format=torch.channels_last)
        for level, layer in enumerate(self.encoder[:-1]):
            channels, (height, width) = len(layer.bias), signal.shape[2:]
            out = _empty(signal, 2 * channels, (height, width))
            pooled = _empty(signal, channels, ((height + 1) // 2, (width + 1) // 2))
            to: dict[str, Any] = {"out": out, "pooled": pooled, "first": channels, "precision": precision}
            to["film"] = next(of_layers, None)
            if level:
                pooled_convolution(signal, next(taps), layer.bias, **to)
            else:
                weight = self.image_weight.permute(0, 2, 3, 1).contiguous()
                stem_convolution(signal, weight, layer.bias, t.contiguous(), self.plane, **to)
            buffers.append(out)
            signal = pooled
        layer = self.encoder[-1]
        out = _empty(signal, len(layer.bias), signal.shape[2:])
        convolve(signal, next(taps), layer.bias, out, film=next(of_layers, None))
        for layer in self.decoder:
            signal, out = out, buffers.pop()
            convolve(signal, next(taps), layer.bias, out, transposed=True, film=next(of_layers, None))
        (first, last), film = self.head, next(of_layers, None)
        channels, size = len(last.bias), out.shape[2:]
        if channels > MAX_HEAD or len(first.bias) > MAX_HEAD_CHANNELS:
            y = _empty(out, len(first.bias), size)
            convolve(out, next(taps), first.bias, y, film=film)
            return F.conv2d(y, last.weight, last.bias, padding=1).contiguous()
        weight, head = next(taps), next(taps).flatten(0, 2)
        products = torch.empty((len(head), len(x), *size), dtype=torch.float32, device=x.device)
        convolve(out, weight, first.bias, None, head=head, products=products, film=film)
        result = torch.empty((len(x), channels, *size), dtype=x.dtype, device=x.device)
        head_convolution(products, last.bias, result)
        return result


def _modulated(signal: Tensor, pairs: Iterator[Tensor]) -> Tensor:
    """Scales and shifts an image by the next vectors ``[B, 2 C, 1, 1]``, if there are any."""
    pair = next(pairs, None)
    if pair is None:
        return signal
    scale, shift = pair.chunk(2, dim=1)
    return torch.addcmul(shift, signal, 1 + scale)


def _upsample(layer: Any, signal: Tensor, bias: Tensor | None) -> Tensor:
    # Four small convolutions, one for the pixels of each parity, or one convolution to four times the channels and a
    # shuffle, were never faster than PyTorch's own operation on a CPU.
    result: Tensor = F.conv_transpose2d(signal, layer.weight, bias, 2, 1, layer.output_padding)
    return result


def _empty(like: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    shape = (len(like), channels, *size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
