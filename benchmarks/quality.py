"""How good the samples of a model are: ``python -m fastsde.benchmarks.quality swiss-roll|mnist``.

The swiss roll is judged by the mean sliced 1-Wasserstein distance to fresh data; MNIST by a small CNN trained here on
the real digits: how confident it is of the samples, how they are spread over the classes, and the Frechet distance
between its features of samples and of test digits.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import click

from fastsde.openmp import wait_passively

if __name__ == "__main__":
    wait_passively()  # before torch is loaded

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsde
from fastsde import checkpoints, data
from fastsde.checkpoints import Checkpoint
from fastsde.files import atomic_path

DIRECTIONS = 256
JUDGES = (10, 20)  # epochs: the longer a CNN trains, the surer it becomes of everything


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = DIRECTIONS) -> float:
    """Returns the mean 1-Wasserstein distance of two sets of points ``[n, 2]`` over evenly spaced directions."""
    angles = torch.arange(directions, dtype=torch.float64) * (torch.pi / directions)
    axes = torch.stack((angles.cos(), angles.sin()))
    projected = [(points.double() @ axes).sort(dim=0).values for points in (a, b)]
    return float((projected[0] - projected[1]).abs().mean())


def swiss_roll_distance(checkpoint: Checkpoint, n: int = 10_000, seed: int = 0, **options: Any) -> dict[str, float]:
    """Returns the distance of samples to fresh data and, for scale, the distance of two fresh data sets."""
    options = {"sde": checkpoint.sde, "prediction": checkpoint.prediction, "seed": seed, **options}
    x = fastsde.sample(checkpoint.model, (n, 2), **options)
    fresh, other = (data.swiss_roll(n, seed=1_000_001 + 2 * seed + i).x for i in range(2))
    return {"samples_to_data": sliced_wasserstein(x, fresh), "data_to_data": sliced_wasserstein(fresh, other)}


class Classifier(nn.Module):
    """A small CNN for 28x28 digits. Its 128 penultimate features are used for the Frechet distance."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU()),
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(x))
        return result


def train_classifier(root: str | Path, epochs: int = 20, seed: int = 0) -> tuple[Classifier, float, Tensor]:
    """Returns the classifier, its accuracy on the test digits, and those digits ``[N, 1, 28, 28]`` in [-1, 1]."""
    torch.manual_seed(seed)
    (train, labels), (test, test_labels) = (data.mnist_files(root, train=which) for which in (True, False))
    train, test = (x.float() / 127.5 - 1 for x in (train, test))
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(train)).split(128):
            loss = F.cross_entropy(model(train[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = float((model(test).argmax(1) == test_labels).double().mean())
    return model, accuracy, test


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Returns |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) of features ``[n, d]`` (Heusel et al. 2017)."""
    (mean_a, cov_a), (mean_b, cov_b) = (
        (x.mean(0), np.cov(x, rowvar=False)) for x in (a.double().numpy(), b.double().numpy())
    )
    # The trace of the root is the sum of the roots of the eigenvalues, which are real and >= 0 up to rounding.
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0))
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * roots.sum())


def judge_digits(classifier: Classifier, test: Tensor, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
    """Returns how the classifier rates samples ``[n, 1, 28, 28]`` in [-1, 1].

    Args:
        labels: the digits that were asked for, ``[n]``, or None.
    """
    with torch.no_grad():
        probability, label = classifier(x).softmax(1).max(1)
        features, test_features = classifier.body(x), classifier.body(test)
        shares = label.bincount(minlength=10).double() / len(x)
        sure_of_test = float((classifier(test).softmax(1).max(1).values > 0.9).double().mean())
        half = len(test) // 2
        return {
            "share_above_0.9": float((probability > 0.9).double().mean()),
            "share_above_0.9_of_test_digits": sure_of_test,
            **({} if labels is None else {"read_as_asked": float((label == labels).double().mean())}),
            "class_shares": [round(share, 4) for share in shares.tolist()],
            "frechet_distance": frechet_distance(features, test_features),
            "frechet_distance_of_test_halves": frechet_distance(test_features[:half], test_features[half:]),
        }


def report(result: dict[str, Any], out: Path | None) -> None:
    """Prints figures as JSON, with the version of PyTorch and the CPU, and keeps them in a file if one is given."""
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    text = json.dumps({**result, "torch": torch.__version__, "cpu": cpu}, indent=2) + "\n"
    if out is not None:
        with atomic_path(out) as temporary:
            temporary.write_text(text)
    click.echo(text, nl=False)


@click.command()
@click.argument("subject", type=click.Choice(("swiss-roll", "mnist")))
@click.option("--model", help="A checkpoint instead of the shipped model.")
@click.option("--data", "root", help="The folder of MNIST.  [default: data]")
@click.option("-n", type=int, help="How many samples.  [default: 10,000 points, 1,000 digits]")
@click.option("--solver", default="euler_maruyama", show_default=True)
@click.option("--steps", default=999, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--labels", is_flag=True, help="Ask a conditional model for each digit in turn.")
@click.option("--guidance", type=float, help="Weight of classifier-free guidance, with --labels.")
@click.option("--compile", is_flag=True, help="Run the network through torch.compile.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to keep the figures as JSON.")
def main(
    subject: str,
    model: str | None,
    root: str | None,
    n: int | None,
    solver: str,
    steps: int,
    seed: int,
    labels: bool,
    guidance: float | None,
    compile: bool,
    out: Path | None,
) -> None:
    """Judge the samples of a model; prints the figures as JSON."""
    if root is not None and subject != "mnist":
        raise click.UsageError(f"--data is the folder of MNIST, and {subject} does not use one: leave it out")
    started = time.time()
    checkpoint = checkpoints.load(model or subject)
    result: dict[str, Any]
    if subject == "swiss-roll":
        n = n or 10_000
        result = swiss_roll_distance(checkpoint, n, seed, solver=solver, steps=steps, compile=compile)
    else:
        n = n or 1000
        sampler = fastsde.Sampler(
            checkpoint, solver=solver, steps=steps, guidance=guidance, compile=compile, max_batch=100
        )
        asked = torch.arange(n) % 10 if labels else None
        x = sampler(n, seed=seed, model_kwargs=None if asked is None else {"label": asked}, progress=True)
        low, high = checkpoint.value_range or (-1.0, 1.0)
        x = ((x - low) / (high - low) * 2 - 1).clamp(-1, 1)
        result = {"labels": labels, "guidance": guidance}
        for epochs in JUDGES:
            classifier, accuracy, test = train_classifier(root or data.DEFAULT_ROOT, epochs)
            rated = judge_digits(classifier, test, x, asked)
            result[f"judge_of_{epochs}_epochs"] = {"accuracy": accuracy, **rated}
    result = {
        "subject": subject,
        "n": n,
        "solver": solver,
        "steps": steps,
        "seed": seed,
        **result,
        "trained_steps": checkpoint.record["step"] + checkpoint.record.get("earlier_steps", 0),
        "seconds": round(time.time() - started, 1),
    }
    report(result, out)


if __name__ == "__main__":
    main()
