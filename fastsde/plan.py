"""Chooses how a request runs: with which backend, how many samples at once, and whether compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import engines, ops
from .engines import Network, batches, capture, persistent
from .notices import warn
from .request import Request
from .vocabulary import BACKENDS

__all__ = ["Plan", "Planner", "compiler_of", "unavailable_reason"]

_FASTEST_FIRST = ("persistent", "graph", "eager", "reference")
# How some backends run rows together, and the options that they do not support, which need the host between rows,
# another network call, a gradient, or a sum over all elements of a sample.
_TOGETHER = {
    "eager": "takes each step by a kernel",
    "graph": "replays rows as CUDA graphs",
    "persistent": "runs a whole trajectory in one launch",
}
_PROBLEMS = ("mask", "measurement", "classifier guidance")
_ROW_BY_ROW = ("differentiable", "noise", "callback", *_PROBLEMS)
_WITHOUT = {
    "eager": ("differentiable",),
    "graph": _ROW_BY_ROW,
    "persistent": (*_ROW_BY_ROW, "compile", "rescaled guidance", "Langevin rows"),
}
# With compile="auto": the backends for which the network may be compiled, and the seconds of work that justify each
# compiler. torch.compile takes about 10 to 60 s and OpenVINO 3, and they save hardly more than half of the work.
_MAY_COMPILE, _WORK_S = ("eager", "graph", "adaptive"), {"openvino": 20.0, "torch.compile": 60.0}
_ADAPTIVE_CALLS = 100  # of the network, which are known only afterwards


def unavailable_reason(
    backend: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    compiler: str | None = None,
    network: Network | None = None,
    sample_shape: Sequence[int] = (),
    options: Collection[str] = (),
    times: Tensor | None = None,
    request: Request | None = None,
    is_asked_for: bool = True,
) -> str | None:
    """Returns why a backend cannot run and what to do instead, or None if it can.

    Args:
        dtype: the dtype of the state.
        compiler: the compiler that the network is to run through, "torch.compile" or "openvino".
        network, sample_shape: the network and the shape of its samples, if known.
        options: the names of the options in use that not every backend supports.
        times, request, is_asked_for: as for `fastsde.engines.persistent.unavailable_reason`.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        return f"device {device} is unavailable (torch.cuda.is_available() is False); use device='cpu'"
    differentiated = next((name for name in _PROBLEMS[1:] if name in options), None)
    if compiler == "openvino" and differentiated is not None:
        return f"compile='openvino' has no gradients, which {differentiated} needs; use compile=True"
    if differentiated is not None and "differentiable" in options:
        return (
            f"differentiable=True and {differentiated} exclude each other, as {differentiated} takes gradients itself"
        )
    if compiler is not None and dtype == torch.float64:
        return "compile=True and dtype=torch.float64 exclude each other; leave one of them out"
    if compiler is not None and "differentiable" in options:
        return "compile=True and differentiable=True exclude each other; leave one of them out"
    if backend == "reference":
        asked = "compile='openvino'" if compiler == "openvino" else "compile=True"
        return None if compiler is None else f"backend 'reference' is plain PyTorch; for {asked} use 'eager'"
    if dtype == torch.float64:
        return f"backend {backend!r} keeps the state in fp32; for dtype=torch.float64 use 'reference'"
    if backend == "graph" and not (ops.has_triton(device) and capture.can_record(device)):
        return f"backend 'graph' needs Triton and a CUDA GPU, got device {device}; use 'eager' or 'reference'"
    if backend == "persistent" and not ops.has_kernels(device):
        needs = f"Triton and a CUDA GPU, or the CPU and native kernels, got device {device}"
        if device.type == "cpu":
            needs += f" ({ops.native_state()})"
        return f"backend 'persistent' needs {needs}; use 'eager' or 'reference'"
    used = options if compiler is None else [*options, "compile"]
    missing = next((name for name in _WITHOUT[backend] if name in used), None)
    if missing is not None:
        others = "'reference'" if "differentiable" in used else "'eager' or 'reference'"
        return f"backend {backend!r} {_TOGETHER[backend]} and does not support {missing}; use {others}"
    if backend == "persistent" and network is not None:
        reason = persistent.unavailable_reason(network, sample_shape, device, times, request, is_asked_for)
        others = "'graph' or 'eager'" if device.type == "cuda" else "'eager' or 'reference'"
        return None if reason is None else f"backend 'persistent': {reason}; use {others}"
    return None


def compiler_of(compile: bool | str) -> str | None:
    """Returns the name of the compiler that the option ``compile`` asks for, or None for False and "auto".

    Raises:
        TypeError, ValueError: for another value.
    """
    if isinstance(compile, bool):
        return "torch.compile" if compile else None
    if not isinstance(compile, str):
        raise TypeError(f"compile must be True, False, 'auto' or 'openvino', got {compile!r}")
    if compile not in ("auto", "openvino"):
        raise ValueError(f"compile must be True, False, 'auto' or 'openvino', got {compile!r}")
    return "openvino" if compile == "openvino" else None


class Plan(NamedTuple):
    """How a request is run.

    Args:
        backend: the engine's name.
        network: the network, possibly compiled.
        batch: how many samples run at once.
        may_shrink: whether the batch may be reduced when memory runs out.
        passed_over: why "auto" cannot take "persistent"; None if it can, or was not asked.
    """

    backend: str
    network: Network
    batch: int
    may_shrink: bool
    passed_over: str | None = None

    def halved(self, left: int) -> Plan:
        """Returns the plan with half as many samples at once, when ``left`` samples remain."""
        return self._replace(batch=(min(self.batch, left) + 1) // 2)


class Planner:
    """Makes the plans of a sampler.

    Args:
        network: the network to sample from.
        state_dtype: the dtype of the state in all requests.
        backend, compile: as for `fastsde.Sampler`.
        times: fp32 ``[K]``, of the table, on the network's device.
        is_adaptive: whether an adaptive solver takes the place of the table.
    """

    def __init__(
        self,
        network: Network,
        sample_shape: Sequence[int],
        state_dtype: torch.dtype,
        backend: str,
        compile: bool | str,
        times: Tensor,
        is_adaptive: bool = False,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        self._network, self._sample_shape, self._state_dtype = network, tuple(sample_shape), state_dtype
        self._backend, self._times, self._is_adaptive = backend, times, is_adaptive
        if is_adaptive and backend not in ("auto", "reference"):
            raise ValueError(
                f"an adaptive solver has an engine of its own: backend must be 'auto', or 'reference' for a network "
                f"in plain PyTorch, got {backend!r}"
            )
        self._compiler, self._chooses = compiler_of(compile), compile == "auto"
        self._compiled: dict[str, Network] = {}  # for compile="auto"
        error = None if self._compiler is None else network.cannot_be_compiled_by(self._compiler)
        if error is not None:
            raise error

    @property
    def is_free(self) -> bool:
        """Whether another backend may take over from one that fails."""
        return self._backend == "auto"

    @property
    def is_reference(self) -> bool:
        """Whether the reference runs whatever is requested."""
        return self._backend == "reference" or self._state_dtype == torch.float64

    def backend(self, options: Collection[str] = (), request: Request | None = None) -> str:
        """Returns the backend that runs: the requested one, or for "auto" the fastest that can run.

        Args:
            options: the names of the options in use that not every backend supports.
            request: what is to be run, if it is known.

        Raises:
            ValueError: if it cannot run.
        """
        return self._choice(options, request)[0]

    def _choice(self, options: Collection[str], request: Request | None) -> tuple[str, str | None]:
        """Returns the backend that runs, and why "auto" cannot take "persistent" (`Plan.passed_over`)."""
        network, reason = self._network, None
        passed_over: str | None = None
        if self._is_adaptive:
            if "differentiable" in options:
                raise ValueError("differentiable=True needs a solver with rows, got an adaptive one: take a named one")
            kind = "reference" if self.is_reference else "eager"  # which the same networks can run in
            reason = unavailable_reason(kind, network.device, self._state_dtype, compiler=self._compiler)
            if reason is not None:
                raise ValueError(reason)
            return "adaptive", None
        for candidate in _FASTEST_FIRST if self.is_free else (self._backend,):
            if self.is_free and candidate in network.kept.failed:
                continue
            reason = unavailable_reason(
                candidate,
                network.device,
                self._state_dtype,
                compiler=self._compiler,
                network=network,
                sample_shape=self._sample_shape,
                options=options,
                times=self._times,
                request=request,
                is_asked_for=not self.is_free,
            )
            if candidate == "persistent":
                passed_over = reason
            if reason is None and (not self.is_free or candidate != "persistent" or self._pays(request)):
                return candidate, passed_over
        raise ValueError(reason)

    def _pays(self, request: Request | None) -> bool:
        return persistent.pays(self._network, self._sample_shape, self._times, request)

    def plan(self, request: Request, max_batch: int | str | None, tell: Callable[[Network], object]) -> Plan:
        """Returns the plan of a request.

        Args:
            max_batch: as for `fastsde.Sampler`.
            tell: called with a network before it is compiled.
        """
        backend, passed_over = self._choice(request.options, request)
        batch = self._batch(backend, request, max_batch)
        network = _suited(self._faster(backend, request, batch, tell), request)
        if network.compiler is not None and not network.is_compiled:
            error = network.cannot_be_compiled_by(network.compiler)
            if error is not None:
                warn(f"the network runs uncompiled: {error}")
        tell(network)
        return Plan(backend, network, batch, max_batch == "auto", passed_over)

    def without(self, plan: Plan, request: Request) -> Plan:
        """Returns a new plan for a request whose backend has failed."""
        self._network.kept.failed.add(plan.backend)
        return plan._replace(backend=self.backend(request.options, request))

    def _batch(self, backend: str, request: Request, max_batch: int | str | None) -> int:
        n = request.shape[0]
        if max_batch is None or n <= 1:
            return max(n, 1)
        if isinstance(max_batch, int):
            return max_batch
        if backend == "persistent":  # its programs process a few samples each in any case
            return n
        key, known = self._key(n, request), self._network.kept.batches
        if key not in known:
            plain = self._network.again(None)
            with plain.unchanged():
                known[key] = batches.fastest(_timed(plain, request), n)
        return known[key]

    def _faster(self, backend: str, request: Request, batch: int, tell: Callable[[Network], object]) -> Network:
        """Returns the network as it is or, with compile="auto", compiled in the fastest way that repays its cost."""
        plain, n = self._network, request.shape[0]
        if not self._chooses or backend not in _MAY_COMPILE or plain.is_native or request.needs_gradients or not n:
            return plain
        count = min(batch, n)
        known = plain.kept.seconds.setdefault(self._key(count, request), {})
        if None not in known:
            with plain.unchanged():
                known[None] = _timed(plain, request)(count)
        rows = len(request.table) if request.adaptive is None else _ADAPTIVE_CALLS
        work = known[None] * rows * -(-n // count)
        for compiler, least in _WORK_S.items():
            if compiler not in known and work >= least and plain.cannot_be_compiled_by(compiler) is None:
                network = self._through(compiler)
                tell(network)
                with plain.unchanged():
                    seconds = _timed(network, request)(count)
                known[compiler] = seconds if network.is_compiled else math.inf  # it may have failed
        best = min(known, key=lambda compiler: known[compiler])
        if best is None:
            return plain
        network = self._through(best)
        # After a change of the weights it would be compiled again.
        return plain if network.is_to_be_compiled and work < _WORK_S[best] else network

    def _through(self, compiler: str) -> Network:
        """Returns the network through a compiler."""
        if compiler not in self._compiled:
            self._compiled[compiler] = self._network.again(compiler)
        network = self._compiled[compiler]
        network.refresh()
        return network

    def _key(self, n: int, request: Request) -> tuple[object, ...]:
        """Returns what the time of a row depends on."""
        network = self._network
        corrections = () if request.problem is None else tuple(map(type, request.problem.corrections))
        return n, self._sample_shape, network.dtype, network.device, request.guidance is not None, corrections


def _suited(network: Network, request: Request) -> Network:
    """Returns the network in the form that the request needs."""
    return network.differentiable() if request.needs_gradients else network


def _timed(network: Network, request: Request) -> Callable[[int], float]:
    """Returns a function from a number of samples to the seconds that their first row takes."""
    row, network = request.probe(), _suited(network, request)

    def probe(count: int) -> None:
        engines.get("eager")(network, row.part(slice(0, count)))

    return lambda count: batches.seconds(probe, count, network.device)
