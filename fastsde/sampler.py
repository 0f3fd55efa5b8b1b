"""`sample`, the one call that replaces a sampling loop, and `Sampler`, which is built once and called many times."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import conditions, engines, inverse, ops, subject
from .adaptive import AdaptiveProblem, AdaptiveSolver, make_problem
from .dynamo import untraced
from .engines import CaptureError, Network, batches
from .engines.inspection import check_call, device_of, dtype_of, random_layers
from .guidance import Guidance
from .inverse import ClassifierGuidance, Measurement, Problem, Schedule
from .models.mlp import check_sample_shape
from .notices import warn, warn_once
from .plan import Plan, Planner, compiler_of
from .randomness import Seed, seed_of
from .recorder import Recorder
from .reference import NoiseFunction, RowHook
from .request import Request, make_keys, options_of
from .sde import Process
from .solvers import StepTable
from .subject import CallOptions, ModelLike, SampleOptions, TableOptions
from .validation import (
    check_bool,
    check_int,
    check_kwargs,
    check_number,
    check_shape,
    check_tensor,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Sampler", "sample"]

_NETWORK_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Sampler:
    """Samples from a score network, any number of times.

    A `StepTable` fixes the times, the prediction and the solver's options: leave these arguments at their defaults. It
    does not tell how far its rows are from the data, so that known values, measurements and classifier guidance need a
    named solver.

    Args:
        model: the network, called as ``model(x, t, **model_kwargs)`` with x ``[B, *shape]`` and t ``[B]``; an
            ``nn.Sequential`` is called with ``cat((x, t), -1)`` instead. It stays in its training or evaluation mode.
            Or a `fastsde.checkpoints.Checkpoint`, a checkpoint file, the folder of a training run, or the name of a
            shipped model.
        sample_shape: the shape of one sample; a checkpoint has its own.
        sde: the process, by default ``VPSDE()``; a checkpoint has its own. Samples start from its prior, even if the
            solver is a `StepTable`.
        solver: one of `fastsde.solvers.SOLVERS`, such as "euler_maruyama", "ddim" or "unipc", or a `StepTable`. Or an
            adaptive solver, `fastsde.solvers.AdaptiveODE` or `fastsde.solvers.GottaGoFast`, whose tolerances take the
            place of ``steps``, ``spacing``, ``rho``, ``clip``, ``eta`` and ``solver_options``.
        steps: the rows of the solver's table, that is, calls of the network. The tutorial uses 999.
        t_start: the time to start at, in [0, t_max], where ``x_init`` is the state; by default t_max.
        t_end: the time that the trajectory ends at, in [0, t_start); by default 0, or ``sde.t_min`` with an adaptive
            solver, which would need very short steps where the network was not trained. A table without noise may also
            end above t_start, to run upwards, from data to noise (`fastsde.encode`).
        spacing: how the times in between are spaced: "uniform", "karras", "log_snr", "quadratic", "trailing" or
            "leading" (see `fastsde.solvers.times.spaced`); by default "karras" for EDM, else "uniform".
        rho: the rho of "karras" spacing, by default 7.
        prediction: what the network predicts: "score" (the default), "eps", "x0", "v" or "flow"; a checkpoint has its
            own.
        clip: the bound of the predicted x_0, for solvers that use it, such as ddpm and dpm_solver_pp_2m.
        eta: the share of DDPM's noise in [0, 1], for ddim and euler_ancestral.
        solver_options: more options of the solver's builder in `fastsde.solvers`, such as ``{"order": 3}`` for unipc.
        denoise: the last of the ``steps`` rows gives the predicted x_0, instead of a step to ``t_end``; with an
            adaptive solver, one more call of the network at ``t_end`` does.
        resamples: how often RePaint (arXiv:2201.09865) comes down each part of the way, for a ``mask`` in the call; 1
            is without it, the paper uses 10. ``steps`` counts the rows of the way down alone.
        jump: after how many rows RePaint goes back up, by as many; the paper uses 10.
        prior_std: the standard deviation of the initial draw, by default that of the process's prior.
        dtype: the dtype that the network runs in, by default that of its weights. x is cast to it; t is fp32, or an
            integer if the network accepts nothing else and all times are integers; floating-point arguments keep their
            dtype if the network accepts it. The state is fp32; state and t are float64 if ``dtype`` is. On a GPU,
            PyTorch runs fp32 convolutions in TF32 unless ``torch.backends.cudnn.allow_tf32`` is False.
        device: by default the network's own device, or PyTorch's default device for a function.
        guidance: w of classifier-free guidance, f = f_uncond + w (f_cond - f_uncond) (arXiv:2207.12598), a number or
            one a sample, ``[n]``; or a `fastsde.Guidance`, whose w may vary along the rows, too. The unconditional call
            needs ``uncond_kwargs``; for a checkpoint these are its values of "no condition". Or a
            `fastsde.ClassifierGuidance`, whose gradient is added to the score.
        backend: "auto", "reference" (plain PyTorch), "eager" (row by row; each row's step is one kernel), "graph" (on a
            GPU, dozens of rows captured as one CUDA graph and replayed) or "persistent" (all rows of a small
            network in one launch); "auto" picks the fastest that can run. There, as in a capture, a network must depend
            only on its arguments, weights and attributes: its host code runs only once.
        compile: True: run the network through ``torch.compile``; "openvino": by OpenVINO, on the CPU in fp32. If that
            fails, it runs uncompiled, with a warning. "auto" compiles for calls with enough work to be worth the time,
            by OpenVINO if it is installed and by ``torch.compile``, and keeps the fastest.
        max_batch: the most samples that run at once; larger batches are split, with the same result up to the rounding
            of the network. "auto" measures which batch is fastest, and halves it if memory runs out.
        differentiable: whether gradients flow through the samples, to the network's parameters, ``x_init`` and
            ``model_kwargs``. The rows run by PyTorch's own operations, and activations are computed again in the
            backward pass (Chen et al. 2016, arXiv:1604.06174), so that memory holds the states of all rows but the
            activations of one.

    Attributes:
        table: the solver's rows, a `StepTable`; of an adaptive solver one call of the network.
        sample_shape: the shape of one sample.
        device: where it runs.
        state_dtype: the dtype of the state and the samples, fp32 or float64.
        guidance: the `fastsde.Guidance`, or None.
        max_batch: as given.
        differentiable: as given.

    Raises:
        ValueError, TypeError: for an invalid argument; the message names it, the value given and what was expected.
        FileNotFoundError: if the checkpoint does not exist.
        MissingExtraError: if a library that an argument needs is not installed, such as OpenVINO.
    """

    def __init__(
        self,
        model: ModelLike,
        sample_shape: Sequence[int] | None = None,
        *,
        sde: Process | None = None,
        solver: str | StepTable | AdaptiveSolver = "euler_maruyama",
        steps: int = 999,
        t_start: float | None = None,
        t_end: float | None = None,
        spacing: str | None = None,
        rho: float | None = None,
        prediction: str | None = None,
        clip: float | None = None,
        eta: float | None = None,
        solver_options: Mapping[str, Any] | None = None,
        denoise: bool = False,
        resamples: int = 1,
        jump: int = 10,
        prior_std: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        guidance: float | Tensor | Guidance | ClassifierGuidance | None = None,
        backend: str = "auto",
        compile: bool | str = False,
        max_batch: int | str | None = None,
        differentiable: bool = False,
    ) -> None:
        model, sample_shape, sde, known, self._checkpoint = subject.resolve(
            model, sample_shape, sde, prediction, device
        )
        self.sample_shape = check_shape("sample_shape", sample_shape)
        if not isinstance(solver, StepTable):
            prediction = known
        options: TableOptions = {
            "t_start": t_start,
            "t_end": t_end,
            "spacing": spacing,
            "rho": rho,
            "clip": clip,
            "eta": eta,
            "solver_options": solver_options,
            "denoise": denoise,
            "resamples": resamples,
            "jump": jump,
        }
        self._adaptive: AdaptiveProblem | None = None
        self._schedule: Schedule | None = None
        if isinstance(solver, AdaptiveSolver):
            self._adaptive = make_problem(solver, sde, steps, known, options)
            self.table = self._adaptive.one_call()
        else:
            self.table = subject.make_table(solver, sde, steps, prediction=prediction, **options)
        if isinstance(solver, str):
            self._schedule = Schedule(sde, known, self.table, t_end or 0.0, denoise, resamples > 1)
        self._t_start = t_start
        self._prior_std = sde.prior_std if prior_std is None else check_number("prior_std", prior_std)
        self._classifier = guidance if isinstance(guidance, ClassifierGuidance) else None
        self.guidance: Guidance | None = None
        if guidance is not None and not isinstance(guidance, ClassifierGuidance):
            self.guidance = Guidance.of(guidance)
            if self._adaptive is not None:
                self._adaptive.check_guidance(self.guidance)
            self.guidance = self.guidance.along(self.table)
        if isinstance(max_batch, str) and max_batch != "auto":
            raise ValueError(f"max_batch must be an int, 'auto' or None, got {max_batch!r}")
        self.max_batch = max_batch if max_batch in (None, "auto") else check_int("max_batch", max_batch, 1)
        self.device = subject.make_device(device, model)
        runs_in = dtype_of(model) if dtype is None else dtype
        if runs_in not in _NETWORK_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, _NETWORK_DTYPES))}, got {runs_in}")
        self.state_dtype = torch.float64 if runs_in == torch.float64 else torch.float32
        self.differentiable = check_bool("differentiable", differentiable)
        if differentiable and dtype is not None and dtype != dtype_of(model):
            raise ValueError(
                f"dtype must be that of the weights with differentiable=True, {dtype_of(model)}, got {dtype}: a copy "
                f"in another dtype would take the gradients"
            )
        optimize = not differentiable and backend != "reference" and self.state_dtype == torch.float32
        integer_times = self._adaptive is None and bool((self.table.time == self.table.time.round()).all())
        self._network = Network(model, dtype, compiler_of(compile), optimize, self.device, integer_times)
        self._other: Network | None = None  # the network of the unconditional output, if it is another one
        if self.guidance is not None and self.guidance.model is not None:
            other = subject.resolve(self.guidance.model, self.sample_shape, sde, known, self.device).model
            subject.make_device(self.device, other)
            if other is not model:
                self._other = Network(other, dtype, compiler_of(compile), optimize, self.device, integer_times)
        check_sample_shape(self._network.model, self.sample_shape)
        if runs_in == torch.bfloat16 and self.device.type == "cpu" and not ops.multiplies_bf16():
            warn_once("this CPU has no bf16 arithmetic, so a network in bfloat16 is slower than in float32")
        times = self.table.time.to(torch.float32).to(self.device)
        is_adaptive = self._adaptive is not None
        self._planner = Planner(
            self._network, self.sample_shape, self.state_dtype, backend, compile, times, is_adaptive
        )
        self._planner.backend(self._options)  # raises if none can run

        self._ran: str | None = None
        self._passed_over: str | None = None
        self._calls: Tensor | int | None = None  # an int is the number of samples, for which all rows ran
        self._seed: int | None = None

    @property
    def last_seed(self) -> int | None:
        """The seed of the last call, given or drawn; None before the first, and for a call with ``keys``."""
        return self._seed

    @property
    def last_backend(self) -> str | None:
        """The backend that ran the last call, or None before the first."""
        return self._ran

    @property
    def passed_over(self) -> str | None:
        """Why ``backend="auto"`` could not run the last call in one launch, or None if it could."""
        return self._passed_over

    @property
    def network_calls(self) -> Tensor | None:
        """How often the last call ran the network for each sample, int64 ``[n]``, or None before the first.

        The two outputs of classifier-free guidance count as one.
        """
        if isinstance(self._calls, int):
            return torch.full((self._calls,), len(self.table), dtype=torch.int64, device=self.device)
        return self._calls

    @property
    def _options(self) -> list[str]:
        corrections = [] if self._classifier is None else [self._classifier.name]
        return options_of(self.table, self.guidance, self.differentiable) + corrections

    @property
    def backend(self) -> str:
        """The backend of a call without further options, for the network as it was at the last call."""
        return self._planner.backend(self._options)

    def __repr__(self) -> str:
        name = type(self._network.model).__name__
        shape = self.sample_shape
        solver = f"{len(self.table)} rows" if self._adaptive is None else self._adaptive.solver
        return f"Sampler({name}, {shape}, {solver}, backend={self.backend!r}, device={str(self.device)!r})"

    @overload
    def __call__(self, n: int, *, trajectory: None = None, **options: Unpack[CallOptions]) -> Tensor: ...

    @overload
    def __call__(self, n: int, *, trajectory: int, **options: Unpack[CallOptions]) -> tuple[Tensor, Tensor]: ...

    @overload
    def __call__(
        self, n: int, *, trajectory: int | None, **options: Unpack[CallOptions]
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    @untraced
    def __call__(
        self,
        n: int,
        *,
        seed: Seed = 0,
        first_sample: int = 0,
        keys: Tensor | Sequence[int] | None = None,
        x_init: Tensor | None = None,
        noise: NoiseFunction | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        measurement: Measurement | None = None,
        trajectory: int | None = None,
        callback: RowHook | None = None,
        progress: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draws ``n`` samples. `fastsde.sample` says more about each argument, and what is raised.

        Args:
            n: the number of samples.
            seed: in [0, 2^64), or a ``torch.Generator`` or None to draw it from.
            first_sample: the global index of the first sample.
            keys: one key per sample, int64 ``[n, 2]``, or one seed per sample, ``[n]``.
            x_init: the initial state ``[n, *shape]``, instead of a draw from the prior.
            noise: ``(row, x) -> z``, instead of the noise contract.
            model_kwargs: further arguments of the network, tensors with the batch first.
            uncond_kwargs: those of the unconditional call of classifier-free guidance.
            mask: bool, True where the data are known; broadcasts to ``[n, *shape]``.
            known: the known data, where ``mask`` is True; broadcasts to ``[n, *shape]``.
            measurement: a `fastsde.DPS` or `fastsde.PiGDM`.
            trajectory: m, to return the states after 0, m, 2m, ... rows too.
            callback: called as ``callback(row, time, x)`` after each row. A tensor that it returns replaces the state.
            progress: show a progress bar on stderr.

        Returns:
            The samples ``[n, *shape]``; with ``trajectory`` a pair of the samples and the states
            ``[steps // m + 1, n, *shape]``.
        """
        if trajectory is not None:
            check_int("trajectory", trajectory, 1)
        check_bool("progress", progress)
        seed = seed_of(seed) if keys is None else seed
        self._seed = seed if keys is None and isinstance(seed, int) else None
        if self._adaptive is not None:
            self._adaptive.check_options(
                noise=noise, trajectory=trajectory, callback=callback, mask=mask, measurement=measurement
            )
        problem = self._problem(check_int("n", n, 0), mask, known, measurement)
        request = self._request(
            n, seed, first_sample, keys, x_init, noise, model_kwargs, uncond_kwargs, callback, problem
        )
        saved = None
        if trajectory is not None:
            count = len(self.table) // trajectory + 1
            saved = torch.empty((count, *request.shape), dtype=self.state_dtype, device=self.device)
        for network in request.networks(self._network):
            network.refresh()
        self._warn_of_randomness()
        try:
            with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
                plan = self._planner.plan(request, self.max_batch, _tell_of_compiling if progress else _tell_nothing)
                x = self._run(request, plan, saved, trajectory or 1, progress)
        except TypeError:
            names = ("model_kwargs", "uncond_kwargs")
            networks = request.networks(self._network)
            for name, conditions, network in zip(names, request.conditions, (networks[0], networks[-1]), strict=True):
                if conditions is not None:
                    check_call(network.model, name, conditions)  # names the argument, if that is the cause
            raise
        return x if saved is None else (x, saved)

    def _request(
        self,
        n: int,
        seed: Seed,
        first_sample: int,
        keys: Tensor | Sequence[int] | None,
        x_init: Tensor | None,
        noise: NoiseFunction | None,
        model_kwargs: Mapping[str, Any] | None,
        uncond_kwargs: Mapping[str, Any] | None,
        callback: RowHook | None,
        problem: Problem | None = None,
    ) -> Request:
        """Checks the arguments of a call and returns its request."""
        for name, function in (("noise", noise), ("callback", callback)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable, got {type(function).__name__}")
        keys = make_keys(keys, n, seed, first_sample, self.device, self._planner.is_reference)
        if self._checkpoint is not None and self._checkpoint.conditions:
            known, has_null = self._checkpoint.conditions, self._checkpoint.has_null
            if problem is not None and has_null and model_kwargs is None:
                model_kwargs = {}  # a label that is drawn might not go with what is known
            model_kwargs = conditions.completed(known, model_kwargs, keys, has_null)
            if self.guidance is not None and self.guidance.model is None and uncond_kwargs is None:
                uncond_kwargs = conditions.unconditional(known, n, self.device, has_null)
            for name, given in (("model_kwargs", model_kwargs), ("uncond_kwargs", uncond_kwargs)):
                conditions.check_labels(name, given, known)
        if self.guidance is not None and self.guidance.model is not None and uncond_kwargs is None:
            uncond_kwargs = {} if model_kwargs is None else model_kwargs
        if self._classifier is not None and uncond_kwargs is not None:
            raise ValueError("uncond_kwargs are for classifier-free guidance: leave them out with ClassifierGuidance")
        if (self.guidance is None) != (uncond_kwargs is None):
            raise ValueError(
                "guidance and uncond_kwargs go together: give both or neither; uncond_kwargs is what the network takes "
                "for no condition, such as {'label': torch.full((n,), classes)}"
            )
        shape = (n, *self.sample_shape)
        if self._t_start is not None and x_init is None:
            raise ValueError(f"x_init must be given with t_start, as the state at t = {self._t_start:g}, got None")
        if x_init is not None:
            x_init = check_tensor("x_init", x_init, shape=shape, device=self.device, floating=True)
            check_tensor("x_init", x_init.to(self.state_dtype), finite=True)  # a float64 value may overflow fp32
        return Request(
            shape,
            self.table,
            keys,
            x_init=x_init,
            prior_std=self._prior_std,
            noise=None if noise is None else _checked_noise(noise),
            model_kwargs=check_kwargs("model_kwargs", {} if model_kwargs is None else model_kwargs, n, self.device),
            guidance=None
            if self.guidance is None
            else self.guidance.weights(n, self.table, self.device, self.state_dtype, self._other),
            uncond_kwargs=None
            if uncond_kwargs is None
            else check_kwargs("uncond_kwargs", uncond_kwargs, n, self.device),
            dtype=self.state_dtype,
            callback=callback,
            differentiable=self.differentiable,
            adaptive=self._adaptive,
            problem=problem,
        )

    def _problem(
        self, n: int, mask: Tensor | None, known: Tensor | None, measurement: Measurement | None
    ) -> Problem | None:
        shape = (n, *self.sample_shape)
        given = (mask, known, self._classifier, measurement)
        return inverse.problem_of(self._schedule, shape, self.device, self.state_dtype, *given)

    def _warn_of_randomness(self) -> None:
        for network in (self._network, self._other):
            if network is None or not (layers := random_layers(network.model)):
                continue
            warn_once(
                f"the network has {', '.join(layers)} in training mode: the same seed gives different samples in each "
                f"call, or in another batch; call model.eval() first",
                network.kept.told if isinstance(network.model, nn.Module) else None,
            )

    def _run(self, request: Request, plan: Plan, saved: Tensor | None, every: int, progress: bool) -> Tensor:
        """Runs all parts, smaller ones if memory runs out, and with another backend if one fails."""
        n, rows, first = request.shape[0], len(self.table), 0
        x: Tensor | None = None if n else torch.empty(request.shape, dtype=request.dtype, device=self.device)
        calls = None if self._adaptive is None else torch.zeros(n, dtype=torch.int64, device=self.device)
        self._calls = n if calls is None else calls
        unit = "row" if self._adaptive is None else "batch"
        with tqdm(total=rows * -(-n // plan.batch), disable=not progress, unit=unit) as bar:
            while first < n or x is None:
                part, done = slice(first, min(first + plan.batch, n)), bar.n
                bar.total = done + rows * -(-(n - first) // plan.batch)
                states = None if saved is None else saved[:, part]
                counts = None if calls is None else calls[part]
                recorder = Recorder(bar, states, every, request.callback, counts)
                try:
                    drawn = engines.get(plan.backend)(plan.network, request.part(part, recorder=recorder))
                except CaptureError as error:
                    plan = self._after_failure(plan, request, error)
                except RuntimeError as error:
                    if not batches.is_out_of_memory(error):
                        raise
                    engines.release(self._network)  # a retry with fewer samples needs the memory
                    if not plan.may_shrink or plan.batch == 1:
                        raise
                    plan, bar.n = plan.halved(n - first), done
                else:
                    self._ran, self._passed_over = plan.backend, plan.passed_over
                    if len(drawn) == n:
                        return drawn
                    x = drawn.new_empty(request.shape) if x is None else x
                    x[part] = drawn
                    first += plan.batch
        return x

    def _after_failure(self, plan: Plan, request: Request, error: CaptureError) -> Plan:
        engines.release(self._network)
        if not self._planner.is_free:
            raise CaptureError(f"backend {plan.backend!r}: {error}; use 'eager' or 'auto'") from error
        other = self._planner.without(plan, request)
        warn(f"the network does not run with backend {plan.backend!r}, so {other.backend!r} takes over: {error}")
        return other


@overload
def sample(
    model: ModelLike, shape: Sequence[int], *, trajectory: None = None, **options: Unpack[SampleOptions]
) -> Tensor: ...


@overload
def sample(
    model: ModelLike, shape: Sequence[int], *, trajectory: int, **options: Unpack[SampleOptions]
) -> tuple[Tensor, Tensor]: ...


@overload
def sample(
    model: ModelLike, shape: Sequence[int], *, trajectory: int | None, **options: Unpack[SampleOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...


@untraced
def sample(
    model: ModelLike,
    shape: Sequence[int],
    *,
    sde: Process | None = None,
    solver: str | StepTable | AdaptiveSolver = "euler_maruyama",
    steps: int = 999,
    t_start: float | None = None,
    t_end: float | None = None,
    spacing: str | None = None,
    rho: float | None = None,
    prediction: str | None = None,
    seed: Seed = 0,
    first_sample: int = 0,
    keys: Tensor | Sequence[int] | None = None,
    x_init: Tensor | None = None,
    noise: NoiseFunction | None = None,
    clip: float | None = None,
    eta: float | None = None,
    solver_options: Mapping[str, Any] | None = None,
    denoise: bool = False,
    resamples: int = 1,
    jump: int = 10,
    prior_std: float | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    guidance: float | Tensor | Guidance | ClassifierGuidance | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    measurement: Measurement | None = None,
    backend: str = "auto",
    compile: bool | str = False,
    max_batch: int | str | None = None,
    differentiable: bool = False,
    trajectory: int | None = None,
    callback: RowHook | None = None,
    progress: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draws samples from a score network by the reverse SDE or the probability flow of a process.

    The same seed gives the same samples up to rounding, however the batch is split, on any device and backend. To draw
    more than once from a network, build a `Sampler`, which has more to say about what it shares with this function.

    Args:
        model: the network, called as ``model(x, t, **model_kwargs)`` with x ``[B, *shape]`` and t ``[B]``; or a
            checkpoint, its file, the folder of a run, or the name of a shipped model.
        shape: ``(B, *shape)``, the batch first.
        sde: the process, by default ``VPSDE()`` or that of the checkpoint.
        solver: the name of a solver, one of `fastsde.solvers.SOLVERS`; or a `StepTable` or an adaptive solver.
        steps: the calls of the network.
        t_start: the time to start at, by default t_max; below it, ``x_init`` must be given.
        t_end: the time to end at, by default 0, or ``sde.t_min`` with an adaptive solver.
        spacing: of the times: "uniform", "karras", "log_snr", "quadratic", "trailing" or "leading".
        rho: the rho of "karras" spacing, by default 7.
        prediction: what the network predicts: "score" (the default), "eps", "x0", "v" or "flow".
        seed: in [0, 2^64); or a ``torch.Generator`` or None, to draw it from that generator or PyTorch's global one.
            `Sampler.last_seed` and the logger "fastsde" tell the seed that was drawn.
        first_sample: the global index of the first sample: drawing 10 with first_sample = 90 gives the last ten of
            drawing 100.
        keys: one key per sample, int64 ``[B, 2]``, or one seed per sample, ``[B]``; sample i is then the one that
            ``sample(model, (1, ...), seed=keys[i])`` draws.
        x_init: the initial state ``[B, *shape]`` instead of a draw from the prior. With ``t_start`` it is the state at
            that time: to start from an image x, draw it with the mean and std of ``sde.marginal_prob(x, t_start)``.
        noise: ``(row, x) -> z`` instead of the noise contract, called after the network in rows that have noise (ddim
            and heun have none). The prior still comes from the contract, unless ``x_init`` is given.
        clip: the bound of the predicted x_0, for solvers that use it.
        eta: the share of DDPM's noise in [0, 1], for ddim and euler_ancestral.
        solver_options: more options of the solver, such as ``{"order": 3}`` for unipc.
        denoise: the last row gives the predicted x_0, instead of a step to ``t_end``.
        resamples: how often RePaint comes down each part of the way, for a ``mask``.
        jump: after how many rows RePaint goes back up.
        prior_std: the standard deviation of the initial draw, by default that of the process's prior.
        dtype: the dtype that the network runs in, by default that of its weights.
        device: by default the network's own; for a function that of ``x_init`` or ``keys``, or PyTorch's default.
        model_kwargs: further arguments of the network: tensors with the batch first, or plain scalars. Without them, a
            checkpoint that was trained with labels draws them, as frequent as in its data, and with vectors has none;
            with a mask, a measurement or classifier guidance it has none, if it can do without.
        guidance: w of classifier-free guidance, a number or one a sample; or a `fastsde.Guidance` or
            `fastsde.ClassifierGuidance`.
        uncond_kwargs: the same for the unconditional call of classifier-free guidance.
        mask: bool, True where the data are known; broadcasts to ``[B, *shape]``. After each row, known values with the
            noise of its time are put in there (Song et al. 2021, arXiv:2011.13456, appendix I.2), in slot 0 of the
            state: what a multistep solver remembers stays. The unknown part fits the known one better with
            ``resamples``. That noise is always the contract's (stream 4).
        known: the data (at t = 0), floating-point; broadcasts to ``[B, *shape]``, and is read only where ``mask`` is
            True.
        measurement: a `fastsde.DPS` or `fastsde.PiGDM`, which draws the samples towards a measurement of them.
        backend: "auto" (the fastest that can run), "reference", "eager", "graph" or "persistent".
        compile: True for ``torch.compile``, "openvino", or "auto" for what pays.
        max_batch: the most samples that run at once, or "auto".
        differentiable: whether gradients flow to the network's parameters, ``x_init`` and ``model_kwargs``.
        trajectory: m, to return every m-th state too: the states after 0, m, 2m, ... rows; if m divides the steps, the
            last of them are the samples.
        callback: called as ``callback(row, time, x)`` after each row, with the time that the network was called with
            and the state after the row; with ``max_batch``, for each part of the batch in turn. A tensor that it
            returns replaces the state.
        progress: show a progress bar on stderr.

    Returns:
        The samples ``[B, *shape]``, fp32 (float64 if ``dtype`` is); with ``trajectory`` a pair of the samples and the
        states ``[steps // m + 1, B, *shape]``.

    Raises:
        ValueError, TypeError: for an invalid argument; the message names it, the value given and what was expected.
        NonFiniteError: if the network's output or the state becomes NaN or infinite; the message gives row and time.
    """
    shape = check_shape("shape", shape)
    if not shape:
        raise ValueError("shape must have the batch first, got ()")
    if device is None and device_of(model) is None:
        device = next((value.device for value in (x_init, keys) if isinstance(value, Tensor)), None)
    sampler = Sampler(
        model,
        shape[1:],
        sde=sde,
        solver=solver,
        steps=steps,
        t_start=t_start,
        t_end=t_end,
        spacing=spacing,
        rho=rho,
        prediction=prediction,
        clip=clip,
        eta=eta,
        solver_options=solver_options,
        denoise=denoise,
        resamples=resamples,
        jump=jump,
        prior_std=prior_std,
        dtype=dtype,
        device=device,
        guidance=guidance,
        backend=backend,
        compile=compile,
        max_batch=max_batch,
        differentiable=differentiable,
    )
    return sampler(
        shape[0],
        seed=seed,
        first_sample=first_sample,
        keys=keys,
        x_init=x_init,
        noise=noise,
        model_kwargs=model_kwargs,
        uncond_kwargs=uncond_kwargs,
        mask=mask,
        known=known,
        measurement=measurement,
        trajectory=trajectory,
        callback=callback,
        progress=progress,
    )


def _tell_of_compiling(network: Network) -> None:
    if network.is_to_be_compiled:
        takes = "a few seconds" if network.compiler == "openvino" else "10 to 60 s"
        tqdm.write(f"{network.compiler} compiles the network first, which takes {takes}", file=sys.stderr)


def _tell_nothing(network: Network) -> None:
    pass


def _checked_noise(function: Callable[[int, Tensor], Tensor]) -> NoiseFunction:
    def checked(row: int, x: Tensor) -> Tensor:
        z = function(row, x)
        return check_tensor(f"the result of noise in row {row}", z, shape=x.shape, device=x.device).to(x.dtype)

    return checked
