"""Networks that another engine runs: exported once, and then called in the loop of lean eager PyTorch.

Those engines run networks, not samplers, so that the loop around the network stays the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fastsde.checkpoints import Checkpoint

from ..suite.case import Provider, UnavailableError
from ..suite.measure import Run
from ..tasks.trajectory import Proof, Trajectory
from . import lean, onnxruntime, openvino, sampling

Engine = Callable[[nn.Module, tuple[Tensor, Tensor], str], Callable[[np.ndarray, np.ndarray], np.ndarray]]


class Bound(nn.Module):
    """A network with its conditions, in fp32 and called with x and t."""

    def __init__(self, model: nn.Module, conditions: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(conditions)
        for name, value in conditions.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        f: Tensor = self.model(x, t, **{name: getattr(self, name) for name in self.names})
        return f


class Exported(nn.Module):
    """A network that an engine runs, in batches of one size."""

    def __init__(self, call: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.from_numpy(self.call(x.contiguous().numpy(), t.contiguous().numpy()))


def run(task: Trajectory, engine: Engine, precision: str) -> Run:
    """Returns the loop of lean eager PyTorch, whose network an engine runs in a precision."""
    if task.device.type != "cpu":
        raise UnavailableError("it takes part on a CPU only, not on a GPU")
    here = task.checkpoint
    example = torch.randn(task.shape), torch.full((task.n,), 0.5)
    network = Bound(here.model, task.model_kwargs).eval()
    exported = Checkpoint(Exported(engine(network, example, precision)), here.sde, here.prediction)
    inside = replace(
        task, load=lambda: exported, conditions=None
    )  # whatever the engine computes in, its tensors are fp32
    return lean.sampling(inside, "fp32")


def others(task: Trajectory, proof: Proof) -> list[Provider]:
    """Returns the providers of all engines. ONNX Runtime has no bf16 on a CPU."""
    default = sampling.precisions(task)[0]
    found = [("OpenVINO", openvino.engine, each) for each in sampling.precisions(task)]
    return [
        Provider(
            f"{name}, {precision}",
            partial(run, task, engine, precision),
            partial(proof.given_noise, precision),
            precision,
            compiles=True,
        )
        for name, engine, precision in (*found, ("ONNX Runtime", onnxruntime.engine, default))
    ]
