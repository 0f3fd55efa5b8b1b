"""The training loop."""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import checkpoints, distributed
from ..checkpoints import RUN_CHECKPOINT, Checkpoint
from ..data import DEFAULT_ROOT, Dataset, load
from ..data.streamed import StreamedDataset, as_dataset
from ..distributed import Ranks
from ..engines.capture import CaptureError
from ..engines.fetch import Fetch
from ..engines.inspection import prefers_channels_last
from ..extras import require
from ..models import Preconditioned, shape_of, unwrap
from ..models.mlp import with_time
from ..notices import warn
from ..pictures import has_picture
from ..reference import NonFiniteError
from ..validation import check_device, check_instance
from . import run_folder
from .batches import conditions_of
from .captured import CapturedSteps, can_capture
from .config import TrainConfig
from .importance import ImportanceTimes
from .interrupt import deferred_interrupt
from .native_mlp import NativeSteps, can_run_natively
from .run_folder import RunLog
from .state import (
    check_same_data,
    check_same_run,
    check_trainable,
    config_of,
    initial_model,
    restore,
    start_from,
    steps_of,
    tensors_of,
)
from .steps import EagerSteps, Steps, Work
from .watching import EVENTS, Samples, TensorBoard

__all__ = ["Trainer"]


class _Line(NamedTuple):
    """A log line that is written once its loss has arrived from the device."""

    step: int
    steps: int  # the loss is the mean over these
    loss: Fetch


class Trainer:
    """Trains a score network and keeps the run in a folder.

    The folder holds ``checkpoint.safetensors`` and ``log.jsonl``. The checkpoint is read by `fastsde.checkpoints.load`
    and ``fastsde sample``, and a run resumes from it; it is written atomically, from before the first step on. A
    resumed run drops the log lines of steps that it takes again. The log of a run that ends or is interrupted, by
    Ctrl-C or an error, has all its lines, that of a killed run those up to its checkpoint; the first line of a resumed
    run is the mean of the steps since then. On the CPU a resumed run ends with exactly the weights of an uninterrupted
    one.

    On one GPU the steps are captured as CUDA graphs; on the CPU those of a small network are taken by a native kernel,
    and native kernels compute a `fastsde.models.UNet` and its gradients. In a process group
    (`fastsde.distributed.process_group`) each rank takes its part of every batch, and the first one writes the folder.
    On a GPU the weights of a network with convolutions are in channels_last; those of a checkpoint are contiguous.

    Args:
        config: the config of the run.
        directory: the folder of the run. Nothing is written there before `train`.
        model: the network, called as ``model(x, t, **conditions)`` with x ``[B, *shape]`` and t ``[B]``; by default
            made as ``config.model`` says. It is trained in place, in fp32. It gets those conditions of the data that
            its ``forward`` has arguments for. A checkpoint holds its weights, and loading it needs the network again
            (`fastsde.checkpoints.load`). It stays in its training or evaluation mode; its moving average is in
            evaluation mode. Of a network in ``torch.compile`` or DataParallel the network inside is trained
            (``config.compile`` and a process group do the same). With ``condition_dropout`` it must also take the
            values of "no condition" (`fastsde.data.Condition`), by default one more label.
        device: where to train.
        dataset: the training data; by default loaded by ``config.data``. A `fastsde.data.Dataset`, or any map-style
            data set, such as a ``torch.utils.data.Dataset``, whose items are loaded step by step
            (`fastsde.data.StreamedDataset`). For a model of images ``[C, H, W]``, it may also be stored as
            ``[N, H, W, C]``, and images of one channel as ``[N, H, W]``.
        data_root: the folder that holds MNIST.
        tensorboard: whether to log to TensorBoard as well, in the run's folder.
        resume: go on from the folder's checkpoint, or start if there is none. Otherwise a folder that has a checkpoint
            is refused, unless that is from before the first step: then the run starts again.

    Attributes:
        model: the network that is trained.
        ema: the moving average of its weights, or None.
        optimizer: Adam or AdamW.
        dataset: the training data.
        conditions: what the network is called with besides x and t, by name.
        step: the number of steps taken.
        loss: that of the last log line, or None before the first.
        earlier_steps: of the run that ``config.init`` is from.

    Raises:
        FileExistsError: for a folder with a checkpoint and no ``resume``.
        ImportError: if what ``tensorboard`` or ``config.sample_every`` asks for is not installed.
        TypeError: for an argument of the wrong type.
        ValueError: for a checkpoint of another config, or an incomplete one, a device that cannot be used, or data
            whose shape is not the model's.
    """

    def __init__(
        self,
        config: TrainConfig,
        directory: str | Path,
        *,
        model: nn.Module | None = None,
        device: torch.device | str = "cpu",
        dataset: Dataset | StreamedDataset | Any = None,
        data_root: str | Path = DEFAULT_ROOT,
        tensorboard: bool = False,
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
            torch.cuda.set_device(self.device)  # NCCL uses the current device
        dataset = self._load(data_root) if dataset is None else as_dataset(dataset, config.data)
        resuming = resume and checkpoint.exists()
        if model is not None:
            check_instance("model", model, nn.Module)
        self.model = with_time(unwrap(initial_model(config) if model is None else model))
        start = start_from(self.model, config) if config.init and not resuming else None
        self.model.to(self.device)
        check_trainable(self.model)
        if prefers_channels_last(self.model, self.device):
            self.model.to(memory_format=torch.channels_last)  # and so the average, gradients and Adam's state
        self.earlier_steps = 0 if start is None else steps_of(start)
        shape = shape_of(self.model)
        dataset = dataset if shape is None else dataset.with_shape(shape)
        self.dataset = dataset.with_pixel_range(config.pixel_range).to(self.device)
        self.conditions = conditions_of(self.model, self.dataset)
        if config.flip and len(self.dataset.shape) != 3:
            raise ValueError(f"flip must be False for samples of shape {list(self.dataset.shape)}: they are no images")
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval() if config.ema_decay else None
        is_important = config.times == "importance"
        self.importance = ImportanceTimes(config.objective, self.device) if is_important else None
        self._captures = can_capture(self.device, self._here)
        options: dict[str, Any] = {"lr": config.lr, "fused": True, "capturable": self._captures}
        kind = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
        trained = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = kind(trained, weight_decay=config.weight_decay, **options)
        self.step = 0
        self.loss: float | None = None
        self._lines = RunLog(self.directory)
        self._tensorboard: TensorBoard | None = None
        tensorboard = tensorboard or (resuming and (self.directory / EVENTS).exists())
        self._logs_events = tensorboard and self._here.rank == 0
        if self._logs_events:
            require("tensorboard", extra="tensorboard", what="logs for TensorBoard")
        self._samples: Samples | None = None
        if config.sample_every:
            if not has_picture(self.dataset.shape):
                raise ValueError(f"sample_every must be 0: samples of shape {list(self.dataset.shape)} have no picture")
            self._samples = Samples(self.directory, self.dataset, config.seed)
        if resuming:
            self._restore(*checkpoints.read(checkpoint))

    def _load(self, root: str | Path) -> Dataset | StreamedDataset:
        """Loads the config's data set, on each machine first on one rank, which may have to download it."""
        config, waits = self.config, self._here.local_rank != 0
        if waits:
            distributed.mean_over_ranks(0)
        options: dict[str, Any] = {"size": config.data_size, "pixel_range": config.pixel_range, "seed": config.seed}
        dataset = load(config.data, root=root, image_size=config.image_size, **options)
        if not waits:
            distributed.mean_over_ranks(0)
        return dataset

    @property
    def sampling_model(self) -> nn.Module:
        """The network to sample from: the moving average, if there is one."""
        model: nn.Module = self.model if self.ema is None else self.ema
        return model

    def checkpoint(self) -> Checkpoint:
        """Returns the current network to sample from; with EDM's preconditioning, it predicts x_0."""
        model = self.sampling_model
        if self.config.preconditioning == "edm":
            model = Preconditioned(model, self.config.sde, self.config.sigma_data)
        return Checkpoint(
            model=model,
            sde=self.config.sde,
            prediction=self.config.prediction,
            data=self.config.data,
            value_range=self.dataset.seen_range,
            sample_shape=self.dataset.shape,
            conditions=self.conditions,
            factory=self.config.model if isinstance(self.config.model, str) else "",
            has_null=bool(self.conditions) and self.config.condition_dropout > 0,
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
        """Trains up to ``config.steps`` and returns the result, which the folder's checkpoint then also holds.

        On Ctrl-C it finishes the step, saves a checkpoint, and raises KeyboardInterrupt.

        Args:
            progress: show a progress bar on stderr.

        Raises:
            NonFiniteError: if the loss or the weights become NaN or infinite; the last checkpoint is kept.
            RuntimeError: if another process trains, or has trained, in the folder.
        """
        # All ranks have read the folder before the first one writes there.
        differs = distributed.mean_over_ranks(self.step) != self.step
        if distributed.any_rank(differs):  # a rank that is at the mean does not notice by itself
            raise RuntimeError(
                f"the ranks are not at the same step: {self.directory} must be one folder for all of them"
            )
        first = self._here.rank == 0
        progress = progress and first
        with run_folder.locked(self.directory) if first else nullcontext(), deferred_interrupt() as interrupted:
            if first:
                self._begin()
            # A first step that compiles takes long: the estimate of the time left forgets it within seconds.
            bar = tqdm(total=self.config.steps, initial=self.step, disable=not progress, unit="step", smoothing=0.3)
            with bar:
                self._run(bar, interrupted)
        distributed.mean_over_ranks(0)  # until the first rank has written the last checkpoint
        return self.checkpoint()

    def _begin(self) -> None:
        """Prepares the locked folder for this trainer."""
        path = self.directory / RUN_CHECKPOINT
        step = checkpoints.read(path)[1]["record"]["step"] if path.exists() else None
        if step not in (None, self.step):
            raise RuntimeError(
                f"the run in {self.directory} has come to step {step} since this trainer was made at step "
                f"{self.step}: make a new one with resume=True"
            )
        if not step:
            self._save()  # so that a run killed at any time has a config to resume from
        self._lines.drop_after(self.step)
        if self._logs_events:
            self._tensorboard = TensorBoard(self.directory, self.step)

    def _run(self, bar: tqdm[Any], interrupted: Callable[[], bool]) -> None:
        lines: deque[_Line] = deque()
        try:
            self._take_steps(bar, lines, interrupted)
        except BaseException:
            if self._here.world == 1:  # several ranks leave no line open, and the others may not answer
                with suppress(Exception):  # the first error is the one to report
                    self._report(bar, lines)
            raise
        finally:
            self._lines.flush()
            if self._tensorboard is not None:
                self._tensorboard.close()

    def _take_steps(self, bar: tqdm[Any], lines: deque[_Line], interrupted: Callable[[], bool]) -> None:
        config = self.config
        work = self.work()
        steps = self._steps(work)
        losses: list[Tensor] = []
        since, saved_step, stop = self.step, self.step, False
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
                bar.update(count)
                self._report(bar, lines, leave=len(lines))
                stop = self._here.world == 1 and interrupted()
                if stop:
                    break
            last = self.step == config.steps
            if (self.step % config.log_every == 0 or last) and losses:
                lines.append(_Line(self.step, self.step - since, Fetch(torch.cat(losses).double().mean())))
                losses, since = [], self.step
                # Wait for the line before while the device works on the steps of this one.
                self._report(bar, lines, leave=int(isinstance(steps, CapturedSteps)))
                # All ranks must stop at the same step, or they would wait for each other forever.
                stop = stop or distributed.any_rank(interrupted())
            if last or stop or self._is_checkpoint_due(saved, saved_step):
                self._report(bar, lines)
                self._save()
                saved, saved_step = time.monotonic(), self.step
            if config.sample_every and (self.step % config.sample_every == 0 or last) and not stop:
                self._draw()
        if stop:
            raise KeyboardInterrupt

    def work(self) -> Work:
        """Returns what is trained, as the ways to take steps are given it."""
        return Work(
            self.config,
            self.model,
            self.ema,
            self.optimizer,
            self.dataset,
            self.device,
            self.conditions,
            self.importance,
        )

    def _is_checkpoint_due(self, saved: float, saved_step: int) -> bool:
        """Returns whether all ranks save at this step: if it is time by the clock of any of them."""
        every = self.config.checkpoint_every
        if self.step // every == saved_step // every:
            return False
        return distributed.any_rank(time.monotonic() - saved >= run_folder.CHECKPOINT_SECONDS)

    def _steps(self, work: Work) -> Steps:
        """Returns the fastest available way to take steps."""
        if self._captures:
            return CapturedSteps(work)
        if can_run_natively(work, self._here):
            return NativeSteps(work)
        return EagerSteps(work, self._here)

    def _steps_to_next_stop(self) -> int:
        """Returns the number of steps until something is logged or saved."""
        every = [self.config.log_every, self.config.checkpoint_every, self.config.sample_every or self.config.steps]
        return min(self.config.steps - self.step, *(each - self.step % each for each in every))

    @property
    def _way_out(self) -> str:
        return f"try a lower lr, after deleting {self.directory} or in another folder"

    def _report(self, bar: tqdm[Any], lines: deque[_Line], leave: int = 0) -> None:
        """Logs the lines whose losses have arrived, after waiting for all but the last ``leave`` lines.

        Lines that are logged together share their rate.
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
        values = {
            "step": line.step,
            "loss": loss,
            "lr": self.config.learning_rate(line.step - 1),
            "steps_per_s": round(steps_per_second, 3),
            "left_s": round((self.config.steps - line.step) / steps_per_second, 1),
        }
        self._lines.append(values)
        if self._tensorboard is not None:
            self._tensorboard.line(values)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)  # shown by the next update, ten times a second at most

    def _draw(self) -> None:
        """Draws samples on the first rank."""
        if self._here.rank != 0 or self._samples is None:
            return
        picture = self._samples.draw(self.checkpoint(), self.step)
        if self._tensorboard is not None and picture is not None:
            self._tensorboard.picture(picture, self.step)

    def _save(self) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            raise NonFiniteError(f"the weights became NaN or infinity before step {self.step}: {self._way_out}")
        if self._here.rank != 0:
            return
        self._lines.flush()  # a run that is killed and resumed from here must find them
        tensors = tensors_of(self.model, self.ema, self.optimizer, self.importance)
        metadata = self.checkpoint().describe()
        checkpoints.write(self.directory / RUN_CHECKPOINT, tensors, {**metadata, "resumable": True})

    def _restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        path, record = self.directory / RUN_CHECKPOINT, metadata["record"]
        check_same_run(self.config, config_of(metadata, path), record["step"], self.directory)
        check_same_data(self.conditions, self.dataset.shape, metadata, path)
        self.step, self.loss, self.earlier_steps = record["step"], record["loss"], record.get("earlier_steps", 0)
        try:
            restore(tensors, self.model, self.ema, self.optimizer, self.importance)
        except KeyError as error:
            raise ValueError(
                f"{path} is not a complete training checkpoint, or of another network than this one: it lacks {error}"
            ) from error
