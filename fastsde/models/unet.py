"""The tutorial's U-Net for images, generalized to any channels and image size."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..validation import check_int, check_ints
from .labels import LabelEmbedding, check_conditions
from .sinusoidal import Sinusoidal

__all__ = ["UNet"]

FREQUENCY = 100.0  # the highest of the embedding of t, in radians; times end at about 1


class UNet(nn.Module):
    """3x3 convolutions with LogSigmoid; t enters as one more constant channel.

    The encoder has convolutions to ``channels[0]``, ``channels[1]``, ..., each but the first after a 2x2 max-pool that
    rounds odd sizes up (28, 14, 7, 4, 2). The decoder doubles the size back with 3x3 stride-2 transposed convolutions;
    all but the first take the skip connection of their size, concatenated behind the signal. A 3x3 convolution,
    LogSigmoid and a last 3x3 convolution return to the image's channels. 2,361,409 parameters by default.

    With an ``embedding``, t and a label also enter every level: their embedding, through a Linear layer for each
    convolution but the last, scales and shifts its output (FiLM, Perez et al. 2017, arXiv:1709.07871): (1 + a) y + b.
    These layers start at zero, where this is the tutorial's network.

    Args:
        image_channels: channels of the images.
        image_size: height and width of the images, or one number for both.
        channels: channels of the encoder's levels, at least two.
        embedding: the width of the embedding of t and the label, an even number of at least 4; 0 for the tutorial's
            network, without one.
        classes: the number of classes, for a network that also takes a ``label``; 0 for none.

    Raises:
        TypeError, ValueError: for sizes that are not positive ints, or fewer than two levels; for classes without an
            embedding.
    """

    def __init__(
        self,
        image_channels: int = 1,
        image_size: int | Sequence[int] = 28,
        channels: Sequence[int] = (32, 64, 128, 256, 256),
        embedding: int = 0,
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.embedding, self.classes = check_int("embedding", embedding, 0), check_int("classes", classes, 0)
        if embedding % 2 or embedding == 2:
            raise ValueError(f"embedding must be 0 or an even number of at least 4, got {embedding}")
        if classes and not embedding:
            raise ValueError("embedding must be positive for a network with classes, got 0")
        size = (image_size, image_size) if isinstance(image_size, numbers.Integral) else image_size
        self.image_size, self.channels = check_ints("image_size", size, 1), check_ints("channels", channels, 1)
        self.image_channels = check_int("image_channels", image_channels, 1)
        if len(self.channels) < 2:
            raise ValueError(f"channels must be at least two, got {self.channels}")
        if len(self.image_size) != 2:
            raise ValueError(f"image_size must be one number or (height, width), got {self.image_size}")
        height, width = self.image_size
        sizes = [(height, width)]
        for _ in self.channels[1:]:
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))

        inputs = (image_channels + 1, *self.channels[:-1])
        self.encoder = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip(inputs, self.channels, strict=True))
        self.decoder = nn.ModuleList()
        signal = self.channels[-1]
        for level in range(len(self.channels) - 2, -1, -1):
            output = self.channels[level]
            even = (1 - sizes[level][0] % 2, 1 - sizes[level][1] % 2)
            self.decoder.append(nn.ConvTranspose2d(signal, output, 3, stride=2, padding=1, output_padding=even))
            signal = output + self.channels[level]
        self.head = nn.ModuleList(
            (
                nn.Conv2d(signal, self.channels[0], 3, padding=1),
                nn.Conv2d(self.channels[0], image_channels, 3, padding=1),
            )
        )
        widths = [*self.channels, *reversed(self.channels[:-1]), self.channels[0]]
        self.modulation = Modulation(embedding, classes, widths) if embedding else None

    @property
    def config(self) -> dict[str, Any]:
        """The arguments from which `fastsde.models.from_config` builds this architecture."""
        return {
            "architecture": "UNet",
            "image_channels": self.image_channels,
            "image_size": list(self.image_size),
            "channels": list(self.channels),
            **{name: value for name in ("embedding", "classes") if (value := getattr(self, name))},
        }

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return (self.image_channels, *self.image_size)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Maps x ``[B, C, H, W]`` and t ``[B]`` to ``[B, C, H, W]``.

        Args:
            label: integers ``[B]`` in [0, classes]; None, like ``classes``, stands for no label.

        Raises:
            TypeError: for a label if the network has no classes.
        """
        check_conditions(self, label=(label, self.modulation if self.classes else None))
        films = iter(() if self.modulation is None else self.modulation(t, label))
        signal = self._with_time(x, t)
        skips: list[Tensor] = []
        for level, convolution in enumerate(self.encoder):
            if level:
                skips.append(signal)
                height, width = signal.shape[2:]
                signal = F.max_pool2d(signal, 2, padding=(height % 2, width % 2))
            signal = F.logsigmoid(_modulated(convolution(signal), films))
        for level, convolution in enumerate(self.decoder):
            if level:
                signal = torch.cat((signal, skips.pop()), dim=1)
            signal = F.logsigmoid(_modulated(convolution(signal), films))
        signal = F.logsigmoid(_modulated(self.head[0](torch.cat((signal, skips.pop()), dim=1)), films))
        result: Tensor = self.head[1](signal)
        return result

    def _with_time(self, x: Tensor, t: Tensor) -> Tensor:
        """Joins x and t to one image ``[B, C + 1, H, W]``, in channels_last if the weights are.

        The first convolution would otherwise copy it to that layout, and again in its backward.
        """
        plane, first = t.to(x.dtype)[:, None, None, None], cast(nn.Conv2d, self.encoder[0])
        if not first.weight.is_contiguous(memory_format=torch.channels_last):
            return torch.cat((x, plane.expand(-1, 1, *x.shape[2:])), dim=1)
        image = torch.cat((x.movedim(1, -1), plane.expand(-1, *x.shape[2:], 1)), dim=-1)
        return image.movedim(-1, 1)


class Modulation(nn.Module):
    """The scales and shifts that t and a label give each channel of each level of a `UNet`.

    Args:
        width: of the embedding.
        classes: the number of classes, or 0 for no labels.
        widths: the channels of each convolution.
    """

    def __init__(self, width: int, classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.time, self.first = Sinusoidal(width, FREQUENCY), nn.Linear(width, width)
        self.labels = LabelEmbedding(classes, width) if classes else None
        self.second = nn.Linear(width, width)
        self.levels = nn.ModuleList(nn.Linear(width, 2 * channels) for channels in widths)
        for level in self.levels:
            nn.init.zeros_(cast(nn.Linear, level).weight)
            nn.init.zeros_(cast(nn.Linear, level).bias)

    def embed(self, t: Tensor, label: Tensor | None) -> Tensor:
        """Maps t ``[B]`` and labels ``[B]`` to their embedding ``[B, width]``."""
        embedded: Tensor = self.second(F.silu(self.first(self.time(t).to(self.first.weight.dtype))))
        if self.labels is not None:
            embedded = embedded + self.labels(label, t)
        return F.silu(embedded)

    def forward(self, t: Tensor, label: Tensor | None) -> list[Tensor]:
        """Maps t ``[B]`` and labels ``[B]`` to ``[B, 2 * channels]`` for each convolution: scales - 1, then shifts."""
        embedded = self.embed(t, label)
        return [level(embedded) for level in self.levels]


def _modulated(signal: Tensor, films: Iterator[Tensor]) -> Tensor:
    """Scales and shifts an image by the next vectors ``[B, 2 * C]``, if there are any."""
    film = next(films, None)
    if film is None:
        return signal
    scale, shift = film.to(signal.dtype)[:, :, None, None].chunk(2, dim=1)
    return signal * (1 + scale) + shift
