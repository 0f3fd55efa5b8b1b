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
from .conditions import Condition, from_dicts, to_dicts
from .factories import Factory, in_words, make
from .files import atomic_path
from .models.mlp import with_time
from .sde import VPSDE, Process, from_dict, to_dict
from .solvers import PREDICTIONS
from .validation import check_device, check_instance, check_ints, check_range

__all__ = ["SHIPPED", "Checkpoint", "load", "read", "save", "write"]

FORMAT = 1
RUN_CHECKPOINT = "checkpoint.safetensors"
SHIPPED = {"swiss-roll": "swiss_roll.safetensors", "mnist": "mnist.safetensors"}
"""The files of the shipped models by name."""
_METADATA_KEY = "fastsde"


@dataclass
class Checkpoint:
    """A network and how to sample from it.

    Args:
        model: called as ``model(x, t, **conditions)``, possibly wrapped in ``torch.compile``, DistributedDataParallel,
            DataParallel or AveragedModel, or in `fastsde.models.Preconditioned`, which is restored on loading. A
            `fastsde.models.MLP` or `fastsde.models.UNet` is saved with its architecture; of any other network the
            weights are saved, and loading them needs the network.
        sde: the process that the network was trained on.
        prediction: "score", "eps", "x0", "v" or "flow".
        data: the name of the data set, or "".
        value_range: the range of the data's values (black and white of an image), or None.
        record: how the network was trained; free-form, for human readers.
        sample_shape: the shape of one sample, of a network without an attribute ``shape``; or None.
        conditions: what else the network is called with, by the names of the arguments.
        factory: the name of the function that makes the network, such as "package.module:make", or "". It is kept for
            the reader of a message only: loading imports nothing that a file names.
        has_null: whether the network has learned "no condition", so that guidance has something to guide away from.
    """

    model: nn.Module
    sde: Process = field(default_factory=VPSDE)
    prediction: str = "score"
    data: str = ""
    value_range: tuple[float, float] | None = None
    record: dict[str, Any] = field(default_factory=dict)
    sample_shape: tuple[int, ...] | None = None
    conditions: dict[str, Condition] = field(default_factory=dict)
    factory: str = ""
    has_null: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample. Raises ValueError if neither the network nor the checkpoint has it."""
        shape = models.shape_of(self.model)
        shape = self.sample_shape if shape is None else shape
        if shape is None:
            raise ValueError("sample_shape must be given with a network that has no attribute shape, got None")
        return tuple(shape)

    @property
    def network(self) -> nn.Module:
        """The model without wrappers and preconditioning."""
        network = models.unwrap(self.model)
        return models.unwrap(network.network) if isinstance(network, models.Preconditioned) else network

    @property
    def architecture(self) -> dict[str, Any] | None:
        """What `fastsde.models.from_config` builds the network from; None for a network of your own."""
        network = self.network
        # A subclass would be loaded as its base class.
        own = type(network) is models.MLP or type(network) is models.UNet
        return network.config if own else None  # type: ignore[return-value]

    @property
    def sigma_data(self) -> float | None:
        """The ``sigma_data`` of EDM's preconditioning, or None for a model without it."""
        model = models.unwrap(self.model)
        return model.sigma_data if isinstance(model, models.Preconditioned) else None

    def describe(self) -> dict[str, Any]:
        """Returns everything except the weights, ready for JSON.

        Raises:
            TypeError: for a process that is not one of this package.
        """
        kind = type(self.network)
        return {
            "model": self.architecture or {"class": f"{kind.__module__}.{kind.__qualname__}", "factory": self.factory},
            "shape": None if self.sample_shape is None else list(self.sample_shape),
            "conditions": to_dicts(self.conditions),
            "has_null": self.has_null,
            "sigma_data": self.sigma_data,
            "sde": to_dict(self.sde),
            "prediction": self.prediction,
            "data": self.data,
            "value_range": self.value_range,
            "record": self.record,
        }


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors and JSON metadata atomically to one safetensors file.

    Args:
        path: the file.
        tensors: by name.
        metadata: what JSON holds.
    """
    contiguous, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.numel() and value.untyped_storage().data_ptr() in seen:  # tied weights: a file has no aliases
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        contiguous[name] = value
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
    """Writes a checkpoint to sample from, atomically.

    Args:
        path: the file, which should end in .safetensors.
        checkpoint: the network and how to sample from it.
        dtype: the floating-point dtype of the weights in the file.

    Raises:
        TypeError: if ``checkpoint`` is not a `Checkpoint`, or ``dtype`` is not floating-point.
        ValueError: if the weights are not those of the network's architecture.
    """
    check_instance("checkpoint", checkpoint, Checkpoint)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    description, weights = checkpoint.describe(), checkpoint.network.state_dict()
    if checkpoint.architecture is not None:
        with torch.device("meta"):
            expected = models.from_config(checkpoint.architecture).state_dict()
        ours, theirs = ({name: tuple(each.shape) for name, each in state.items()} for state in (weights, expected))
        if ours != theirs:
            odd = ", ".join(sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)))
            raise ValueError(
                f"model must have the weights of its architecture {description['model']}, these differ: {odd}"
            )
    tensors = {name: each for name, each in weights.items() if isinstance(each, Tensor)}
    write(path, {f"model.{name}": _as(each, dtype) for name, each in tensors.items()}, description)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a floating-point tensor in a dtype, and any other, such as a counter, as it is."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def load(path: str | Path, device: torch.device | str = "cpu", model: Factory | None = None) -> Checkpoint:
    """Loads a checkpoint from a file or the folder of a training run, or a shipped one by name; weights become fp32.

    The shipped names are "swiss-roll" and "mnist"; to load a file with such a name, write "./mnist".

    Args:
        path: a file, the folder of a run, or the name of a shipped model.
        device: where the network is moved.
        model: for a network of your own: a network that the weights are written to, a function that makes it, or the
            name of such a function, such as "package.module:make".

    Raises:
        FileNotFoundError, ValueError: as for `read`, or for a device that cannot be used; for a network of your own
            without ``model``, or one that the weights do not fit.
    """
    device = check_device(device)
    shipped = SHIPPED.get(str(path))
    if shipped is None:
        path = Path(path)
        path = path / RUN_CHECKPOINT if path.is_dir() else path
        return _parse(path, *read(path), device, model)
    with resources.as_file(resources.files("fastsde") / "assets" / shipped) as asset:
        return _parse(asset, *read(asset), device, model)


def _parse(
    path: str | Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    device: torch.device,
    given: Factory | None,
) -> Checkpoint:
    prefix = "model."
    weights = {name[len(prefix) :]: _as(t, torch.float32) for name, t in tensors.items() if name.startswith(prefix)}
    network = _network(path, metadata, given)
    if given is not None:
        _load_into(network, weights, path, given)
    try:
        for name, kind in (("sde", dict), ("prediction", str), ("data", str), ("record", dict)):
            check_instance(name, metadata[name], kind)
        if given is None:
            network.load_state_dict(weights)
        sde, sigma_data = from_dict(metadata["sde"]), metadata.get("sigma_data")
        model = network if sigma_data is None else models.Preconditioned(network, sde, sigma_data)
        value_range, shape = metadata["value_range"], metadata.get("shape")
        checkpoint = Checkpoint(
            model=model,
            sde=sde,
            prediction=metadata["prediction"],
            data=metadata["data"],
            value_range=None if value_range is None else check_range("value_range", value_range),
            record=metadata["record"],
            sample_shape=None if shape is None else check_ints("shape", shape, 0),
            conditions=from_dicts(metadata.get("conditions", {})),
            factory=metadata["model"].get("factory", ""),
            has_null=bool(metadata.get("has_null", False)),
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a complete fastsde checkpoint: {error!r}") from error
    if checkpoint.prediction not in PREDICTIONS:
        raise ValueError(f"{path} has an unknown prediction {checkpoint.prediction!r}")
    checkpoint.model.to(device)
    return checkpoint


def _load_into(network: nn.Module, weights: dict[str, Tensor], path: str | Path, given: Factory) -> None:
    """Writes weights to a network of the user's, which must have exactly these tensors."""
    own = {name for name, each in network.state_dict().items() if isinstance(each, Tensor)}
    missing, unexpected = sorted(own - weights.keys()), sorted(weights.keys() - own)
    if missing or unexpected:  # before any weight is overwritten
        raise ValueError(
            f"{path} has weights that do not fit the model, {in_words(given)}: "
            f"missing {', '.join(missing) or 'none'}; unexpected {', '.join(unexpected) or 'none'}"
        )
    try:
        network.load_state_dict(weights, strict=False)  # a state may also have other things than tensors
    except RuntimeError as error:
        raise ValueError(f"{path} has weights that do not fit the model, {in_words(given)}: {error}") from error


def _network(path: str | Path, metadata: dict[str, Any], given: Factory | None) -> nn.Module:
    """Returns the network of a checkpoint, whose weights are still to be loaded."""
    described = metadata.get("model")
    if not isinstance(described, dict):
        what = "no 'model'" if described is None else f"model must be a dict, got {type(described).__name__}"
        raise ValueError(f"{path} is not a complete fastsde checkpoint: {what}")
    if "class" in described:
        if given is None:
            name = described.get("factory") or "package.module:make"
            raise ValueError(
                f"{path} holds the weights of a network of your own, {described['class']}: give the function that "
                f"makes it, as --model {name} or model={name!r} in Python"
            )
        return with_time(models.unwrap(make(given))).eval()
    if given is not None:
        raise ValueError(f"model must be None for {path}, which knows its architecture, got {in_words(given)}")
    try:
        with torch.device("cpu"):
            return models.from_config(described)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a complete fastsde checkpoint: {error!r}") from error
