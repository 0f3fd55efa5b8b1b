"""Checkpoints: safetensors files that hold a network and all that sampling from it needs.

The tensors are named ``model.*`` (what to sample from: the EMA where there is one). The header's metadata has one
entry, ``fastsde``: JSON with the format version, the architecture, the SDE, the prediction kind, the training record
and whatever a `fastsde.training.Trainer` needs to resume.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import models
from .files import atomic_path
from .sde import VPSDE
from .solvers import PREDICTIONS
from .validation import check_device, check_instance, check_range

__all__ = ["SHIPPED", "Checkpoint", "load", "read", "save", "write"]

FORMAT = 1
RUN_CHECKPOINT = "checkpoint.safetensors"
SHIPPED = {"swiss-roll": "swiss_roll.safetensors", "mnist": "mnist.safetensors"}
_METADATA_KEY = "fastsde"


@dataclass
class Checkpoint:
    """A network and how to sample from it.

    Args:
        model: called as ``model(x, t)``; built by this package (it has a ``config`` and a ``shape``).
        sde: the SDE that it was trained on.
        prediction: "score", "eps", "x0" or "v".
        data: the name of the data set, or "".
        value_range: the range of the data's values (black and white of an image), or None.
        record: how the network was trained: free-form, for people.
    """

    model: nn.Module
    sde: VPSDE = field(default_factory=VPSDE)
    prediction: str = "score"
    data: str = ""
    value_range: tuple[float, float] | None = None
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.model.shape)  # type: ignore[arg-type]

    def describe(self) -> dict[str, Any]:
        """All but the weights, as JSON takes it."""
        return {
            "model": self.model.config,
            "sde": asdict(self.sde),
            "prediction": self.prediction,
            "data": self.data,
            "value_range": self.value_range,
            "record": self.record,
        }


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors and JSON metadata as one safetensors file, whole or not at all."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, {_METADATA_KEY: json.dumps({"format": FORMAT, **metadata})})


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata that `write` wrote.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a file that is not a fastsde checkpoint, is damaged, or is of a later format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path} (shipped models: {', '.join(SHIPPED)})")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} is a safetensors file, but not a checkpoint of fastsde")
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has checkpoint format {metadata.get('format')}, this version reads format {FORMAT}")
    return tensors, metadata


def save(path: str | Path, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
    """Writes a checkpoint to sample from, with its weights in ``dtype``."""
    weights = {f"model.{name}": tensor.to(dtype) for name, tensor in checkpoint.model.state_dict().items()}
    write(path, weights, checkpoint.describe())


def load(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """A checkpoint from a file or the folder of a training run, or a shipped one by name; weights become fp32.

    The names are "swiss-roll" and "mnist"; a file of such a name is reached as "./mnist".

    Raises:
        FileNotFoundError, ValueError: as `read` does, or for a device that cannot be used.
    """
    device = check_device(device)
    shipped = SHIPPED.get(str(path))
    if shipped is None:
        path = Path(path)
        path = path / RUN_CHECKPOINT if path.is_dir() else path
        return _parse(path, *read(path), device)
    with resources.as_file(resources.files("fastsde") / "assets" / shipped) as asset:
        return _parse(asset, *read(asset), device)


def _parse(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, Any], device: torch.device) -> Checkpoint:
    prefix = "model."
    weights = {name[len(prefix) :]: t.float() for name, t in tensors.items() if name.startswith(prefix)}
    try:
        for name, kind in (("model", dict), ("sde", dict), ("prediction", str), ("data", str), ("record", dict)):
            check_instance(name, metadata[name], kind)
        with torch.device("cpu"):
            model = models.from_config(metadata["model"])
        model.load_state_dict(weights)
        value_range = metadata["value_range"]
        checkpoint = Checkpoint(
            model=model,
            sde=VPSDE(**metadata["sde"]),
            prediction=metadata["prediction"],
            data=metadata["data"],
            value_range=None if value_range is None else check_range("value_range", value_range),
            record=metadata["record"],
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint of fastsde: {error!r}") from error
    if checkpoint.prediction not in PREDICTIONS:
        raise ValueError(f"{path} has an unknown prediction {checkpoint.prediction!r}")
    checkpoint.model.to(device)
    return checkpoint
