"""The user's network as an engine calls it: fed in its own dtype, copied, compiled, or in its inference form."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from ..models.mlp import is_sequential, linear_layers
from ..models.unwrap import unwrap
from ..notices import first_line, warn, warn_once
from ..reference import Model, NonFiniteError
from .batches import is_out_of_memory
from .capture import CaptureError
from .compilers import Compiled, compiled, unavailable_error
from .derived import Derived, derived, form_of
from .fingerprint import Fingerprint, fingerprint, modules_of
from .inspection import check_output, device_of, dtype_of
from .unet_inference import UNetInference

__all__ = ["Feed", "Kept", "Network"]

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_NO_REFUSALS = (NonFiniteError, CaptureError, getattr(torch, "AcceleratorError", NonFiniteError))
_made: WeakSet[Model] = WeakSet()  # compiled networks that have run
_kept: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()


class Feed(NamedTuple):
    """How a network is given its arguments other than x.

    Args:
        time: the dtype of t.
        casts: whether floating-point arguments are cast to the network's dtype.
        autocast: whether the network runs under ``torch.autocast`` in its dtype.
    """

    time: torch.dtype
    casts: bool = False
    autocast: bool = False


@dataclass
class Kept:
    """Data kept with a model while it lives, shared by all samplers of it.

    Args:
        feeds: the feed by the dtypes of the arguments, for each dtype of the network and for integer times or not.
        derived: the modules run instead of the model, by form, dtype and device.
        compiled: the compiled networks on the CPU, by compiler, form and dtype.
        programs: the state of the network, and its program or why it has none, by what the program depends on
            (`fastsde.engines.programs`), the latest last.
        trajectories: the captured trajectories (`fastsde.engines.graph`), the latest last.
        batches: the fastest batch, by what the time of a row depends on.
        seconds: the measured seconds of a row by compiler, None for the network as it is; by what they depend on.
        failed: the backends that have failed.
        told: the warnings that have been given.
    """

    feeds: dict[tuple[torch.dtype, bool], dict[Any, Feed]] = field(default_factory=dict)
    derived: dict[Any, Derived] = field(default_factory=dict)
    compiled: dict[tuple[str, str, torch.dtype], Compiled] = field(default_factory=dict)
    programs: OrderedDict[Any, tuple[Any, Any]] = field(default_factory=OrderedDict)
    trajectories: OrderedDict[Any, Any] = field(default_factory=OrderedDict)
    batches: dict[Any, int] = field(default_factory=dict)
    seconds: dict[Any, dict[str | None, float]] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    told: dict[str, Any] = field(default_factory=dict)


class Network:
    """``model(x, t, **kwargs)`` run in ``dtype``.

    Without a ``dtype`` the model runs as it is, with x in the dtype of its first weight. With a ``dtype`` other than
    that of its weights, a copy runs instead, on a GPU in channels_last if it has convolutions. A `fastsde.models.UNet`
    runs in its inference form. `refresh` updates the weights of either.

    x is cast to ``dtype``. t is not, since neighbouring times would become equal: it is fp32 (float64 for a float64
    network), and floating-point arguments keep their dtype. A network that refuses that is fed, from the first call on,
    in the first of these ways that it accepts: integer times, if all times are integers; its arguments in ``dtype``; t
    as it is under ``torch.autocast``; and last t in ``dtype``, with a warning.

    DistributedDataParallel, DataParallel and AveragedModel are unwrapped, and so is the result of ``torch.compile`` if
    another module runs in its place. An ``nn.Sequential`` is called with ``cat((x, t), -1)``.

    Args:
        compiler: run it through "torch.compile" or "openvino". If that fails, it runs uncompiled, with a warning.
        optimize: whether to use the inference form of a U-Net or, with ``gradients``, the form with native gradients.
        device: where the network runs, for a function, which has no weights.
        integer_times: whether all times that it is called with are integers.
        gradients: whether its output is differentiated, with respect to x alone; it is then compiled by
            ``torch.compile`` with its weights as arguments.

    Raises:
        TypeError: if the model does not return a floating-point tensor.
        ValueError: if it returns a tensor with a shape or device other than that of x.
    """

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype | None = None,
        compiler: str | None = None,
        optimize: bool = False,
        device: torch.device | None = None,
        integer_times: bool = False,
        gradients: bool = False,
    ) -> None:
        self._given, self.compiler = model, compiler
        self._arguments: dict[str, Any] = {
            "dtype": dtype,
            "optimize": optimize,
            "device": device,
            "integer_times": integer_times,
            "gradients": gradients,
        }
        self.model = _inside(model)
        self.dtype = dtype_of(model) if dtype is None else dtype
        self.device = device or device_of(model) or torch.device("cpu")
        self.kept = _kept_of(self.model)
        self._takes_one = isinstance(model, nn.Module) and is_sequential(unwrap(model))
        self._feeds = _feeds(self.dtype, integer_times)
        # The same without casts that make no difference, for calls in which no argument needs one.
        self._feeds_without_casts = [
            feed for feed in self._feeds if not feed.casts or feed._replace(casts=False) not in self._feeds
        ]
        # The feed by the dtypes of the arguments: found once for all samplers of a network.
        self._known_feeds = self.kept.feeds.setdefault((self.dtype, integer_times), {})
        self._run: Model | None = None
        self._compiled: Model | None = None
        self._fp32: Network | None = None
        self._outer: dict[Any, Network] = {}
        self._differentiable: Network | None = None
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (self._given, self.compiler, self._arguments)  # everything else is built from these

    def again(self, compiler: str | None) -> Network:
        """Returns the same network, with another compiler or none."""
        return Network(self._given, compiler=compiler, **self._arguments)

    def plain(self) -> Network:
        """Returns the network as PyTorch's own operations: nothing in it is compiled."""
        return Network(self.model, **self._arguments)

    def differentiable(self) -> Network:
        """Returns the same network with gradients, with the present weights: itself if it has them."""
        if self._arguments["gradients"]:
            return self
        if self._differentiable is None:
            arguments = self._arguments | {"gradients": True}
            self._differentiable = Network(self._given, compiler=self.compiler, **arguments)
        else:
            self._differentiable.refresh()
        return self._differentiable

    def in_fp32(self) -> Network:
        """Returns the same network in fp32, with the present weights: itself if it is in fp32."""
        if self.dtype == torch.float32:
            return self
        if self._fp32 is None:
            self._fp32 = Network(self._given, **self._arguments | {"dtype": torch.float32})
        else:
            self._fp32.refresh()
        return self._fp32

    def inside(self, wrapper: Callable[..., nn.Module], *args: Any) -> Network:
        """Returns the network ``wrapper(model, *args)``, made once, at the present weights."""
        key = (wrapper, *args)
        if key in self._outer:
            self._outer[key].refresh()
        else:
            self._outer[key] = Network(wrapper(self.model, *args), **self._arguments)
        return self._outer[key]

    @property
    def is_optimized(self) -> bool:
        """Whether faster forms than PyTorch's own operations may run the network."""
        return bool(self._arguments["optimize"])

    @property
    def is_native(self) -> bool:
        """Whether a native kernel runs the network, which ``torch.compile`` does not make faster."""
        return isinstance(self._run, UNetInference) and self._run.is_native

    @property
    def is_compiled(self) -> bool:
        """Whether the network runs compiled, which may have failed."""
        return self._compiled is not None

    @property
    def has_own_threads(self) -> bool:
        """Whether the network runs in threads other than PyTorch's."""
        return self._compiled is not None and self.compiler == "openvino"

    @property
    def is_to_be_compiled(self) -> bool:
        """Whether the next call compiles code."""
        return self._compiled is not None and self._compiled not in _made

    def refresh(self) -> None:
        """Updates the module that is run instead of the model: its weights, or all of it if more has changed."""
        self.layers = linear_layers(self.model)
        dtype, optimize, gradients = (self._arguments[name] for name in ("dtype", "optimize", "gradients"))
        optimize = optimize and not (gradients and self.compiler)  # which fuses the model's own operations
        self._form = form_of(self.model, dtype, optimize, self.device, gradients)
        run = self._given if self._form == "itself" and _is_compiled(self._given) else self.model
        if isinstance(run, nn.Module) and self._form != "itself":
            run = derived(run, self._form, self.dtype, self.device, self.kept.derived)
        if run is not self._run or isinstance(self._compiled, Compiled):  # which may be stale
            self._run = run
            self._compiled = None if self.compiler is None else self._compiled_by(self.compiler, run)
        self._channels_last = self._form == "channels_last"

    def _compiled_by(self, compiler: str, run: Model) -> Model | None:
        """Returns the compiled network; on the CPU the one that another sampler has compiled, if it is still valid."""
        if self._arguments["gradients"]:
            return torch.compile(run)
        key, known = (compiler, self._form, self.dtype), self.kept.compiled
        made = compiled(run, compiler, self.device, known.get(key))
        if isinstance(made, Compiled):
            known[key] = made
        return made

    def cannot_be_compiled_by(self, compiler: str) -> Exception | None:
        """Returns an error that says why a compiler cannot compile the network, or None if it can."""
        assert self._run is not None
        return unavailable_error(compiler, self._run, self.dtype, self.device)

    @contextmanager
    def unchanged(self, unless_done: bool = False) -> Iterator[None]:
        """Restores buffers and random states at the end, for calls that only measure, warm up or try.

        Batch norm in training mode updates its statistics in every call, and dropout draws from PyTorch's generator.

        Args:
            unless_done: restore only if an error leaves the block.
        """
        modules = [*modules_of(self.model), *modules_of(self._run)]
        held = {buffer: buffer.clone() for module in modules for buffer in module.buffers()}
        on_gpu = self.device.type == "cuda" and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        states = torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if on_gpu else None
        try:
            yield
        except BaseException:
            unless_done = False
            raise
        finally:
            if not unless_done:
                _restore(held)
                torch.set_rng_state(states[0])
                if states[1] is not None:
                    torch.cuda.set_rng_state(states[1], self.device)

    def form(self) -> tuple[Any, ...]:
        """Returns how the network is run, besides what its `fingerprint` covers."""
        return self._form, self.dtype, self._compiled is not None and self.compiler, self._arguments["integer_times"]

    def fingerprint(self) -> Fingerprint:
        """Returns the fingerprint of the module that is run."""
        return fingerprint(self._run)

    def state(self) -> Fingerprint:
        """Returns the fingerprint of the module that is run, with its classes; of an MLP's layers that of their
        parameters, which takes a tenth of the time.
        """
        if self.layers is None or self._form != "itself":
            return fingerprint(self._run, reads_classes=True)
        linears, activations = self.layers
        parameters = [each for linear in linears for each in (linear.weight, linear.bias) if each is not None]
        places = tuple((id(each), each.data_ptr(), each.stride()) for each in parameters)
        return Fingerprint((*activations, *((each.shape, each.dtype) for each in parameters)), places, ())

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        shape = x.shape  # a network may change x in place
        f = check_output(self._fed(x, t, kwargs), shape, x.device)
        if self._compiled is not None:
            _made.add(self._compiled)
        return f

    # Feeding the network --------------------------------------------------------------------------------------------

    def _fed(self, x: Tensor, t: Tensor, kwargs: dict[str, Any]) -> Any:
        """Returns the network's output, fed in the first way that it accepts, which later calls then use at once."""
        ways = self._ways(kwargs)
        if len(ways) == 1:
            return self._evaluate(x, t, kwargs, ways[0])
        known = self._known_feeds
        kinds = tuple((key, value.dtype) for key, value in kwargs.items() if isinstance(value, Tensor))
        if kinds in known:
            return self._evaluate(x, t, kwargs, known[kinds])
        f, refusal = self._tried(x, t, kwargs, ways[0])
        if refusal is not None:
            f, known[kinds] = self._fed_otherwise(x, t, kwargs, ways, refusal)
        else:
            known[kinds] = ways[0]
        return f

    def _fed_otherwise(
        self, x: Tensor, t: Tensor, kwargs: dict[str, Any], ways: list[Feed], refusal: Exception
    ) -> tuple[Any, Feed]:
        """Returns the output of a network that refuses the first way, and the way that it accepts."""
        for feed in ways[1:]:
            f, error = self._tried(x, t, kwargs, feed)
            if error is None:
                break
        else:
            raise refusal
        again, error = self._tried(x, t, kwargs, ways[0])
        if error is None:  # it was not a refusal, but a temporary error
            return again, ways[0]
        if feed.time in _LOW_PRECISION:
            warn_once(
                f"the network accepts times only in {feed.time}, so t is rounded and neighbouring times become equal "
                f"({refusal})"
            )
        return f, feed

    def _tried(self, x: Tensor, t: Tensor, kwargs: dict[str, Any], feed: Feed) -> tuple[Any, Exception | None]:
        """Returns the network's output or its refusal. A refused call leaves buffers and random states as they were."""
        try:
            with self.unchanged(unless_done=True):
                return self._evaluate(x, t, kwargs, feed), None
        except (RuntimeError, IndexError) as error:  # what PyTorch raises for a dtype that an operation refuses
            if isinstance(error, _NO_REFUSALS) or is_out_of_memory(error):
                raise
            return None, error

    def _ways(self, kwargs: dict[str, Any]) -> list[Feed]:
        """Returns the ways to feed the network in this call."""
        if not kwargs:
            return self._feeds_without_casts
        floats = (value for value in kwargs.values() if isinstance(value, Tensor) and value.is_floating_point())
        has_casts = any(value.dtype != self.dtype for value in floats)
        return self._feeds if has_casts else self._feeds_without_casts

    def _evaluate(self, x: Tensor, t: Tensor, kwargs: dict[str, Any], feed: Feed) -> Any:
        if self._channels_last and x.ndim == 4:
            x = x.to(self.dtype, memory_format=torch.channels_last)
        elif x.dtype is not self.dtype:
            x = x.to(self.dtype)
        if t.dtype is not feed.time:
            t = t.to(feed.time)
        if feed.casts:
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        args = (torch.cat((x, t[:, None].to(x.dtype)), -1),) if self._takes_one else (x, t)
        if self._compiled is None and not feed.autocast:
            run: Any = self._run
            return run(*args, **kwargs)
        if not feed.autocast:
            return self._through(args, kwargs)
        with torch.autocast(x.device.type, dtype=self.dtype, cache_enabled=False):
            return self._through(args, kwargs)

    def _through(self, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the network, compiled if requested."""
        run: Any = self._run
        if self._compiled is None:
            return run(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            f = run(*args, **kwargs)  # raises the network's own error, if it was that
            self._compiled = None
            reason = first_line(error)
            warn(f"{self.compiler} failed, the network runs without it: {reason}")
            return f

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _restore(held: dict[Tensor, Tensor]) -> None:
    """Writes back the buffers that have changed. The others may be read-only here, as inference-mode tensors are."""
    with torch.no_grad():
        for buffer, value in held.items():
            if not torch.equal(buffer, value):
                with torch.inference_mode(buffer.is_inference()):
                    buffer.copy_(value)


def _make(model: Model, compiler: str | None, arguments: dict[str, Any]) -> Network:
    return Network(model, compiler=compiler, **arguments)


def _feeds(dtype: torch.dtype, integer_times: bool) -> list[Feed]:
    """Returns the ways to feed a network of a dtype, the most exact first."""
    times = [torch.float64 if dtype == torch.float64 else torch.float32]
    if integer_times:
        times.append(torch.int64)
    feeds = [Feed(time, casts) for casts in (False, True) for time in times]
    if dtype in _LOW_PRECISION:
        feeds += [*(Feed(time, autocast=True) for time in times), Feed(dtype, casts=True)]
    return feeds


def _inside(model: Model) -> Model:
    """Returns the network inside of wrappers, unless a wrapper has hooks of its own."""
    if not isinstance(model, nn.Module):
        return model
    inner = unwrap(model)
    wrappers = set(model.modules()).difference(inner.modules())
    return model if any(each._forward_hooks or each._forward_pre_hooks for each in wrappers) else inner


def _is_compiled(model: Model) -> bool:
    """Returns whether a model is the result of ``torch.compile`` for a module."""
    if not isinstance(model, nn.Module):
        return False
    inner = unwrap(model)
    return inner is not model and getattr(model, "_orig_mod", None) is inner


def _kept_of(model: Model) -> Kept:
    if not isinstance(model, nn.Module):
        return Kept()
    try:
        return _kept.setdefault(model, Kept())
    except TypeError:  # a class with its own __eq__ and no hash
        return Kept()
