"""The draws of a loop: normal ones become noises of the trace, all others are refused. `Replay` gives a loop its draws.

A draw that is not normal would be baked into the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from ..dynamo import Uncompiled
from .tape import Handler, Tape, registered, shape_of
from .values import Value, added, scaled

__all__ = ["RANDOM", "Replay", "outside_modes"]

aten = torch.ops.aten
RANDOM: dict[Any, Handler] = {}
_draws = functools.partial(registered, RANDOM)
_CONTRACT = "draw normals by torch.randn, randn_like, normal or normal_"


@_draws("randn")
def _randn(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    return tape.noise(args[0], kwargs.get("dtype"), _generator(args, kwargs), kwargs.get("device"))


@_draws("randn_like")
def _randn_like(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    return tape.noise(args[0].shape, kwargs.get("dtype") or args[0].dtype, None, kwargs.get("device") or args[0].device)


@_draws("normal", "normal_functional")
def _normal(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    mean, std, shape, dtype = _normal_arguments(args, kwargs)
    out = kwargs.get("out")
    z = tape.noise(shape, dtype if out is None else out.dtype, _generator(args, kwargs), kwargs.get("device"))
    if out is not None:
        with tape:
            return out.copy_(z * std + mean)
    if not isinstance(mean, Tensor) and not isinstance(std, Tensor) and (mean, std) == (0, 1):
        return z
    with tape:
        return z * std + mean


@_draws("normal_")
def _normal_(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    mean, std = _mean_std(args, kwargs)
    target = args[0]
    z = tape.noise(target.shape, target.dtype, _generator(args, kwargs), target.device).value
    tape.memory(target).write(tape.shortened(added(scaled(z, std), Value(z.numel, {}, mean)), target.shape))
    return target


@_draws("randint")
def _randint(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    size = next((x for x in args if isinstance(x, (list, tuple))), None)
    if size is not None and not len(size):  # a seed, as torchsde draws for its Brownian motion
        state = torch.get_rng_state()
        seed = func(*args, **kwargs)
        torch.set_rng_state(state)
        return seed
    return _other_draw(tape, func, args, kwargs)


@_draws("rand", "rand_like", "uniform_", "uniform", "randint_like", "randperm", "bernoulli", "bernoulli_",
        "exponential_", "random_", "multinomial", "cauchy_", "log_normal_", "geometric_", "poisson",
        "native_dropout")  # fmt: skip
def _other_draw(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.removeprefix("aten::")
    raise tape.refuse(name, "a random number that is not normal would be baked into the table", _CONTRACT)


def _generator(args: Any, kwargs: Any) -> torch.Generator | None:
    found = kwargs.get("generator")
    return found if found is not None else next((x for x in args if isinstance(x, torch.Generator)), None)


def _mean_std(args: Any, kwargs: Any) -> tuple[float, float]:
    names = dict(zip(("mean", "std"), args[1:], strict=False)) | kwargs
    return float(names.get("mean", 0.0)), float(names.get("std", 1.0))


def _normal_arguments(args: Any, kwargs: Any) -> tuple[Any, Any, Sequence[int], torch.dtype | None]:
    mean, std = args[0], args[1] if len(args) > 1 and not isinstance(args[1], torch.Generator) else 1.0
    has_size = len(args) > 2 and isinstance(args[2], (list, tuple))
    shape = torch.Size(args[2]) if has_size else shape_of(mean, std)
    dtype = kwargs.get("dtype") or next((x.dtype for x in (mean, std) if isinstance(x, Tensor)), None)
    return mean, std, shape, dtype


class Replay(Uncompiled, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs a loop for real with given draws, in its order. After it, `left` says how many were not used.

    Args:
        noises: a tensor of standard normals per draw.
        double: every draw is float64, and casts of such a tensor to fewer bits keep it, as in `record`.

    Raises:
        RuntimeError: for a draw of another shape than the next one, or one more than there are.
    """

    def __init__(self, noises: Sequence[Tensor], double: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._noises, self._next, self._double = list(noises), 0, double
        self._shapes = {z.shape for z in noises if z.numel() > 1}
        self.strides: dict[int, tuple[int, ...]] = {}  # of draws into memory that is not contiguous

    def _note_strides(self, x: Tensor) -> None:
        if not x.is_contiguous():
            self.strides[self._next] = tuple(x.stride())

    @property
    def left(self) -> int:
        """How many draws were not used."""
        return len(self._noises) - self._next

    def _take(self, shape: Sequence[int], dtype: torch.dtype | None) -> Tensor:
        if not self.left:
            raise RuntimeError("the loop draws more often than when it was traced")
        z = self._noises[self._next]
        self._next += 1
        if tuple(z.shape) != tuple(shape):
            raise RuntimeError(f"the loop draws {list(shape)} where it drew {list(z.shape)} when it was traced")
        return z.to(torch.float64 if self._double else dtype or torch.get_default_dtype(), copy=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is aten.randn:
            return self._take(args[0], kwargs.get("dtype"))
        if packet is aten.randn_like:
            self._note_strides(torch.empty_like(args[0]) if args[0].layout == torch.strided else args[0])
            return self._take(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        if packet is aten.normal:
            mean, std, shape, dtype = _normal_arguments(args, kwargs)
            out = kwargs.get("out")
            z = self._take(shape, dtype if out is None else out.dtype) * std + mean
            return z if out is None else out.copy_(z)
        if packet is aten.normal_:
            mean, std = _mean_std(args, kwargs)
            self._note_strides(args[0])
            return args[0].copy_(self._take(args[0].shape, args[0].dtype) * std + mean)
        casts = self._double and packet is aten._to_copy and args[0].dtype == torch.float64
        if casts and args[0].shape in self._shapes and kwargs.get("dtype") in _LOWER:
            return args[0].clone()
        return func(*args, **kwargs)


def outside_modes(network: Callable[..., Any], nudges: bool = False) -> Callable[..., Any]:
    """Returns a network that runs without the dispatch modes in force, such as `Replay`, which cost each operation.

    Args:
        nudges: whether outputs of fewer bits than fp32 are moved by a unit in their last place, as a loop rounds what
            it makes of them.
    """

    own = torch.Generator().manual_seed(0) if nudges else None

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype not in (torch.bfloat16, torch.float16):
            return x
        z = torch.randn(x.shape, generator=own, dtype=torch.float32, device="cpu").to(x)
        return x + torch.finfo(x.dtype).eps * x * z

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            found = network(*args, **kwargs)
            return tree_map(moved, found) if nudges else found

    return call


_LOWER = (torch.float32, torch.float16, torch.bfloat16)
