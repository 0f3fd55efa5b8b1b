"""What a run shows while it trains, besides its log: pictures of samples, and TensorBoard."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import pictures, plotting
from ..checkpoints import Checkpoint
from ..data.dataset import Dataset
from ..data.streamed import StreamedDataset
from ..notices import warn
from ..reference import NonFiniteError
from ..sampler import Sampler

__all__ = ["EVENTS", "SAMPLES", "Samples", "TensorBoard"]

SAMPLES, EVENTS = "samples", "tensorboard"  # folders in that of the run
_POINTS, _IMAGES = 1000, 20
# For every process and prediction; the last of an odd number of calls is a single one, as t = 0 requires for some.
_SOLVER = {"solver": "heun", "steps": 39}


class Samples:
    """Draws samples of the network to sample from, as ``samples/step-NNNNNNN.png`` in the run's folder.

    They have the seed of the run, so that the same samples are seen to become better; labels take turns.

    Args:
        directory: the folder of the run.
        dataset: what vectors as conditions are taken from.
        seed: of the noise.

    Raises:
        ImportError: if what draws the pictures is not installed.
    """

    def __init__(self, directory: Path, dataset: Dataset | StreamedDataset, seed: int) -> None:
        pictures.check_installed(dataset.shape)
        self._directory, self._dataset, self._seed = directory, dataset, seed

    def draw(self, checkpoint: Checkpoint, step: int) -> Any:
        """Writes the picture of a step and returns it; None if the network is not finite yet."""
        n = _POINTS if len(checkpoint.shape) == 1 else _IMAGES
        model = copy.deepcopy(checkpoint.model).eval()  # hooks and compiled code of the one in training stay its own
        known = Checkpoint(**{**vars(checkpoint), "model": model})
        device = next(model.parameters()).device
        conditions = {name: self._values(name, checkpoint, n, device) for name in checkpoint.conditions}
        try:
            sampler = Sampler(known, device=device, **_SOLVER)  # type: ignore[arg-type]
            x = sampler(n, seed=self._seed, model_kwargs=conditions or None)
        except NonFiniteError as error:
            warn(f"there is no picture of step {step}: {error}")
            return None
        picture = pictures.draw(known, x)
        path = self._directory / SAMPLES / f"step-{step:07}.png"
        plotting.save_image(picture, path)
        return picture

    def _values(self, name: str, checkpoint: Checkpoint, n: int, device: torch.device) -> Tensor:
        condition = checkpoint.conditions[name]
        if condition.classes:
            return torch.arange(n, device=device) % condition.classes
        if isinstance(self._dataset, Dataset):
            values = self._dataset.conditions[name]
            return values[torch.arange(n, device=values.device) % len(values)].to(device)
        return condition.nulls(n, device)


class TensorBoard:
    """Writes the log's numbers and the pictures to ``tensorboard/`` in the run's folder.

    Args:
        directory: the folder of the run.
        step: the step that the run goes on from; what was written of later ones is dropped.

    """

    def __init__(self, directory: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory / EVENTS), purge_step=step + 1)

    def line(self, values: dict[str, Any]) -> None:
        """Writes a line of the log."""
        for name, value in values.items():
            if name != "step":
                self._writer.add_scalar(name, value, values["step"])

    def picture(self, picture: Any, step: int) -> None:
        """Writes a picture of samples."""
        self._writer.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()
