"""The training loop: a run is a function of its `TrainConfig`, and resumes to the very same weights."""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoints, distributed, models, run_folder
from .checkpoints import RUN_CHECKPOINT, Checkpoint
from .data import DEFAULT_ROOT, Dataset, load
from .distributed import Ranks
from .engines import CaptureError
from .engines.fetch import Fetch
from .engines.inspection import prefers_channels_last
from .engines.training import CapturedSteps, EagerSteps, NativeSteps, Steps, Work, can_capture, can_run_natively
from .notices import warn
from .reference import NonFiniteError
from .run_folder import RunLog
from .sde import VPSDE, Process, from_dict, to_dict
from .validation import check_bool, check_device, check_instance, check_int, check_number, check_range
from .vocabulary import LR_SCHEDULES, PRECISIONS, PREDICTIONS, WEIGHTINGS

__all__ = ["TrainConfig", "Trainer", "default_config", "saved_config", "tutorial_config"]


class _Line(NamedTuple):
    """What a log line will tell, once its loss has come from the device."""

    step: int
    steps: int  # that the loss is the mean of
    loss: Fetch


@dataclass(frozen=True)
class TrainConfig:
    """All that a run is a function of, beside the library versions and the device.

    Args:
        data: the data set: "swiss-roll", "digits" or "mnist" (or a name of your own, with a `Dataset` of your own).
        data_size: how many points or images, or None for the usual (`fastsde.data.load`).
        pixel_range: what black and white become, of images in uint8 (floats are trained on as they are).
        model: the architecture, as `fastsde.models.from_config` takes it.
        prediction: what the network learns: "score", "eps", "x0", "v" or "flow".
        weighting: of the loss (`fastsde.reference.dsm_loss`).
        steps, batch_size: how many steps, below 2^28, on how many samples each.
        lr: Adam's learning rate. It warms up linearly over ``lr_warmup`` steps and then stays, or falls to zero along
            a half cosine at the last step (``lr_schedule`` "constant" or "cosine").
        ema_decay: decay of the average of the weights that is sampled from; 0 keeps none. It starts lower, at
            (1 + step) / (10 + step), so that the first weights are forgotten.
        t_min: training times are uniform on [t_min, 1].
        precision: "fp32" (on a GPU, PyTorch's convolutions take TF32 for it), or "bf16" for the network under autocast.
        compile: whether the network runs through ``torch.compile``.
        seed: in [0, 2^63), of the weights, the data order, the times and the noise.
        init: a checkpoint (a path or the name of a shipped model) whose weights to start from, or "" for fresh ones.
        checkpoint_every, log_every: steps between checkpoints and between log lines. Where that is less than ten
            seconds after a checkpoint, the next is left out, but for that of the last step or of an interrupted one;
            lines are written together every two seconds (`fastsde.run_folder`).
        sde: the process, one of `fastsde.sde.PROCESSES`, whose name a checkpoint holds.

    Raises:
        TypeError, ValueError: for a field of another type, or out of its range.
    """

    data: str
    model: dict[str, Any]
    data_size: int | None = None
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    prediction: str = "eps"
    weighting: str = "sigma2"
    steps: int = 100_000
    batch_size: int = 256
    lr: float = 1e-3
    lr_schedule: str = "cosine"
    lr_warmup: int = 0
    ema_decay: float = 0.999
    t_min: float = 1e-4
    precision: str = "fp32"
    compile: bool = False
    seed: int = 0
    init: str = ""
    checkpoint_every: int = 1000
    log_every: int = 100
    sde: Process = field(default_factory=VPSDE)

    def __post_init__(self) -> None:
        for name, kind in (("data", str), ("model", dict), ("init", str)):
            check_instance(name, getattr(self, name), kind)
        to_dict(self.sde)  # refuses what a checkpoint cannot name
        with torch.device("meta"):  # nothing is allocated, and nothing drawn
            models.from_config(self.model)
        for name, choices in (
            ("prediction", PREDICTIONS),
            ("weighting", WEIGHTINGS),
            ("lr_schedule", LR_SCHEDULES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        check_int("steps", self.steps, 1, 2**28)  # what the noise contract has bits for
        for name, low in (("batch_size", 1), ("checkpoint_every", 1), ("log_every", 1), ("lr_warmup", 0)):
            check_int(name, getattr(self, name), low)
        if self.data_size is not None:
            check_int("data_size", self.data_size, 1)
        check_int("seed", self.seed, 0, 2**63)
        check_range("pixel_range", self.pixel_range)
        check_bool("compile", self.compile)
        check_number("lr", self.lr, "positive and finite", lambda lr: 0 < lr < math.inf)
        check_number("ema_decay", self.ema_decay, "in [0, 1)", lambda decay: 0 <= decay < 1)
        check_number("t_min", self.t_min, "in (0, 1)", lambda t: 0 < t < 1)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.lr_warmup:
            return self.lr * (step + 1) / self.lr_warmup
        if self.lr_schedule == "constant":
            return self.lr
        done = (step - self.lr_warmup) / max(1, self.steps - self.lr_warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def ema_decay_at(self, step: int) -> float:
        """The decay of the moving average in a step."""
        return min(self.ema_decay, (1 + step) / (10 + step))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of ``dataclasses.asdict``, also after a way through JSON. Fields with a default may be left out.

        Raises:
            TypeError, ValueError: for fields that are missing, unknown, of another type or out of their range.
        """
        check_instance("values", values, dict)
        known = {each.name: each.default is MISSING and each.default_factory is MISSING for each in fields(cls)}
        missing = [name for name, required in known.items() if required and name not in values]
        unknown = [name for name in values if name not in known]
        if missing or unknown:
            raise ValueError(f"values must have the fields of a TrainConfig: missing {missing}, unknown {unknown}")
        sde, pixel_range = from_dict(values.get("sde", {})), values.get("pixel_range", cls.pixel_range)
        return cls(**{**values, "sde": sde, "pixel_range": check_range("pixel_range", pixel_range)})


_MLP = {"architecture": "MLP", "shape": [2], "hidden": [64, 64, 64], "activation": "LogSigmoid"}
_UNET = {"architecture": "UNet", "image_channels": 1, "image_size": [28, 28], "channels": [32, 64, 128, 256, 256]}


def default_config(data: str) -> TrainConfig:
    """This package's recipe for a data set, chosen for the quality of the samples.

    Raises:
        ValueError: for an unknown data set.
    """
    if data == "swiss-roll":
        return TrainConfig(data, _MLP, steps=120_000, batch_size=256, lr=1e-3, ema_decay=0.9995)
    if data in ("digits", "mnist"):
        return TrainConfig(
            data,
            _UNET,
            prediction="v",
            weighting="target",
            steps=375_000,
            batch_size=64,
            lr=1e-3,
            lr_warmup=500,
            ema_decay=0.999,
        )
    raise ValueError(f"data must be one of swiss-roll, digits, mnist, got {data!r}")


def tutorial_config(data: str) -> TrainConfig:
    """The tutorial's recipe: its network, its exact objective (score, lambda = sigma^2), Adam at 3e-4, no EMA."""
    config = replace(
        default_config(data),
        prediction="score",
        weighting="sigma2",
        lr=3e-4,
        lr_schedule="constant",
        lr_warmup=0,
        ema_decay=0.0,
        pixel_range=(0.0, 1.0),
    )
    return replace(config, steps=600_000) if data == "swiss-roll" else config


class Trainer:
    """Trains a score network and keeps the run in a folder.

    The folder holds ``checkpoint.safetensors``, which `fastsde.checkpoints.load` and ``fastsde sample`` read and which
    a run resumes from, written whole or not at all, from before the first step on; and ``log.jsonl``, from which a
    resumed run drops the lines of steps that it takes again. A run that ends or is interrupted, by Ctrl-C or an error,
    has all its lines there, one that is killed those up to its checkpoint; the first line of a resumed run is the mean
    of the steps since then. On the CPU a resumed run comes to the very weights of one that was not interrupted.

    On one GPU the steps are captured as CUDA graphs (`fastsde.engines.training.CapturedSteps`); on the CPU those of an
    MLP are taken by a native kernel (`NativeSteps`). In a process group (`fastsde.distributed.process_group`) each rank
    takes its part of every batch, and the first one writes the folder. On a GPU the weights of a network with
    convolutions are in channels_last; those of a checkpoint are contiguous.

    Args:
        config: the run.
        directory: its folder. Nothing is written there before `train`.
        device: where to train.
        dataset: the training data; by default loaded by ``config.data``. Where the model takes images ``[C, H, W]``,
            they may also come as ``[N, H, W, C]``, and those of one channel as ``[N, H, W]``.
        data_root: the folder of MNIST.
        resume: go on from the folder's checkpoint, or start where there is none. Otherwise a folder that has a
            checkpoint is refused, unless it is from before the first step: that run is started again.

    Raises:
        FileExistsError: for a folder with a checkpoint and no ``resume``.
        TypeError: for an argument of another type.
        ValueError: for a checkpoint of another config, or one that is not whole, a device that cannot be used, or data
            of another shape than the model's.
    """

    def __init__(
        self,
        config: TrainConfig,
        directory: str | Path,
        *,
        device: torch.device | str = "cpu",
        dataset: Dataset | None = None,
        data_root: str | Path = DEFAULT_ROOT,
        resume: bool = False,
    ) -> None:
        check_instance("config", config, TrainConfig)
        self.config, self.directory, self.device = config, Path(directory), check_device(device)
        checkpoint = self.directory / RUN_CHECKPOINT
        if not resume and checkpoint.exists() and not run_folder.is_before_first_step(checkpoint):
            raise FileExistsError(
                f"{self.directory} already holds a run: go on with it (resume=True, or --resume), delete it, or choose "
                "another folder"
            )
        self._here = distributed.ranks() or Ranks()
        distributed.shard(config.batch_size, self._here.rank, self._here.world)  # refuses a batch that is too small
        if self._here.world > 1 and self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # where NCCL looks
        dataset = self._load(data_root) if dataset is None else dataset
        check_instance("dataset", dataset, Dataset)
        resuming = resume and checkpoint.exists()
        start = checkpoints.load(config.init) if config.init and not resuming else None
        self.model = _initial_model(config, start).to(self.device)
        if prefers_channels_last(self.model, self.device):
            self.model.to(memory_format=torch.channels_last)  # and with it the average, gradients and Adam's state
        self.earlier_steps = 0 if start is None else _steps_of(start)
        self.dataset = dataset.with_shape(self.model.shape).with_pixel_range(config.pixel_range).to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if config.ema_decay else None
        self._captures = can_capture(self.device, self._here)
        options: dict[str, Any] = {"lr": config.lr, "fused": True, "capturable": self._captures}
        self.optimizer = torch.optim.Adam(self.model.parameters(), **options)
        self.step = 0
        self.loss: float | None = None
        self._lines = RunLog(self.directory)
        if resuming:
            self._restore(*checkpoints.read(checkpoint))

    def _load(self, root: str | Path) -> Dataset:
        """The data set of the config, on each machine by one rank before the others: it may have to be downloaded."""
        config, waits = self.config, self._here.local_rank != 0
        if waits:
            distributed.mean_over_ranks(0)
        dataset = load(config.data, size=config.data_size, root=root, pixel_range=config.pixel_range, seed=config.seed)
        if not waits:
            distributed.mean_over_ranks(0)
        return dataset

    @property
    def sampling_model(self) -> nn.Module:
        """The network to sample from: the moving average, where there is one."""
        model: nn.Module = self.model if self.ema is None else self.ema
        return model

    def checkpoint(self) -> Checkpoint:
        """What the run has come to, to sample from."""
        return Checkpoint(
            model=self.sampling_model,
            sde=self.config.sde,
            prediction=self.config.prediction,
            data=self.config.data,
            value_range=self.dataset.seen_range,
            record={
                "config": asdict(self.config),
                "step": self.step,
                "earlier_steps": self.earlier_steps,
                "loss": self.loss,
                "torch": torch.__version__,
                "device": self.device.type,
            },
        )

    def train(self, progress: bool = True) -> Checkpoint:
        """Runs to ``config.steps`` and returns the result; the folder's checkpoint is then that of the last step.

        Interrupted by Ctrl-C it ends the step, saves a checkpoint, and raises KeyboardInterrupt.

        Raises:
            NonFiniteError: where the loss or the weights become NaN or infinity; the last checkpoint stays.
            RuntimeError: where another process trains, or has trained, in the folder.
        """
        # All have looked at the folder before the first one writes there.
        differs = distributed.mean_over_ranks(self.step) != self.step
        if distributed.any_rank(differs):  # a rank that is at the mean does not see it by itself
            raise RuntimeError(
                f"the ranks are not at the same step: {self.directory} must be one folder for all of them"
            )
        first = self._here.rank == 0
        progress = progress and first
        with run_folder.locked(self.directory) if first else nullcontext(), _deferred_interrupt() as interrupted:
            if first:
                self._begin()
            bar = tqdm(total=self.config.steps, initial=self.step, disable=not progress, unit="step", smoothing=0.1)
            with bar:
                self._run(bar, interrupted)
        distributed.mean_over_ranks(0)  # the first one has written the last checkpoint
        return self.checkpoint()

    def _begin(self) -> None:
        """Makes the folder fit this trainer, once it is locked."""
        path = self.directory / RUN_CHECKPOINT
        step = checkpoints.read(path)[1]["record"]["step"] if path.exists() else None
        if step not in (None, self.step):
            raise RuntimeError(
                f"the run in {self.directory} has come to step {step} since this trainer was made at step "
                f"{self.step}: make it anew with resume=True"
            )
        if not step:
            self._save()  # so that the config is there to resume from, whenever the run is killed
        self._lines.drop_after(self.step)

    def _run(self, bar: tqdm[Any], interrupted: Callable[[], bool]) -> None:
        lines: deque[_Line] = deque()
        try:
            self._take_steps(bar, lines, interrupted)
        except BaseException:
            if self._here.world == 1:  # of several ranks none leaves a line open, and the others might not answer
                with suppress(Exception):  # what went wrong first is what counts
                    self._report(bar, lines)
            raise
        finally:
            self._lines.flush()

    def _take_steps(self, bar: tqdm[Any], lines: deque[_Line], interrupted: Callable[[], bool]) -> None:
        config = self.config
        work = Work(config, self.model, self.ema, self.optimizer, self.dataset, self.device)
        steps = self._steps(work)
        losses: list[Tensor] = []
        since, stop = self.step, False
        self._reported = saved = time.monotonic()
        while self.step < config.steps and not stop:
            for count in steps.chunks(self._steps_to_next_stop()):
                try:
                    losses.append(steps.take(self.step, count))
                except CaptureError as error:
                    warn(f"the steps are taken one by one: {error}")
                    steps = EagerSteps(work, self._here)
                    break
                self.step += count
                self._report(bar, lines, leave=len(lines))
                stop = self._here.world == 1 and interrupted()
                if stop:
                    break
            last = self.step == config.steps
            if (self.step % config.log_every == 0 or last) and losses:
                lines.append(_Line(self.step, self.step - since, Fetch(torch.cat(losses).double().mean())))
                losses, since = [], self.step
                # While the device goes on with the steps of this line, the one before is waited for.
                self._report(bar, lines, leave=int(isinstance(steps, CapturedSteps)))
                # All ranks stop at the same step, or they would wait for each other.
                stop = stop or distributed.any_rank(interrupted())
            if last or stop or self._is_checkpoint_due(saved):
                self._report(bar, lines)
                self._save()
                saved = time.monotonic()
        if stop:
            raise KeyboardInterrupt

    def _is_checkpoint_due(self, saved: float) -> bool:
        """Whether all ranks save at this step, as soon as the clock of one of them says so."""
        if self.step % self.config.checkpoint_every:
            return False
        return distributed.any_rank(time.monotonic() - saved >= run_folder.CHECKPOINT_SECONDS)

    def _steps(self, work: Work) -> Steps:
        """The fastest way to take steps that there is."""
        if self._captures:
            return CapturedSteps(work)
        if can_run_natively(self.config, self.model, self.device, self._here):
            return NativeSteps(work)
        return EagerSteps(work, self._here)

    def _steps_to_next_stop(self) -> int:
        """How many steps there are until something is logged or saved."""
        every = (self.config.log_every, self.config.checkpoint_every)
        return min(self.config.steps - self.step, *(each - self.step % each for each in every))

    @property
    def _way_out(self) -> str:
        return f"try a lower lr, after deleting {self.directory} or in another folder"

    def _report(self, bar: tqdm[Any], lines: deque[_Line], leave: int = 0) -> None:
        """Logs the lines whose losses are there, waiting for those of all but the last ``leave``.

        Lines that come together share their rate.
        """
        due: list[tuple[_Line, float]] = []
        while lines and (len(lines) > leave or lines[0].loss.is_ready()):
            line = lines.popleft()
            due.append((line, distributed.mean_over_ranks(float(line.loss.wait()))))
        if due:
            seconds, self._reported = time.monotonic() - self._reported, time.monotonic()
            rate = sum(line.steps for line, _ in due) / max(seconds, 1e-9)
            for line, loss in due:
                self._log(bar, line, loss, rate)

    def _log(self, bar: tqdm[Any], line: _Line, loss: float, steps_per_second: float) -> None:
        if not math.isfinite(loss):
            raise NonFiniteError(f"the loss became {loss} before step {line.step}: {self._way_out}")
        self.loss = loss
        if self._here.rank != 0:
            return
        lr = self.config.learning_rate(line.step - 1)
        self._lines.append({"step": line.step, "loss": loss, "lr": lr, "steps_per_s": round(steps_per_second, 3)})
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)  # shown by the next update, ten times a second at most
        bar.update(line.step - bar.n)

    def _save(self) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            raise NonFiniteError(f"the weights became NaN or infinity before step {self.step}: {self._way_out}")
        if self._here.rank != 0:
            return
        self._lines.flush()  # a run that is killed and resumed from here must find them
        tensors = {f"model.{name}": value for name, value in self.sampling_model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            tensors.update({f"adam.{kind}.{name}": value for kind, value in state.items()})
            if self.ema is not None:
                tensors[f"weights.{name}"] = parameter
        metadata = self.checkpoint().describe()
        checkpoints.write(self.directory / RUN_CHECKPOINT, tensors, {**metadata, "resumable": True})

    def _restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        path = self.directory / RUN_CHECKPOINT
        saved, record, ours = _config_of(metadata, path), metadata["record"], _json(self.config)
        for name in (each.name for each in fields(TrainConfig)):
            had, has = _json(saved)[name], ours[name]
            # A run with a constant learning rate may be taken further; a cosine depends on where it ends.
            may_grow = name == "steps" and saved.lr_schedule == "constant" and has >= record["step"]
            if had != has and not may_grow and name not in ("checkpoint_every", "log_every"):
                raise ValueError(
                    f"the run in {self.directory} has {name}={had!r}, got {has!r}: resume it as it was, or "
                    f"start another from its weights (init)"
                )
        self.step, self.loss, self.earlier_steps = record["step"], record["loss"], record.get("earlier_steps", 0)
        try:
            self._restore_tensors(tensors)
        except KeyError as error:
            raise ValueError(f"{path} is not a whole training checkpoint: it lacks {error}") from error

    def _restore_tensors(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"weights.{name}" if self.ema is not None else f"model.{name}"])
                if self.step:  # before the first step Adam has no state
                    averages = {
                        kind: torch.empty_like(parameter).copy_(tensors[f"adam.{kind}.{name}"])  # in its layout
                        for kind in ("exp_avg", "exp_avg_sq")
                    }
                    step = tensors[f"adam.step.{name}"].to(self.device)
                    self.optimizer.state[parameter] = {"step": step, **averages}
            if self.ema is not None:
                for name, parameter in self.ema.named_parameters():
                    parameter.copy_(tensors[f"model.{name}"])


def saved_config(checkpoint: str | Path) -> TrainConfig:
    """The config of the run that wrote a checkpoint.

    Raises:
        ValueError: for a checkpoint that no run can resume from.
    """
    return _config_of(checkpoints.read(checkpoint)[1], checkpoint)


def _config_of(metadata: dict[str, Any], path: str | Path) -> TrainConfig:
    if not metadata.get("resumable"):
        raise ValueError(f"{path} has a network, but not what training needs to resume")
    try:
        return TrainConfig.from_dict(metadata["record"]["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was written by another version of fastsde: {error}") from error


def _json(config: TrainConfig) -> dict[str, Any]:
    """A config as it comes back from a checkpoint, where a tuple is a list."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values


def _steps_of(start: Checkpoint) -> int:
    """How many steps a checkpoint has been trained for, as far as its record, which is free-form, tells."""
    steps = (start.record.get(name, 0) for name in ("step", "earlier_steps"))
    return sum(each for each in steps if isinstance(each, int))


def _initial_model(config: TrainConfig, start: Checkpoint | None) -> Any:
    """The network with the weights of ``start``, or those of the seed; torch's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(config.seed)  # of the CPU alone, where the weights are made
        model = models.from_config(config.model)
    if start is not None:
        ours, theirs = ((m.config, p) for m, p in ((model, config.prediction), (start.model, start.prediction)))
        if ours != theirs:
            raise ValueError(f"init must have the model and prediction of the run, {ours}, got {theirs}")
        model.load_state_dict(start.model.state_dict())
    return model


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Makes the first Ctrl-C a request, which the function tells of; a second one interrupts at once.

    Between two statements of a step, weights, optimizer and step count do not belong together.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as by nohup: then it is not to be caught either
    if ignored or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    requested = threading.Event()

    def request(signum: int, frame: Any) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    previous = signal.signal(signal.SIGINT, request)
    try:
        yield requested.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
