"""The graph engine: rows of network and fused step, captured as a CUDA graph and replayed.

A graph holds a few dozen rows. Row counter, table, keys, times, conditions and the weights of guidance are read from
device memory, so that new seeds, new samples and new values in the table are copied there and need no new capture. The
network's weights are read in place: in-place changes take effect, and if they have moved, the rows are captured again.

The network's host code runs only while it is captured: its result must depend only on its arguments, weights and
attributes. If those have changed, as far as a `Fingerprint` can detect, it is captured again.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..reference import evaluate, network_input
from ..request import Conditions, Request
from ..solvers import Terms, row_width
from . import capture, eager
from .chunks import alike
from .fingerprint import Fingerprint, joined
from .network import Network

__all__ = ["Form", "Trajectory", "release", "run"]

_TRAJECTORIES = 4  # kept per network
_GRAPHS = 8  # kept per trajectory, one per length; one run needs at most four
_WARM_UPS = 3
_LOCK = threading.Lock()


def run(network: Network, request: Request) -> Tensor:
    """Runs `fastsde.reference.sample` by replays. The plan excludes requests that need the host between rows.

    Raises:
        CaptureError: if the network cannot be captured.
        NonFiniteError: if the network's output or the state becomes NaN or infinite.
    """
    if not math.prod(request.shape):
        return eager.run(network, request)
    x = request.start()
    return _trajectory(network, Form.of(network, request), request.conditions).run(network, x, request)


@dataclass(frozen=True)
class Form:
    """Everything that is fixed in a capture. Everything else is in device memory and may vary."""

    device: torch.device
    shape: tuple[int, ...]
    rows: int
    terms: Terms
    has_input: bool
    clip: float | None
    has_langevin: bool
    rescale: float | None  # of guidance, None without
    network: tuple[Any, ...]
    other: weakref.ref[Network] | None  # the network of the unconditional output, if it is another one
    conditions: tuple[Any, ...]
    settings: tuple[Any, ...]

    @classmethod
    def of(cls, network: Network, request: Request) -> Form:
        table, device, guidance = request.table, request.keys.device, request.guidance
        other = None if guidance is None else guidance.network
        return cls(
            device=device,
            shape=request.shape,
            rows=len(table),
            terms=table.terms(),
            has_input=table.terms().has_input or not table.row(0).reads_slot_0,
            clip=table.clip,
            has_langevin=table.has_langevin,
            rescale=None if guidance is None else guidance.rescale,
            network=(network.form(), None if other is None else other.form()),
            other=None if other is None else weakref.ref(other),
            conditions=tuple(_spec(kwargs) for kwargs in request.conditions),
            settings=_settings(device.type),
        )


def _spec(kwargs: Mapping[str, Any] | None) -> tuple[Any, ...] | None:
    """Returns what a capture fixes of a network's arguments: the shapes of tensors, and all other values."""
    if kwargs is None:
        return None
    return tuple(
        (name, (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (type(value), value))
        for name, value in sorted(kwargs.items())
    )


def _settings(device_type: str) -> tuple[Any, ...]:
    """Returns PyTorch's global settings that affect the choice of kernels."""
    precision: tuple[Any, ...] = (torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    cuda: Any = torch.backends.cuda
    attention = (
        cuda.flash_sdp_enabled,
        cuda.mem_efficient_sdp_enabled,
        cuda.math_sdp_enabled,
        cuda.cudnn_sdp_enabled,
    )
    return (
        torch.get_default_dtype(),
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        *(switch.fp32_precision for switch in precision),
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        *(enabled() for enabled in attention),
    )


def _trajectory(network: Network, form: Form, conditions: Conditions) -> Trajectory:
    """Returns the trajectory of a form, from the few that are kept per network, or a new one."""
    with _LOCK:
        kept: OrderedDict[Form, Trajectory] = network.kept.trajectories
        if form in kept:
            kept.move_to_end(form)
        else:
            with torch.inference_mode(False):  # its memory is written to in other modes too
                kept[form] = Trajectory(form, conditions)
            while len(kept) > _TRAJECTORIES:
                kept.popitem(last=False)
        return kept[form]


def release(network: Network) -> None:
    """Frees the memory of everything captured for a network."""
    with _LOCK:
        network.kept.trajectories.clear()


class Trajectory:
    """The device memory of a form, and graphs of rows that work on it. Only one run at a time uses it."""

    def __init__(self, form: Form, conditions: Conditions) -> None:
        self._form = form
        self._lock = threading.Lock()
        self._graphs: OrderedDict[tuple[int, bool], Callable[[], None]] = OrderedDict()  # by length, and if guided
        self._recording: capture.Recording | None = None
        self._network: Fingerprint | None = None  # at the last recording
        self._counts: frozenset[int] = frozenset()  # where that changes in every call, as in a count of calls
        batch, size = form.shape[0], math.prod(form.shape[1:])
        fp32: dict[str, Any] = {"dtype": torch.float32, "device": form.device}
        slots = form.terms.slots
        self._slots = [torch.zeros(form.shape, **fp32) for _ in range(slots)]
        self._input = torch.zeros(form.shape, **fp32) if form.has_input else None  # None: slot 0, wherever that is
        self._keys = torch.zeros((batch, 2), dtype=torch.int64, device=form.device)
        self._rows = torch.zeros((form.rows, row_width(slots)), **fp32)
        self._time = torch.zeros(batch, **fp32)
        self._counter = ops.step_counter(batch, size, form.device)
        self._status = ops.new_status(form.device)
        self._langevin = torch.zeros((form.rows, 2), **fp32) if form.has_langevin else None
        self._sizes = torch.zeros((batch, 2), **fp32) if form.has_langevin else None
        self._weights: dict[str, Tensor | None] = {"scale": None, "rates": None, "factor": None}
        if form.rescale is not None:
            self._weights = {"scale": torch.zeros(batch, **fp32), "rates": torch.zeros(form.rows, **fp32)}
            self._weights["factor"] = torch.zeros(batch, **fp32) if form.rescale else None
        self._conditions: Conditions = (_own(conditions[0]), None if conditions[1] is None else _own(conditions[1]))
        capture.wait(form.device)  # for the writes above: another thread's stream may use the memory first

    def run(self, network: Network, x: Tensor, request: Request) -> Tensor:
        """Runs all rows from the state ``x``. The result is in new memory."""
        table, recorder = request.table, request.recorder
        guided = (False,) * len(table) if request.guidance is None else request.guidance.guided
        kinds = alike(guided, None if recorder is None or recorder.states is None else recorder.every)
        with self._lock:
            self._record(request.networks(network), kinds)
            try:
                self._start(x, request)
                rows = 0
                for length, is_guided in kinds:
                    self._graphs[length, is_guided]()
                    rows += length
                    if recorder is not None:
                        recorder.advance(rows, length, self._slots[0])
                result = self._slots[0].clone()
                ops.check_status(self._status, table)  # waits, so that the next run finds the memory idle
            except BaseException:
                capture.wait(self._form.device)
                raise
        return result

    def _record(self, networks: Sequence[Network], kinds: Sequence[tuple[int, bool]]) -> None:
        """Captures the missing graphs, or all if a network has changed or its weights have moved."""
        found = joined([each.fingerprint() for each in networks])
        if self._network is None or not found.is_run_as(self._network, self._counts):
            self._graphs.clear()
            self._recording = None
        if all(kind in self._graphs for kind in kinds):
            return
        if self._recording is None:
            recording = capture.Recording(self._form.device)
            self._warm_up(recording, networks, _WARM_UPS)
            now = joined([each.fingerprint() for each in networks])
            self._recording, self._counts = recording, now.differences(found)
        elif not self._recording.is_warm:  # in this thread
            self._warm_up(self._recording, networks, 1)
        for kind in sorted(set(kinds) - set(self._graphs)):
            self._graphs[kind] = self._recording.record(lambda kind=kind: self._run_rows(networks, *kind))  # type: ignore[misc]
        spare = [kind for kind in self._graphs if kind not in kinds]
        for kind in spare[: max(0, len(self._graphs) - _GRAPHS)]:
            del self._graphs[kind]
        self._network = joined([each.fingerprint() for each in networks])

    def _warm_up(self, recording: capture.Recording, networks: Sequence[Network], rows: int) -> None:
        kinds = [False] if self._form.rescale is None else [True, False]  # of rows, which launch different kernels

        def run() -> None:
            for is_guided in kinds * rows:
                self._counter.zero_()
                self._run_rows(networks, 1, is_guided)

        with ExitStack() as stack:
            for each in networks:
                stack.enter_context(each.unchanged())
            recording.warm_up(run)

    def _run_rows(self, networks: Sequence[Network], count: int, is_guided: bool) -> None:
        # A cast that autocast caches would not belong to the graph, and could be freed while the graph still reads it.
        kind = self._form.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            slots = self._slots
            for _ in range(count):
                slots = self._run_row(networks, slots, is_guided)
            moved = [(ours, slot) for ours, slot in zip(self._slots, slots, strict=True) if ours is not slot]
            for (ours, _), value in zip(moved, [slot.clone() for _, slot in moved], strict=True):
                ours.copy_(value)  # the next replay expects each slot where this one did

    def _run_row(self, networks: Sequence[Network], slots: list[Tensor], is_guided: bool) -> list[Tensor]:
        """Runs one row in place. Returns where the new slots are."""
        form, terms = self._form, self._form.terms
        x = slots[0] if self._input is None else self._input
        model_kwargs, uncond_kwargs = self._conditions
        uncond_kwargs = uncond_kwargs if is_guided else None
        f, f_uncond = evaluate(networks[0], x, self._time, model_kwargs, uncond_kwargs, networks[-1])
        if f_uncond is not None and form.rescale:
            f, f_uncond = f.contiguous(), f_uncond.contiguous()
            ops.rescale_factor(f, f_uncond, 0, counter=self._counter, phi=form.rescale, **self._weights)
        weights = self._weights if is_guided else {}
        keys = self._keys if terms.has_noise else None
        if self._sizes is not None:
            f, f_uncond = f.contiguous(), None if f_uncond is None else f_uncond.contiguous()
            given = {
                "langevin": self._langevin,
                "terms": terms,
                "keys": keys,
                "f_uncond": f_uncond,
                "counter": self._counter,
            }
            ops.langevin_size(slots, f, self._rows, 0, sizes=self._sizes, **given, **weights)
        new = [slots[place] for place in terms.places]
        ops.counted_step(
            slots,
            f,
            self._rows,
            self._counter,
            terms=terms,
            out=[place if slot in terms.computed else None for slot, place in enumerate(new)],
            network_input=self._input if any(terms.n) else None,
            time=self._time,
            status=self._status,
            keys=keys,
            f_uncond=f_uncond,
            **weights,
            sizes=self._sizes,
            clip=form.clip,
        )
        return new

    def _start(self, x: Tensor, request: Request) -> None:
        table = request.table
        for slot in self._slots[1:]:
            slot.zero_()
        self._slots[0].copy_(x)
        if self._input is not None:
            self._input.copy_(network_input(self._slots, table, 0))
        self._keys.copy_(request.keys)
        self._rows.copy_(ops.device_table(table, self._form.device))
        self._time.fill_(float(table.time[0]))
        self._counter.zero_()
        self._status.copy_(ops.new_status(self._form.device))
        if self._langevin is not None:
            self._langevin.copy_(table.langevin)
        if request.guidance is not None:
            weights = request.guidance
            for name, now in (("scale", weights.scale), ("rates", weights.rates_on(self._form.device))):
                ours = self._weights[name]
                assert ours is not None
                ours.copy_(now)
        for own, given in zip(self._conditions, request.conditions, strict=True):
            for name, value in (given or {}).items():
                if isinstance(value, Tensor) and own is not None:
                    own[name].copy_(value)


def _own(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments, with tensors in their own memory."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
