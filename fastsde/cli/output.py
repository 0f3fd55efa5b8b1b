"""The output files of the commands: arrays and animations; `fastsde.pictures` draws the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import pictures, plotting, solvers
from ..checkpoints import Checkpoint
from ..conditions import null_values
from ..files import atomic_path


def save_arrays(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """Writes arrays by name as .npz or .safetensors."""
    arrays = {name: each.cpu().contiguous() for name, each in arrays.items()}
    with atomic_path(path) as temporary:
        if path.suffix.lower() == ".npz":
            with temporary.open("wb") as file:  # given a name, NumPy would append its own suffix
                given: dict[str, Any] = {name: each.numpy() for name, each in arrays.items()}
                np.savez_compressed(file, **given)
        else:
            save_file(arrays, temporary)


def animation(checkpoint: Checkpoint, states: Tensor, times: Sequence[float], path: Path) -> None:
    """Draws states ``[frames, n, *shape]`` on their way from noise to data, points with the unconditional score."""

    def score(x: Tensor, t: float) -> Tensor:
        # Near t = 0 the score grows without bound, so the last frames show the field at t_min.
        t = max(t, checkpoint.sde.t_min)
        r, s = solvers.score_form(
            checkpoint.sde, torch.tensor([t], dtype=torch.float64, device="cpu"), checkpoint.prediction
        )
        given = null_values(checkpoint.conditions, len(x), x.device)
        with torch.no_grad():
            f: Tensor = checkpoint.model(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device), **given)
        return float(r) * x + float(s) * f

    if checkpoint.shape == (2,):
        knows = not checkpoint.conditions or checkpoint.has_null  # the score without conditions
        frames = plotting.animate_points(states.float(), times, score if knows else None)
    else:
        frames = plotting.animate_images(
            states, checkpoint.value_range or (-1.0, 1.0), pictures.columns(states.shape[1])
        )
    plotting.save_gif(frames, path)
