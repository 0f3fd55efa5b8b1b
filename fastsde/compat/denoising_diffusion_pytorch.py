"""denoising-diffusion-pytorch (https://github.com/lucidrains/denoising-diffusion-pytorch), its samplers run as tables.

Its diffusions (``GaussianDiffusion``, ``GaussianDiffusion1D``, ``ElucidatedDiffusion`` and others) hold a network and
sample by a method. Clipping of the predicted data, self-conditioning and DDIM are part of the rows;
``LearnedGaussianDiffusion`` needs ``replay=True`` for its learned variances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..tracing import Accelerated
from ..tracing import accelerate as accelerate_loop

__all__ = ["AcceleratedDiffusion", "accelerate"]

_METHODS = ("sample", "p_sample_loop", "ddim_sample", "sample_using_dpmpp")


class AcceleratedDiffusion:
    """A diffusion that is used as the one that it was made of; ``sample`` and the like run as tables.

    Args:
        diffusion: the one that it is made of.
        loops: its methods that run as tables, by name.
    """

    def __init__(self, diffusion: nn.Module, loops: dict[str, Accelerated]) -> None:
        self.diffusion, self._loops = diffusion, loops

    def with_options(self, **changes: Any) -> AcceleratedDiffusion:
        """Returns the same diffusion with other options, such as ``seed``; traces are shared."""
        loops = {name: loop.with_options(**changes) for name, loop in self._loops.items()}
        return AcceleratedDiffusion(self.diffusion, loops)

    def __getattr__(self, name: str) -> Any:
        if name in ("diffusion", "_loops"):  # not yet there, as in a copy
            raise AttributeError(name)
        return self._loops[name] if name in self._loops else getattr(self.diffusion, name)


def accelerate(
    diffusion: nn.Module, *, modules: Sequence[nn.Module] | None = None, **options: Any
) -> AcceleratedDiffusion:
    """Returns a diffusion that is used as the given one: ``accelerate(diffusion).sample(batch_size=16)``.

    Its methods ``sample``, ``p_sample_loop``, ``ddim_sample`` and ``sample_using_dpmpp``, as far as it has them, are
    `fastsde.tracing.Accelerated`: ``fast.sample.explain()`` says how the last call ran.

    Args:
        diffusion: one of the package's diffusions.
        modules: the networks; by default its ``model`` or ``net``.
        options: of `fastsde.accelerate`, such as noise, seed, backend, compile or replay.

    Raises:
        TypeError: if it has no ``sample``, or no network and no modules are given.
    """
    if not callable(getattr(diffusion, "sample", None)):
        raise TypeError(f"diffusion must have a method sample, got {type(diffusion).__name__}")
    if modules is None:
        own = next((getattr(diffusion, name) for name in ("model", "net") if hasattr(diffusion, name)), None)
        if not isinstance(own, nn.Module):
            raise TypeError(f"modules must name the networks that {type(diffusion).__name__} calls: it has no model")
        modules = [own]
    names = [name for name in _METHODS if hasattr(diffusion, name)]
    loops = {name: accelerate_loop(getattr(diffusion, name), modules=modules, **options) for name in names}
    return AcceleratedDiffusion(diffusion, loops)
