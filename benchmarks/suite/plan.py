"""The settings of a run of the suite."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Plan:
    """A device, and whether to use small sizes.

    Args:
        quick: small sizes, which take three minutes on two cores.
        tiny: with ``quick``, the smallest sizes at which providers can be checked. Their times say nothing.
    """

    device: torch.device
    quick: bool = False
    tiny: bool = False

    @property
    def enough_s(self) -> float:
        """Seconds of a provider after which three rounds are enough."""
        return 0.7 if self.quick else 2.0 if self.has_gpu else 6.0

    @property
    def has_gpu(self) -> bool:
        return self.device.type == "cuda"
