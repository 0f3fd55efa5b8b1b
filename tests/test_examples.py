"""The examples: ten short scripts, each of which runs where the library that it is about is installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
ARGUMENTS = {  # small sizes
    "inpaint_digit": ["12"],
    "own_network": ["20"],
    "probability_flow": ["8"],
    "sbi_posterior": ["2"],
    "several_gpus": ["100"],
}
EXTRAS = {"diffusers": "diffusers", "k_diffusion": "k-diffusion", "sbi": "sbi", "sklearn": "data"}  # by library


def test_there_are_ten_short_examples_in_the_table_of_their_readme() -> None:
    assert len(EXAMPLES) == 10
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 40, path.name
    rows = re.findall(r"^\| \[(\w+\.py)\]\((\w+\.py)\) \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == [(path.name, path.name) for path in EXAMPLES]


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    for library in set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)) & EXTRAS.keys():
        reason = f"needs {library}: pip install 'fastsde[{EXTRAS[library]}]'"
        pytest.importorskip(library, reason=reason, exc_type=ImportError)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", path, *ARGUMENTS.get(path.stem, [])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
