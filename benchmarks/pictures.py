"""The pictures of the guides, drawn by the shipped models: ``python -m benchmarks.pictures`` writes docs/assets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from fastsde.openmp import wait_passively

if __name__ == "__main__":
    wait_passively()  # before torch is loaded

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import fastsde
from fastsde import data
from fastsde.files import atomic_path
from fastsde.plotting import image_grid

_COLUMNS = 10


def trajectory(steps: int) -> Figure:
    """The swiss roll on its way from noise to data: after each fifth of the rows."""
    every = steps // 5
    options = {"solver": "dpm_solver_pp_2m", "steps": 5 * every, "spacing": "log_snr"}
    _, states = fastsde.sample("swiss-roll", (2000, 2), trajectory=every, **options)
    figure = Figure(figsize=(12, 2.3))
    for i, (panel, state) in enumerate(zip(figure.subplots(1, len(states)), states, strict=True)):
        panel.scatter(*state.T, s=1, lw=0, c="#2458c5")
        panel.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=(), yticks=(), title=f"{i * every} rows")
    return figure


def guidance(steps: int) -> Figure:
    """Each label in turn, from the same noise under four weights of guidance."""
    labels, rows = torch.arange(_COLUMNS), {}
    for w in (0.0, 1.0, 2.0, 4.0):
        options = {"solver": "dpm_solver_pp_2m", "steps": steps, "guidance": w, "model_kwargs": {"label": labels}}
        rows[f"w = {w:g}"] = fastsde.sample("mnist", (_COLUMNS, 1, 28, 28), seed=4, **options)
    return _images(rows)


def inverse(steps: int) -> Figure:
    """Digits completed, and drawn from 7 x 7 measured pixels; what is given comes first in each row."""
    options = {"solver": "dpm_solver_pp_2m", "steps": steps, "guidance": 2.0}
    digit = fastsde.sample("mnist", (1, 1, 28, 28), seed=4, model_kwargs={"label": torch.tensor([5])}, **options)
    mask, n = torch.arange(28) < 14, _COLUMNS - 1
    rows = {}
    for resamples in (1, 5):
        sampler = fastsde.Sampler("mnist", steps=steps, denoise=True, resamples=resamples)
        drawn = sampler(n, mask=mask, known=digit[0])
        rows[f"mask, resamples={resamples}"] = torch.cat((torch.where(mask, digit, 0.0), drawn))

    def coarse(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 4)

    y, sampler = coarse(digit), fastsde.Sampler("mnist", solver="ddpm", steps=steps, denoise=True)
    for measurement in (fastsde.DPS(coarse, y, scale=1.0), fastsde.PiGDM(coarse, y, noise_std=0.05)):
        drawn = sampler(n, measurement=measurement)
        rows[type(measurement).__name__] = torch.cat((F.interpolate(y, scale_factor=4), drawn))
    return _images(rows)


def density(steps: int) -> Figure:
    """The log density of the swiss roll, and points of the roll."""
    axis = torch.linspace(-2, 2, 201)
    points = torch.cartesian_prod(axis, axis)
    log_p = fastsde.log_prob("swiss-roll", points, steps=steps).reshape(len(axis), -1)
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(log_p.T.numpy(), vmin=-12, origin="lower", extent=(-2, 2, -2, 2))
    figure.colorbar(image, ax=right, label="log p(x) of the model", extend="min")
    right.scatter(*data.swiss_roll(5000, seed=1).x.T, s=2, lw=0, c="#2458c5")
    right.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal", title="data")
    left.set(title="log p(x)")
    return figure


def relabelled(steps: int) -> Figure:
    """Digits encoded with their own labels, and decoded with every label."""
    labels, rows = torch.arange(_COLUMNS), {}
    options = {"solver": "dpm_solver_pp_2m", "steps": steps, "guidance": 2.0, "spacing": "log_snr"}
    for label in (2, 4, 5):
        own = torch.tensor([label])
        x = fastsde.sample("mnist", (1, 1, 28, 28), seed=4, model_kwargs={"label": own}, t_end=1e-4, **options)
        z = fastsde.encode("mnist", x, steps=steps, model_kwargs={"label": own})
        rows[f"from a {label}"] = fastsde.decode(
            "mnist", z.repeat(_COLUMNS, 1, 1, 1), steps=steps, model_kwargs={"label": labels}
        )
    return _images(rows)


def _images(rows: dict[str, Tensor]) -> Figure:
    """Draws rows of ten images, with their names on the left."""
    grid = image_grid(torch.cat(list(rows.values())), columns=_COLUMNS, scale=3)
    figure = Figure(figsize=(9.5, 0.05 + 0.85 * len(rows)))
    axes = figure.add_axes((0.14, 0.01, 0.85, 0.98))
    axes.imshow(grid, cmap="gray", vmin=0, vmax=255)
    height = grid.height / len(rows)
    axes.set_yticks([height * (i + 0.5) for i in range(len(rows))], list(rows))
    axes.set_xticks(())
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


# Each picture, and the rows of its trajectories.
PICTURES: dict[str, tuple[Callable[[int], Figure], int]] = {
    "trajectory": (trajectory, 20),
    "guidance": (guidance, 40),
    "inverse": (inverse, 100),
    "density": (density, 100),
    "relabelled": (relabelled, 100),
}


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="docs/assets", show_default=True)
@click.option("--steps", type=click.IntRange(5), help="Rows of all trajectories, for a quick look.")
def main(out: Path, steps: int | None) -> None:
    """Draw the pictures of the guides; some two minutes on two cores."""
    out.mkdir(parents=True, exist_ok=True)
    for name, (draw, rows) in PICTURES.items():
        figure = draw(steps or rows)
        with atomic_path(out / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=100, bbox_inches="tight", facecolor="white")
        click.echo(out / f"{name}.png")


if __name__ == "__main__":
    main()
