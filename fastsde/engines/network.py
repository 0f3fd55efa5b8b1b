"""The user's network as an engine calls it: fed in its own dtype, copied, compiled, or in its inference form."""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..models.unet import UNet
from ..models.unet_inference import UNetInference, supports
from ..reference import Model
from .fingerprint import Fingerprint, fingerprint

__all__ = ["Network", "device_of", "dtype_of"]

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
# What is kept of a model while it lives, whichever sampler made it.
_caches: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
_LOCK = threading.RLock()  # of what is run instead of a model


def device_of(model: Model) -> torch.device | None:
    """The device of a network's first parameter or buffer, if it has any."""
    if isinstance(model, nn.Module):
        for tensor in _tensors(model):
            return tensor.device
    return None


def dtype_of(model: Model) -> torch.dtype:
    """The dtype of a network's first floating-point parameter or buffer; fp32 where it has none."""
    if isinstance(model, nn.Module):
        for tensor in _tensors(model):
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _has_other_dtype(model: nn.Module, dtype: torch.dtype) -> bool:
    return any(tensor.is_floating_point() and tensor.dtype != dtype for tensor in _tensors(model))


class Network:
    """``model(x, t, **kwargs)`` run in ``dtype``.

    Without a ``dtype`` the model runs as it is, fed with the dtype of its first weight. With one that its weights do
    not have, a copy of it is run, on a GPU in channels_last where it has convolutions. Of a `fastsde.models.UNet` its
    inference form is run. `refresh` brings the weights of either up to date. x, t and floating-point arguments are
    cast.

    Args:
        compile: run it through ``torch.compile``. Where that fails, the network runs without it, with a warning.
        optimize: whether to take the inference form of a U-Net.
        device: where it runs, for a function that has no weights to tell.

    Raises:
        TypeError: where the model does not return a floating-point tensor.
        ValueError: where it returns a tensor of another shape or device than x.
    """

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        optimize: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.model = model
        self.dtype = dtype_of(model) if dtype is None else dtype
        self.cache = _cache(model)  # what an engine keeps of this network
        self._device = device or device_of(model) or torch.device("cpu")
        self._compile, self._arguments = compile, (dtype, optimize)
        self._run: Model | None = None
        self._compiled: Model | None = None
        self.refresh()

    def again(self, compile: bool) -> Network:
        """The same network, with or without ``torch.compile``."""
        dtype, optimize = self._arguments
        return Network(self.model, dtype, compile, optimize, self._device)

    @property
    def is_native(self) -> bool:
        """Whether a native kernel runs it, which ``torch.compile`` does not make faster."""
        return isinstance(self._run, UNetInference) and self._run.is_native

    def refresh(self) -> None:
        """Brings what is run instead of the model up to date: its weights, and where more has changed, all of it."""
        self._form = _form(self.model, *self._arguments, self._device)
        run = self.model
        if isinstance(run, nn.Module) and self._form != "itself":
            run = _derived(run, self._form, self.dtype, self._device, self.cache)
        if run is not self._run or isinstance(self._compiled, Frozen):  # which may be out of date
            self._run = run
            self._compiled = self._through_compile(run) if self._compile else None
        self._channels_last = self._form == "channels_last"

    def _through_compile(self, run: Model) -> Model:
        """The network through ``torch.compile``; on the CPU the one that another sampler has made, if it is that."""
        if self._device.type == "cuda" or not isinstance(run, nn.Module) or not _can_be_frozen(run):
            return _compiled(run, self._device)
        name = f"{self._form} in {self.dtype}, frozen"
        if name not in self.cache or not self.cache[name].is_of(run):
            self.cache[name] = Frozen(run)
        frozen: Frozen = self.cache[name]
        return frozen

    def form(self) -> tuple[Any, ...]:
        """How the network is run, beside what its `fingerprint` tells."""
        return self._form, self.dtype, self._compiled is not None

    def fingerprint(self) -> Fingerprint:
        """What is run, at this moment."""
        return fingerprint(self._run)

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        layout = torch.channels_last if self._channels_last and x.ndim == 4 else torch.preserve_format
        cast = {name: self._cast(value) for name, value in kwargs.items()}
        f: Any = self._evaluate(x.to(self.dtype, memory_format=layout), t.to(self.dtype), cast)
        if not isinstance(f, Tensor):
            hint = ", such as lambda x, t: model(x, t).sample" if hasattr(f, "sample") else ""
            raise TypeError(f"model must return a tensor, got {type(f).__name__}: wrap it in a function{hint}")
        if not f.is_floating_point():
            raise TypeError(f"model must return a floating-point tensor, got {f.dtype}")
        if f.device != x.device:
            raise ValueError(f"model must return a tensor on {x.device}, got {f.device}")
        if f.shape != x.shape:
            raise ValueError(f"model must return the shape of x, {list(x.shape)}, got {list(f.shape)}")
        result: Tensor = f
        return result

    def _evaluate(self, x: Tensor, t: Tensor, kwargs: dict[str, Any]) -> Any:
        run: Any = self._run
        if self._compiled is None:
            return run(x, t, **kwargs)
        try:
            return self._compiled(x, t, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            f = run(x, t, **kwargs)  # raises the network's own error, if it was that
            self._compiled = None
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            warnings.warn(f"torch.compile failed, the network runs without it: {reason}", RuntimeWarning, stacklevel=2)
            return f

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


# What is run instead of the model itself ----------------------------------------------------------------------------


@dataclass
class _Derived:
    """What is run instead of a model, and the model as it was when that was made."""

    module: nn.Module
    model: Fingerprint


def _cache(model: Model) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        return {}
    try:
        return _caches.setdefault(model, {})
    except TypeError:  # a class of its own __eq__ without a hash
        return {}


def _form(model: Model, dtype: torch.dtype | None, optimize: bool, device: torch.device) -> str:
    """ "itself", or what is run instead: "optimized", "copy" or "channels_last", a copy of that layout."""
    if not isinstance(model, nn.Module):
        return "itself"
    if optimize and supports(model):
        return "optimized"
    if dtype is None or not _has_other_dtype(model, dtype):
        return "itself"
    convolutional = any(isinstance(module, _CONVOLUTIONS) for module in model.modules())
    return "channels_last" if convolutional and device.type == "cuda" else "copy"


def _derived(model: nn.Module, form: str, dtype: torch.dtype, device: torch.device, cache: dict[str, Any]) -> nn.Module:
    """What is run instead of the model, with its weights as they are now. It is made again where more has changed."""
    name = f"{form} in {dtype} on {device}"
    with _LOCK, torch.inference_mode(False), torch.no_grad():  # its weights are written to in other modes too
        found = fingerprint(model)
        kept: _Derived | None = cache.get(name)
        if kept is None or not found.is_copied_as(kept.model):
            kept = cache[name] = _Derived(_make(model, form, dtype), found)
        elif isinstance(kept.module, UNetInference) and isinstance(model, UNet):
            kept.module.refresh(model)
        else:
            for tensor, original in zip(_tensors(kept.module), _tensors(model), strict=True):
                tensor.copy_(original)
        return kept.module


def _make(model: nn.Module, form: str, dtype: torch.dtype) -> nn.Module:
    if form == "optimized" and isinstance(model, UNet):
        return model.optimize(dtype)
    try:
        made = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"dtype is {dtype}, for which the model is copied, but it cannot be: {error}; convert its weights yourself "
            f"and leave dtype out, or call it under torch.autocast in a function"
        ) from error
    made.to(dtype)
    return made.to(memory_format=torch.channels_last) if form == "channels_last" else made


class Frozen:
    """A network that ``torch.compile`` has made, on the CPU, with its weights as constants of the code.

    What it has compiled is kept on disk by PyTorch, from which other processes take it.
    """

    def __init__(self, run: nn.Module) -> None:
        alive = self._run = weakref.ref(run)  # what is kept of a model must not keep it alive
        self._weights = [each.detach().clone() for each in _tensors(run)]

        def network(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
            f: Tensor = alive()(x, t, **kwargs)  # type: ignore[misc]
            return f

        network.__code__ = network.__code__.replace()  # of its own: by it PyTorch finds what it has compiled before
        self._compiled: Model = torch.compile(network)

    def is_of(self, run: Model) -> bool:
        """Whether it still computes what a network does."""
        if not isinstance(run, nn.Module) or run is not self._run():
            return False
        now = _tensors(run)
        return len(now) == len(self._weights) and all(map(torch.equal, now, self._weights))

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        with torch._inductor.config.patch(freezing=True):
            return self._compiled(x, t, **kwargs)


def _can_be_frozen(run: nn.Module) -> bool:
    """Whether all tensors of a network are parameters and buffers that a call leaves as they are."""
    running = (module for module in run.modules() if getattr(module, "running_mean", None) is not None)
    counts = any(getattr(module, "training", False) for module in running)  # a frozen script has no mode
    found = fingerprint(run)
    return not counts and found.is_whole and len(found.places) == len(_tensors(run))


def _compiled(run: Model, device: torch.device) -> Model:
    """``torch.compile`` in the mode for inference whose graphs somebody else captures."""
    if device.type != "cuda":
        return torch.compile(run)
    # On Triton's convolution templates, PyTorch 2.11 gave wrong 3x3 results; cuDNN's are as fast.
    options = {**torch._inductor.list_mode_options("max-autotune-no-cudagraphs"), "max_autotune_conv_backends": "ATEN"}
    return torch.compile(run, dynamic=False, options=options)
