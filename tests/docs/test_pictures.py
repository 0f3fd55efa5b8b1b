"""The pictures of the guides are drawn, small enough, and all of them are in the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from fastsde.benchmarks.pictures import PICTURES, main

DOCS = Path(__file__).parents[2] / "docs"
MOST_BYTES = 150_000


@pytest.mark.slow
def test_the_pictures_of_the_guides_are_drawn(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--out", str(tmp_path), "--steps", "11"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert {path.stem for path in tmp_path.iterdir()} == set(PICTURES)


def test_each_picture_is_small_and_in_a_guide() -> None:
    text = "".join(path.read_text() for path in (DOCS / "guides").glob("*.md"))
    for name in PICTURES:
        assert (DOCS / "assets" / f"{name}.png").stat().st_size <= MOST_BYTES
        assert f"../assets/{name}.png" in text
