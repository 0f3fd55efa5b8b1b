"""azula's samplers (https://github.com/probabilists/azula), run as tables.

A sampler there holds a denoiser, and the denoiser a network, its backbone. The backbone is the network of the table, so
that preconditioning and guidance are part of the rows. ``DPSSampler`` and others that need gradients through the
network are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..tracing import Traced
from ..tracing import accelerate as accelerate_loop

__all__ = ["AcceleratedSampler", "accelerate"]


class AcceleratedSampler:
    """A sampler that is used as the one that it was made of: ``fast(x, **kwargs)``, ``fast.init``, ``fast.steps``.

    Args:
        sampler: the one that it is made of.
        options: of `fastsde.accelerate`.

    Attributes:
        traced: the trace of the last call, or None before the first.
    """

    def __init__(self, sampler: Any, options: dict[str, Any]) -> None:
        self.sampler, self._options = sampler, options
        self._loop = accelerate_loop(sampler, state="x", **options)
        self._whole = accelerate_loop(_Whole(sampler).sample, **options)
        self.traced: Traced | None = None

    def __call__(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Simulates the reverse process from x, as the sampler does."""
        result: Tensor = self._loop(x, **kwargs)
        self.traced = self._loop.traced
        return result

    def sample(
        self, shape: Sequence[int], mean: float | Tensor = 0.0, var: float | Tensor = 1.0, **kwargs: Any
    ) -> Tensor:
        """Draws the initial state, which the sampler's ``init`` does, and simulates the reverse process from it.

        Args:
            shape: ``(B, *shape)``.
            mean: of the data, as for ``init``.
            var: of the data, as for ``init``.
            kwargs: for the network.
        """
        result: Tensor = self._whole(tuple(shape), mean, var, **kwargs)
        self.traced = self._whole.traced
        return result

    def with_options(self, **changes: Any) -> AcceleratedSampler:
        """Returns the same sampler with other options, such as ``seed``; traces are shared."""
        other = AcceleratedSampler(self.sampler, {**self._options, **changes})
        other._loop, other._whole = self._loop.with_options(**changes), self._whole.with_options(**changes)
        return other

    def explain(self) -> str:
        """Returns how the last call ran (`Traced.explain`)."""
        if self.traced is None:
            raise RuntimeError("call the sampler once: it is traced then")
        return self.traced.explain()

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # not yet there, as in a copy
            raise AttributeError(name)
        return getattr(self.sampler, name)


class _Whole:
    """A sampler with its initial draw."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def sample(self, shape: tuple[int, ...], mean: Any, var: Any, **kwargs: Any) -> Any:
        return self.sampler(self.sampler.init(shape, mean=mean, var=var), **kwargs)


def accelerate(sampler: Any, *, modules: Sequence[nn.Module] | None = None, **options: Any) -> AcceleratedSampler:
    """Returns a sampler that is used as the given one, and runs as a table.

    Args:
        sampler: an ``azula.sample.Sampler``.
        modules: the networks; by default the backbone of its denoiser.
        options: of `fastsde.accelerate`, such as noise, seed, backend or compile.

    Raises:
        TypeError: if it is no sampler, or has a denoiser without backbone and no modules are given.
    """
    denoiser = getattr(sampler, "denoiser", None)
    if not callable(sampler) or (denoiser is None and modules is None):
        raise TypeError(f"sampler must be an azula sampler, which has a denoiser, got {type(sampler).__name__}")
    return AcceleratedSampler(sampler, {**options, "modules": _backbones(denoiser) if modules is None else modules})


def _backbones(denoiser: Any) -> list[nn.Module]:
    """Returns the network that a denoiser, or a guidance around one, holds."""
    seen = denoiser
    while not isinstance(getattr(seen, "backbone", None), nn.Module):
        seen = getattr(seen, "denoiser", None)
        if seen is None:
            raise TypeError(f"modules must name the networks that {type(denoiser).__name__} calls: it has no backbone")
    return [seen.backbone]
