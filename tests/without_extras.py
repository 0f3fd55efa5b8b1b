"""Does what the core does, and prints what every other feature says, as JSON: a script that test_extras.py runs.

Its arguments are the modules that cannot be imported, as JSON, and an empty folder.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pkgutil
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def use_core(folder: Path) -> None:
    """Imports every module but the commands, samples, trains and verifies."""
    import numpy as np
    import torch

    import fastsde
    from fastsde.training import TrainConfig, Trainer

    for module in pkgutil.walk_packages(fastsde.__path__[:1], "fastsde."):
        if not module.name.startswith("fastsde.cli"):
            import_module(module.name)
    x = fastsde.sample("mnist", (2, 1, 28, 28), steps=2, solver="ddim")
    assert torch.isfinite(x).all()
    assert torch.isfinite(fastsde.log_prob("swiss-roll", torch.zeros(2, 2), steps=4)).all()

    def loop(network: Callable[[Any], Any], n: int) -> Any:
        x = torch.randn(n, 2)
        for _ in range(3):
            x = x - 0.1 * network(x) + 0.1 * torch.randn_like(x)
        return x

    network = torch.nn.Linear(2, 2)
    assert fastsde.accelerate(loop)(network, 4).shape == (4, 2)
    assert fastsde.trace(loop, network, 4)(network, 6).shape == (6, 2)
    config = TrainConfig("swiss-roll", fastsde.models.MLP(2, (4,)).config, steps=2, batch_size=4)
    Trainer(config, folder / "run", dataset=fastsde.data.swiss_roll(20)).train(progress=False)
    checkpoint = fastsde.checkpoints.load(folder / "run")
    results = fastsde.verify.verify(checkpoint, steps=3, n=8, device="cpu")
    assert {result.verdict for result in results if result.backend == "eager"} == {"pass"}
    np.savez(folder / "points.npz", x=np.zeros((4, 2)))
    assert len(fastsde.data.arrays(folder / "points.npz")) == 4


def use_extras(folder: Path) -> dict[str, str]:
    """Returns what features that need an extra say."""
    import torch

    import fastsde
    from fastsde import data
    from fastsde.__main__ import main
    from fastsde.compat import k_diffusion
    from fastsde.networks import NETWORKS
    from fastsde.training import TrainConfig, Trainer

    def train(sample_every: int = 0, **options: Any) -> None:
        config = TrainConfig("swiss-roll", fastsde.models.MLP(2, (4,)).config, steps=2, sample_every=sample_every)
        Trainer(config, folder / "never", dataset=data.swiss_roll(20), **options)

    (folder / "images").mkdir()
    (folder / "images" / "one.png").write_bytes(b"")
    adaptive = fastsde.solvers.AdaptiveODE()
    features: dict[str, Callable[[], Any]] = {
        "scatter": lambda: fastsde.plotting.scatter(torch.zeros(3, 2)),
        "image_grid": lambda: fastsde.plotting.image_grid(torch.zeros(1, 1, 4, 4)),
        "sample_every": lambda: train(sample_every=1),
        "tensorboard": lambda: train(tensorboard=True),
        "digits": data.digits,
        "mnist": lambda: data.mnist(folder),
        "images": lambda: data.images(folder / "images"),
        "adaptive": lambda: fastsde.log_prob("swiss-roll", torch.zeros(2, 2), solver=adaptive),
        "openvino": lambda: fastsde.Sampler("mnist", compile="openvino"),
        "ddpm-unet": NETWORKS["ddpm-unet"].load,
        "k_diffusion": lambda: k_diffusion.sample("euler", None, torch.zeros(1, 2), torch.linspace(1, 0, 3)),
        "fastsde": main,
    }
    found = {name: said(feature) for name, feature in features.items()}
    assert not (folder / "never").exists()
    return found


def use_commands() -> dict[str, str]:
    """Returns the exit codes and the messages of commands, with click alone."""
    del sys.modules["click"]
    from fastsde.cli import main

    found = {}
    for command in ("sample mnist", "train digits", "train swiss-roll --steps 2 --quiet"):
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            code = said(functools.partial(main, command.split()))
        found[command] = f"{code}: {printed.getvalue()}"
    return found


def said(feature: Callable[[], Any]) -> str:
    """Returns the error of a call."""
    try:
        feature()
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))
    empty = Path(sys.argv[2])
    use_core(empty)
    print(json.dumps(use_extras(empty) | use_commands()))
