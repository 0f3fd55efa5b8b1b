"""Pictures: samples next to data, a grid of images, and the reverse process from noise to data as an animation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .extras import require
from .files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

__all__ = ["animate_images", "animate_points", "image_grid", "save_gif", "save_image", "scatter"]

ScoreFunction = Callable[[Tensor, float], Tensor]

_DATA_COLOUR, _SAMPLE_COLOUR, _FIELD_COLOUR = "#8a8f98", "#2458c5", "#d2691e"
_NEEDED = {"extra": "plot", "what": "pictures"}


def pillow() -> Any:
    """Returns ``PIL.Image``."""
    return require("PIL.Image", **_NEEDED)


def figures() -> Any:
    """Returns ``matplotlib.figure``."""
    return require("matplotlib.figure", **_NEEDED)


def scatter(samples: Tensor, data: Tensor | None = None) -> Image.Image:
    """Draws samples in the plane, next to data with the same axis limits if given.

    Args:
        samples: ``[n, 2]``.
        data: ``[m, 2]``, or None.

    Returns:
        The picture, a PIL image.

    Raises:
        ValueError: for other shapes.
    """
    panels = [("samples", _points("samples", samples), _SAMPLE_COLOUR)]
    if data is not None:
        panels.insert(0, ("data", _points("data", data), _DATA_COLOUR))
    limits = _limits(np.concatenate([points for _, points, _ in panels]))
    figure = figures().Figure(figsize=(4.5 * len(panels), 4.8), dpi=120)
    figure.subplots_adjust(left=0.08, right=0.97, top=0.93, bottom=0.06, wspace=0.12)
    for axes, (title, points, colour) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_points(axes, points, colour, limits)
        axes.set_title(f"{len(points):,} {title}")
    return _render(figure)


def image_grid(
    images: Tensor, value_range: tuple[float, float] = (-1.0, 1.0), columns: int | None = None, scale: int = 2
) -> Image.Image:
    """Draws a grid of images ``[n, C, H, W]``, C 1 or 3, with values clamped to ``value_range``.

    Args:
        images: ``[n, C, H, W]``.
        value_range: the values of black and white.
        columns: images per row; by default as many as make the grid about square.
        scale: pixels of the picture per pixel of an image.

    Raises:
        ValueError: for other shapes, or if there are no images.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"images must have shape [n, 1 or 3, H, W] with n >= 1, got {list(images.shape)}")
    low, high = value_range
    n, channels, height, width = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = -(-n // columns)
    pixels = ((images.detach().float().cpu() - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)
    margin = 2
    canvas = np.full((rows * (height + margin) + margin, columns * (width + margin) + margin, channels), 255, np.uint8)
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        top = margin + i // columns * (height + margin)
        left = margin + i % columns * (width + margin)
        canvas[top : top + height, left : left + width] = image
    library = pillow()
    picture: Image.Image = library.fromarray(canvas[..., 0] if channels == 1 else canvas)
    return picture.resize((picture.width * scale, picture.height * scale), library.Resampling.NEAREST)


def animate_points(states: Tensor, times: Sequence[float], score: ScoreFunction | None = None) -> list[Image.Image]:
    """Draws frames of points ``[frames, n, 2]`` on their way from noise to data, with the score field behind them.

    Args:
        states: the points of each frame, as ``trajectory`` of a sampler gives them.
        times: the time of each frame.
        score: ``(x [B, 2], t) -> score [B, 2]``, drawn as arrows in its direction, longer where it is larger.
    """
    for state in states:
        _points("states", state)
    limits = _limits(states.detach().float().cpu().numpy().reshape(-1, 2))
    return [_point_frame(state, time, limits, score) for state, time in zip(states, times, strict=True)]


def animate_images(
    states: Tensor, value_range: tuple[float, float] = (-1.0, 1.0), columns: int | None = None
) -> list[Image.Image]:
    """Draws frames of image grids ``[frames, n, C, H, W]`` on their way from noise to data.

    Each frame is scaled by the wider of its own spread and ``value_range``, so that noise shows as noise.

    Args:
        states: the images of each frame, as ``trajectory`` of a sampler gives them.
        value_range: the values of black and white.
        columns: images per row, as for `image_grid`.
    """
    low, high = value_range
    centre, half = (low + high) / 2, (high - low) / 2
    frames = []
    for state in states:
        spread = max(half, 2 * float(state.std())) if state.numel() > 1 else half
        frames.append(image_grid(state, (centre - spread, centre + spread), columns))
    return frames


def save_image(picture: Image.Image, path: str | Path) -> None:
    """Writes a picture atomically, in the format of the path's suffix."""
    with atomic_path(path) as temporary:
        picture.save(temporary)


def save_gif(frames: Sequence[Image.Image], path: str | Path, seconds: float = 4.0) -> None:
    """Writes frames as an animated GIF that plays for ``seconds``, pauses a second on the last frame, and repeats.

    Args:
        frames: the pictures.
        path: the file, which should end in .gif.
        seconds: how long the frames are shown.

    Raises:
        ValueError: if there are no frames.
    """
    if not frames:
        raise ValueError("frames must have at least one picture, got none")
    each = max(20, round(1000 * seconds / len(frames)))
    durations = [each] * (len(frames) - 1) + [each + 1000]
    palette = [frame.convert("P", palette=pillow().Palette.ADAPTIVE, colors=64) for frame in frames]
    with atomic_path(path) as temporary:
        palette[0].save(temporary, save_all=True, append_images=palette[1:], duration=durations, loop=0, optimize=True)


def _points(name: str, points: Tensor) -> np.ndarray[Any, Any]:
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"{name} must have shape [n, 2], got {list(points.shape)}")
    return points.detach().float().cpu().numpy()


def _limits(points: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Returns equal limits for both axes, with a margin; one coordinate in a thousand may lie outside."""
    bound = 1.15 * float(np.quantile(np.abs(points), 0.999)) if points.size else 1.0
    return -max(bound, 1e-3), max(bound, 1e-3)


def _draw_points(axes: Axes, points: np.ndarray[Any, Any], colour: str, limits: tuple[float, float]) -> None:
    axes.scatter(
        points[:, 0], points[:, 1], s=max(1.5, min(9.0, 6000 / max(1, len(points)))), c=colour, lw=0, alpha=0.7
    )
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.tick_params(labelsize=8)


def _point_frame(state: Tensor, time: float, limits: tuple[float, float], score: ScoreFunction | None) -> Image.Image:
    figure = figures().Figure(figsize=(4.5, 4.8), dpi=72)
    figure.subplots_adjust(left=0.09, right=0.97, top=0.93, bottom=0.06)
    axes = figure.subplots()
    if score is not None:
        ticks = torch.linspace(*limits, 19, dtype=torch.float32, device="cpu")[1:-1]
        grid = torch.cartesian_prod(ticks, ticks).to(state.device)
        field = score(grid, time).detach().float().cpu().numpy()
        length = np.linalg.norm(field, axis=1, keepdims=True)
        # Scores span orders of magnitude: the arrows keep the direction and grow with the square root of the size.
        arrows = field / np.sqrt(np.maximum(length, 1e-12)) / math.sqrt(max(float(length.max()), 1e-12))
        x, y = grid.cpu().numpy().T
        axes.quiver(x, y, arrows[:, 0], arrows[:, 1], color=_FIELD_COLOUR, scale=20, width=0.004, alpha=0.6)
    _draw_points(axes, _points("states", state), _SAMPLE_COLOUR, limits)
    axes.set_title(f"t = {time:.3f}")
    return _render(figure)


def _render(figure: Figure) -> Image.Image:
    canvas: Any = require("matplotlib.backends.backend_agg", **_NEEDED).FigureCanvasAgg(figure)
    canvas.draw()
    picture: Image.Image = pillow().fromarray(np.asarray(canvas.buffer_rgba()).copy())
    return picture.convert("RGB")
