"""Checkpoints: safetensors files that hold a network and everything needed to sample from it.

The tensors are named ``model.*`` (the weights to sample from: the EMA weights if there are any). The header's metadata
has one entry, ``fastsde``: JSON with the format version, the architecture, the process by name, the prediction kind,
the training record and whatever a `fastsde.training.Trainer` needs to resume.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import models
from .files import atomic_path
from .sde import VPSDE, Process, from_dict, to_dict
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
        model: called as ``model(x, t)``. To be saved, it must be a `fastsde.models.MLP` or `UNet`, possibly wrapped in
            ``torch.compile``, DistributedDataParallel, DataParallel or AveragedModel, or in
            `fastsde.models.Preconditioned`, which is restored on loading.
        sde: the process that the network was trained on.
        prediction: "score", "eps", "x0", "v" or "flow".
        data: the name of the data set, or "".
        value_range: the range of the data's values (black and white of an image), or None.
        record: how the network was trained; free-form, for human readers.
    """

    model: nn.Module
    sde: Process = field(default_factory=VPSDE)
    prediction: str = "score"
    data: str = ""
    value_range: tuple[float, float] | None = None
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample. Raises TypeError for a network without a ``shape``."""
        shape: Any = getattr(models.unwrap(self.model), "shape", None)
        if shape is None:
            raise _not_ours(self.model)
        return tuple(shape)

    @property
    def network(self) -> models.MLP | models.UNet:
        """The model without wrappers and preconditioning. Raises TypeError if it is not one of this package."""
        network = models.unwrap(self.model)
        if isinstance(network, models.Preconditioned):
            network = models.unwrap(network.network)
        if type(network) is models.MLP or type(network) is models.UNet:  # a subclass would be loaded as its base class
            return network
        raise _not_ours(self.model)

    @property
    def sigma_data(self) -> float | None:
        """The ``sigma_data`` of EDM's preconditioning, or None for a model without it."""
        model = models.unwrap(self.model)
        return model.sigma_data if isinstance(model, models.Preconditioned) else None

    def describe(self) -> dict[str, Any]:
        """Returns everything except the weights, ready for JSON.

        Raises:
            TypeError: for a network or a process that is not one of this package.
        """
        return {
            "model": self.network.config,
            "sigma_data": self.sigma_data,
            "sde": to_dict(self.sde),
            "prediction": self.prediction,
            "data": self.data,
            "value_range": self.value_range,
            "record": self.record,
        }


def _not_ours(model: object) -> TypeError:
    return TypeError(
        f"model must be a fastsde.models.MLP or UNet, got {type(model).__name__}: a checkpoint holds weights and the "
        f"name of their architecture. Save the weights of any other network with torch.save or safetensors, and pass "
        f"the network itself to fastsde.sample"
    )


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors and JSON metadata atomically to one safetensors file."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, {_METADATA_KEY: json.dumps({"format": FORMAT, **metadata})})


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and metadata that `write` wrote.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: for a file that is not a fastsde checkpoint, is damaged, or has a later format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path} (shipped models: {', '.join(SHIPPED)})")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, json.JSONDecodeError) as error:
        if _is_pickled(path):
            raise ValueError(
                f"{path} was written by torch.save, and is not read because a pickle can run any code: "
                f"{_load_yourself('torch.load')}"
            ) from None
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(
            f"{path} is a safetensors file, but not a fastsde checkpoint, as it does not name its architecture: "
            f"{_load_yourself('safetensors.torch.load_file')}"
        )
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has checkpoint format {metadata.get('format')}, this version reads format {FORMAT}")
    return tensors, metadata


def _is_pickled(path: Path) -> bool:
    """Returns whether ``torch.save`` wrote the file: a zip file that holds a pickle or, in the old format, a pickle."""
    with suppress(zipfile.BadZipFile):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith("data.pkl") for name in archive.namelist())
    with path.open("rb") as file:
        return file.read(2) == b"\x80\x02"


def _load_yourself(function: str) -> str:
    return (
        f"load its weights into the network with {function}, and pass the network to fastsde.sample, or to "
        f"fastsde.checkpoints.save if it is a fastsde.models.MLP or UNet"
    )


def save(path: str | Path, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
    """Writes a checkpoint to sample from, with its weights in the floating-point ``dtype``.

    Raises:
        TypeError: if ``checkpoint`` is not a `Checkpoint`, its network is not one of this package, or ``dtype`` is not
            floating-point.
        ValueError: if the weights are not those of the network's architecture.
    """
    check_instance("checkpoint", checkpoint, Checkpoint)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    description, weights = checkpoint.describe(), checkpoint.network.state_dict()
    with torch.device("meta"):
        expected = models.from_config(description["model"]).state_dict()
    ours, theirs = ({name: tuple(each.shape) for name, each in state.items()} for state in (weights, expected))
    if ours != theirs:
        odd = ", ".join(sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)))
        raise ValueError(f"model must have the weights of its architecture {description['model']}, these differ: {odd}")
    write(path, {f"model.{name}": tensor.to(dtype) for name, tensor in weights.items()}, description)


def load(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Loads a checkpoint from a file or the folder of a training run, or a shipped one by name; weights become fp32.

    The shipped names are "swiss-roll" and "mnist"; to load a file with such a name, write "./mnist".

    Raises:
        FileNotFoundError, ValueError: as for `read`, or for a device that cannot be used.
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
        sde, sigma_data = from_dict(metadata["sde"]), metadata.get("sigma_data")
        if sigma_data is not None:
            model = models.Preconditioned(model, sde, sigma_data)
        value_range = metadata["value_range"]
        checkpoint = Checkpoint(
            model=model,
            sde=sde,
            prediction=metadata["prediction"],
            data=metadata["data"],
            value_range=None if value_range is None else check_range("value_range", value_range),
            record=metadata["record"],
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a complete fastsde checkpoint: {error!r}") from error
    if checkpoint.prediction not in PREDICTIONS:
        raise ValueError(f"{path} has an unknown prediction {checkpoint.prediction!r}")
    checkpoint.model.to(device)
    return checkpoint
