from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastsde import plotting


def test_scatter_shows_samples_beside_data() -> None:
    samples, points = torch.randn(200, 2), torch.randn(50, 2)
    alone, beside = plotting.scatter(samples), plotting.scatter(samples, points)
    assert beside.width == 2 * alone.width
    assert beside.height == alone.height
    left, right = np.asarray(beside)[:, : alone.width], np.asarray(beside)[:, alone.width :]
    assert blue(right) > 20 > blue(left)  # samples are blue, data grey


def blue(pixels: np.ndarray) -> int:
    r, g, b = pixels.astype(int).transpose(2, 0, 1)
    return int(((b - r > 60) & (b - g > 40)).sum())


def test_image_grid_maps_the_value_range_and_clamps() -> None:
    images = torch.tensor([-1.0, 0.0, 1.0, 5.0])[:, None, None, None].expand(4, 1, 3, 3)
    grid = np.asarray(plotting.image_grid(images, scale=1))
    assert grid.shape == (2 * 5 + 2, 2 * 5 + 2)
    assert [grid[3, 3], grid[3, 8], grid[8, 3], grid[8, 8]] == [0, 128, 255, 255]


def test_image_grid_takes_colour_and_a_part_row() -> None:
    grid = plotting.image_grid(torch.zeros(5, 3, 4, 6), columns=3, scale=2)
    assert grid.mode == "RGB"
    assert grid.size == (2 * (3 * 8 + 2), 2 * (2 * 6 + 2))


def test_animations_have_a_frame_a_state_and_end_with_the_samples(tmp_path: Path) -> None:
    states = torch.randn(4, 30, 2)
    frames = plotting.animate_points(states, [1.0, 0.6, 0.3, 0.0], score=lambda x, t: -x)
    assert len(frames) == 4
    plotting.save_gif(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 4
        assert gif.info["loop"] == 0
    images = plotting.animate_images(torch.rand(3, 5, 1, 4, 4) * 2 - 1)
    assert len(images) == 3


def test_the_score_field_is_drawn() -> None:
    states = torch.zeros(1, 1, 2) + 0.5
    plain = np.asarray(plotting.animate_points(states, [0.5])[0])
    field = np.asarray(plotting.animate_points(states, [0.5], score=lambda x, t: -x / t)[0])
    assert (plain != field).sum() > 1000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plotting.scatter(torch.zeros(3, 3)), r"samples must have shape \[n, 2\], got \[3, 3\]"),
        (lambda: plotting.scatter(torch.zeros(3, 2), torch.zeros(2)), r"data must have shape"),
        (lambda: plotting.image_grid(torch.zeros(3, 2, 4, 4)), r"images must have shape .* got \[3, 2, 4, 4\]"),
        (lambda: plotting.image_grid(torch.zeros(0, 1, 4, 4)), r"n >= 1"),
        (lambda: plotting.save_gif([], "a.gif"), "at least one picture"),
    ],
)
def test_wrong_shapes_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_picture_of_an_unknown_format_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown file extension"):
        plotting.save_image(plotting.image_grid(torch.zeros(1, 1, 4, 4)), tmp_path / "a.what")
    assert not list(tmp_path.iterdir())
