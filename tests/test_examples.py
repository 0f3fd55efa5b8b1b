"""Every example runs, where the library that it is about is installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
ARGUMENTS = {"own_network": ["30"], "inpaint_digit": ["20"]}  # fewer steps
LIBRARIES = {"azula", "denoising_diffusion_pytorch", "diffusers", "k_diffusion", "sbi"}


def test_examples_are_short() -> None:
    assert len(EXAMPLES) >= 7
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 45, path.name


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    used = set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)) & LIBRARIES
    for library in used:
        pytest.importorskip(library, reason=f"needs {library}", exc_type=ImportError)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", path, *ARGUMENTS.get(path.stem, [])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
