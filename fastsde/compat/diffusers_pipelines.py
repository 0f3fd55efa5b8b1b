"""diffusers' pipelines, accelerated: their own call is traced up to the VAE."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import require
from ..tracing import Accelerated, Traced, TraceError
from ..tracing import accelerate as accelerate_loop

__all__ = ["AcceleratedPipeline", "accelerate"]

_NETWORKS = ("unet", "transformer")


def accelerate(pipeline: Any, **options: Any) -> AcceleratedPipeline:
    """Returns a pipeline that is called as before, with the same arguments and result, and runs as a table.

    A new combination of arguments, or another scheduler or network, is traced and checked once and kept (see
    `fastsde.accelerate`). Pipelines without a VAE, such as DDPMPipeline and DDIMPipeline, and DiTPipeline give all that
    they give; other latent pipelines give latents, with ``output_type="latent"``.

    With noise="contract" the images are a function of ``seed`` (``with_options(seed=7)`` changes it), and a
    ``generator`` is an error, since it would change nothing. With noise="torch" the draws are the pipeline's own, from
    the ``generator`` or PyTorch's, and so are the images, to rounding.

    Args:
        pipeline: a pipeline whose network is its ``unet`` or ``transformer``.
        options: noise, seed, backend, compile, dtype, check and replay, as for `fastsde.accelerate`.

    Raises:
        TypeError: if it has no such network, or for an unknown option.
        TraceError: in a call, if no table can follow the pipeline's loop.
    """
    if not any(isinstance(getattr(pipeline, name, None), nn.Module) for name in _NETWORKS) or not callable(pipeline):
        raise TypeError(f"pipeline must have a unet or a transformer, got {type(pipeline).__name__}")
    for name in ("network", "modules", "state"):
        if name in options:
            raise TypeError(f"{name} is found in the pipeline: leave it out")
    accelerate_loop(pipeline.__call__, **options)  # for its errors
    return AcceleratedPipeline(pipeline, options)


class AcceleratedPipeline:
    """A pipeline, accelerated (see `accelerate`). Its attributes are the pipeline's own, also when they are set.

    Args:
        pipeline: the pipeline itself.
        options: as for `accelerate`.
    """

    def __init__(self, pipeline: Any, options: Mapping[str, Any]) -> None:
        own = {"pipeline": pipeline, "_options": options, "_fast": None, "_of": None}
        self.__dict__.update(own, __signature__=inspect.signature(pipeline.__call__))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask before there is a pipeline
            raise AttributeError(name)
        return getattr(self.__dict__["pipeline"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.pipeline, name, value)

    def __reduce__(self) -> Any:  # copies are traced again
        return type(self), (self.pipeline, self._options)

    def __repr__(self) -> str:
        return f"accelerate({type(self.pipeline).__name__})"

    def to(self, *args: Any, **kwargs: Any) -> AcceleratedPipeline:
        """Moves the pipeline as its own ``to`` does, and returns this one."""
        self.pipeline.to(*args, **kwargs)
        return self

    def with_options(self, **changes: Any) -> AcceleratedPipeline:
        """Returns the same pipeline with other options, such as ``seed``; traces are shared."""
        found = accelerate(self.pipeline, **{**self._options, **changes})
        if self._fast is not None:
            found.__dict__.update(_fast=self._fast.with_options(**changes), _of=self._of)
        return found

    @property
    def traced(self) -> Traced | None:
        """The trace of the last call, or None before the first."""
        fast: Accelerated | None = self._fast
        return None if fast is None else fast.traced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the pipeline, with its own arguments and result."""
        bound = self.__dict__["__signature__"].bind(*args, **kwargs)
        bound.apply_defaults()
        call = dict(bound.arguments)
        call.update(call.pop("kwargs", {}))
        if self._options.get("noise", "contract") == "contract" and call.get("generator") is not None:
            raise ValueError(
                "generator needs noise='torch': with noise='contract' the images are a function of seed, which is an "
                "option of accelerate and of with_options"
            )
        name, kind = type(self.pipeline).__name__, call.get("output_type")
        has_vae, is_dit = getattr(self.pipeline, "vae", None) is not None, name == "DiTPipeline"
        if has_vae and not is_dit and kind != "latent":
            instead = "ask for output_type='latent', and decode them by the pipeline's vae"
            raise TraceError("output_type", f"only latents come out of a table, not {kind!r}", name, instead)
        found = self._run({**call, "output_type": "pt"} if kind in ("np", "pil") else call)
        if is_dit:
            with torch.no_grad():
                images = (self.pipeline.vae.decode(found).sample / 2 + 0.5).clamp(0, 1)
            found = _image_output(), {"images": images}
            found = found if call["return_dict"] else (images,)
        if not isinstance(found, tuple) or not isinstance(found[0], type):
            return (self._images(found[0], kind), *found[1:]) if isinstance(found, tuple) else found
        cls, fields = found
        return cls(**{key: self._images(x, kind) if key == "images" else x for key, x in fields.items()})

    def _run(self, call: Mapping[str, Any]) -> Any:
        network = next(net for name in _NETWORKS if isinstance(net := getattr(self.pipeline, name, None), nn.Module))
        state = "latents" if isinstance(call.get("latents"), Tensor) else None
        if self._of != (network, state):
            fast = accelerate_loop(_loop_of(self.pipeline), modules=[network], state=state, **self._options)
            self.__dict__.update(_fast=fast, _of=(network, state))
        return self._fast(**call)

    def _images(self, images: Any, kind: str | None) -> Any:
        """Returns images as the pipeline gives them for an output type."""
        if kind not in ("np", "pil"):
            return images
        images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.pipeline.numpy_to_pil(images) if kind == "pil" else images


def _image_output() -> Any:
    return require("diffusers", extra="diffusers", what="the output of pipelines").ImagePipelineOutput


class _Latents(Exception):  # noqa: N818 (the end of the traced part)
    """What a VAE is to decode."""


class _Undecoded:
    """Stands for the VAE in the traced loop, and ends it."""

    def __init__(self, vae: Any) -> None:
        self.config = vae.config

    def decode(self, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _Latents(latents)


def _loop_of(pipeline: Any) -> Callable[..., Any]:
    """Returns the pipeline's call up to the VAE, on copies of itself and its scheduler; an output object is returned as
    its class and fields.
    """

    def loop(**call: Any) -> Any:
        own = copy.copy(pipeline)
        own.scheduler = copy.deepcopy(pipeline.scheduler)
        own.set_progress_bar_config(disable=True)
        if getattr(pipeline, "vae", None) is not None:
            own.__dict__["vae"] = _Undecoded(pipeline.vae)
        try:
            found = own(**call)
        except _Latents as end:
            return end.args[0]
        if not dataclasses.is_dataclass(found):
            return found
        return type(found), {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}

    loop.__name__ = type(pipeline).__name__
    return loop
