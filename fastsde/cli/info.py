"""``fastsde info``."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import click

from .. import __version__
from ..openmp import wait_policy
from .common import load_checkpoint, reports_errors, takes_factory


def version(package: str) -> str:
    """Returns the version of a package, or words if it has none."""
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a build with another name, such as pytorch-triton
        return "installed, version unknown"


@click.command()
@click.argument("model", required=False)
@takes_factory
@reports_errors
def info(model: str | None, factory: str | None) -> None:
    """Show versions, devices, models and backends, or describe MODEL: a shipped model, a checkpoint or a training run.

    For a backend that cannot run here, the reason is shown.
    """
    rows = [*_versions(), *_devices(), *_models()] if model is None else list(_checkpoint(model, factory))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


def _checkpoint(name: str, factory: str | None) -> Iterator[tuple[str, str]]:
    checkpoint = load_checkpoint(name, factory=factory)
    config = checkpoint.architecture
    if config is None:
        kind = type(checkpoint.network)
        yield "model", f"{kind.__module__}.{kind.__qualname__}"
    else:
        options = ", ".join(f"{key} {value}" for key, value in config.items() if key not in ("architecture", "shape"))
        yield "model", f"{config['architecture']}, {options}"
    yield "parameters", f"{sum(parameter.numel() for parameter in checkpoint.network.parameters()):,}"
    yield "sample shape", str(list(checkpoint.shape))
    yield "sde", repr(checkpoint.sde)
    yield "prediction", checkpoint.prediction
    for name, condition in checkpoint.conditions.items():
        words = f"one of {condition.classes} classes" if condition.classes else f"shape {list(condition.shape)}"
        yield f"condition {name}", f"{words}{', or none' if checkpoint.has_null else ''}"
    if checkpoint.sigma_data is not None:
        yield "preconditioning", f"edm, sigma_data {checkpoint.sigma_data:g}"
    if checkpoint.data:
        yield "data", checkpoint.data
    if checkpoint.value_range is not None:
        yield "value range", "{} to {}".format(*checkpoint.value_range)
    yield from _trajectory(checkpoint.model, checkpoint.shape)
    record = checkpoint.record
    if "step" in record and record.get("loss") is not None:
        yield "trained", _progress(record)


def _trajectory(model: Any, shape: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Yields whether the whole trajectory of a network runs in one launch: on the CPU, and on a GPU if there is one."""
    import torch

    from ..engines import Network, persistent
    from ..plan import unavailable_reason

    for device in map(torch.device, ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]):
        reason = unavailable_reason("persistent", device)
        reason = reason or persistent.unavailable_reason(Network(model.to(device)), shape, device)
        yield f"one launch on {device}", "yes" if reason is None else f"no: {reason}"


def _progress(record: Mapping[str, Any]) -> str:
    return f"{record['step'] + record.get('earlier_steps', 0):,} steps, loss {record['loss']:.4f}"


def _versions() -> Iterator[tuple[str, str]]:
    import torch

    yield from (("fastsde", __version__), ("python", platform.python_version()), ("torch", torch.__version__))
    for package in ("triton", "torchvision", "safetensors", "diffusers", "torchsde"):
        yield package, version(package)


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    from .. import ops
    from ..ops import dispatch
    from ..plan import unavailable_reason
    from ..vocabulary import BACKENDS

    capability = torch.backends.cpu.get_cpu_capability()
    yield "cpu", f"{platform.machine()}, {torch.get_num_threads()} threads, {capability}"
    yield "threads wait", wait_policy()
    yield "native kernels", ops.native_state()
    devices = [torch.device("cpu")]
    if not torch.cuda.is_available():
        yield "cuda", f"not available (torch is built for {torch.version.cuda or 'the CPU only'})"
    for index in range(torch.cuda.device_count()):
        devices.append(torch.device("cuda", index))
        capable = torch.cuda.get_device_capability(index)
        yield f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, capability {capable}"
    for device in devices:
        for backend in BACKENDS[1:]:
            reason = unavailable_reason(backend, device)
            if reason is None and device.type == "cpu" and backend != "reference" and ops.has_triton(device):
                reason = dispatch.interpreter_problem()
            yield f"{backend} on {device}", "yes" if reason is None else f"no: {reason}"


def _models() -> Iterator[tuple[str, str]]:
    from .. import checkpoints

    for name in checkpoints.SHIPPED:
        yield f"model {name}", _progress(checkpoints.load(name).record)
