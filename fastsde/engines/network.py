"""The user's network as an engine calls it: fed in its own dtype, copied, compiled, or in its inference form."""

from __future__ import annotations

import copy
import functools
import inspect
import types
import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..models.unet import UNet
from ..models.unet_inference import UNetInference, supports
from ..reference import Model

__all__ = ["Network", "device_of", "dtype_of"]

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
# What is kept of a model while it lives, whichever sampler made it.
_caches: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


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
        self._form = _form(model, dtype, optimize, self._device)
        self._make()

    def _make(self) -> None:
        """Finds or makes what is run."""
        self._derived = _derived(self.model, self._form, self._name, self.dtype, self.cache)
        self._run: Model = self.model if self._derived is None else self._derived
        self._compiled = _compiled(self._run, self._device) if self._compile else None
        self._channels_last = self._form == "channels_last"

    def uncompiled(self) -> Network:
        """The same network without ``torch.compile``."""
        dtype, optimize = self._arguments
        return Network(self.model, dtype, False, optimize, self._device)

    @property
    def _name(self) -> str:
        return f"{self._form} in {self.dtype} on {self._device}"

    def refresh(self) -> None:
        """Copies the weights of the model again where a copy of it is run, since they may have changed."""
        if self._derived is None or not isinstance(self.model, nn.Module):
            return
        try:
            _refresh(self._derived, self.model)
        except _OtherStructureError:
            self.cache.pop(self._name, None)
            self._make()

    def form(self) -> tuple[Any, ...]:
        """What the network's work on the device depends on, beside weights and arguments."""
        modes = tuple(module.training for root in _modules(self._run) for module in root.modules())
        return self._form, self.dtype, self._compiled is not None, modes

    def weights(self) -> tuple[Any, ...]:
        """Where the weights that are run lie. Of a function: those of the modules that it can be seen to use."""
        return tuple(
            (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            for root in _modules(self._run)
            for tensor in _tensors(root)
        )

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
        if self._compiled is None:
            return self._run(x, t, **kwargs)
        try:
            return self._compiled(x, t, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            f = self._run(x, t, **kwargs)  # raises the network's own error, if it was that
            self._compiled = None
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            warnings.warn(f"torch.compile failed, the network runs without it: {reason}", RuntimeWarning, stacklevel=2)
            return f

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


# What is run instead of the model itself ----------------------------------------------------------------------------


class _OtherStructureError(Exception):
    """A model has other weights than when it was copied."""


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


def _derived(model: Model, form: str, name: str, dtype: torch.dtype, cache: dict[str, Any]) -> nn.Module | None:
    """What is run instead of the model, made once; None where it is run itself."""
    if form == "itself" or not isinstance(model, nn.Module):
        return None
    if name in cache:
        return cache[name]  # type: ignore[no-any-return]
    with torch.inference_mode(False):  # its weights are written to in other modes too
        if form == "optimized" and isinstance(model, UNet):
            cache[name] = model.optimize(dtype)
        else:
            cache[name] = copy.deepcopy(model).to(dtype)
            if form == "channels_last":
                cache[name].to(memory_format=torch.channels_last)
    derived: nn.Module = cache[name]
    return derived


def _refresh(derived: nn.Module, model: nn.Module) -> None:
    """Gives what is run instead of a model the model's weights and modes, in place."""
    if isinstance(derived, UNetInference) and isinstance(model, UNet):
        derived.refresh(model)
        return
    ours, theirs = _tensors(derived), _tensors(model)
    modules = list(derived.modules()), list(model.modules())
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs] or len(modules[0]) != len(modules[1]):
        raise _OtherStructureError
    with torch.no_grad():
        for tensor, original in zip(ours, theirs, strict=True):
            tensor.copy_(original)
    for module, original_module in zip(*modules, strict=True):
        module.training = original_module.training


def _compiled(run: Model, device: torch.device) -> Model:
    """``torch.compile`` in the mode for inference whose graphs somebody else captures."""
    if device.type != "cuda":
        return torch.compile(run)
    # On Triton's convolution templates, PyTorch 2.11 gave wrong 3x3 results; cuDNN's are as fast.
    options = {**torch._inductor.list_mode_options("max-autotune-no-cudagraphs"), "max_autotune_conv_backends": "ATEN"}
    return torch.compile(run, dynamic=False, options=options)


def _modules(model: Any, depth: int = 3) -> Iterator[nn.Module]:
    """The modules that a callable uses: itself, or those that a function, or an object, refers to directly."""
    if isinstance(model, nn.Module):
        yield model
    elif depth:
        for part in _parts(model):
            if isinstance(part, (nn.Module, functools.partial, types.MethodType, types.FunctionType)):
                yield from _modules(part, depth - 1)


def _parts(function: Any) -> list[Any]:
    if isinstance(function, functools.partial):
        return [function.func, *function.args, *function.keywords.values()]
    if isinstance(function, types.MethodType):
        return [function.__self__, function.__func__]
    if isinstance(function, types.FunctionType):
        variables = inspect.getclosurevars(function)
        return [*variables.nonlocals.values(), *variables.globals.values(), *(function.__defaults__ or ())]
    return list(getattr(function, "__dict__", {}).values())
