"""The notebooks run, and what is committed is a whole, clean run of each (see notebooks/README.md)."""

from __future__ import annotations

import ast
import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SITE = ROOT / "docs/notebooks/index.md"
BLOB = "github.com/fastsde/fastsde/blob/main/notebooks"
COLAB = "https://colab.research.google.com"
BADGE = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/fastsde/fastsde/blob/main/notebooks/NAME)"
LIBRARIES = {"diffusers", "sbi"}
# What a notebook runs with here instead of its own sizes.
PARAMETERS: dict[str, dict[str, Any]] = {
    "diffusers": {"training_steps": 10, "n": 10, "calls": [2, 3], "steps": 3, "batches": [1, 20], "rounds": 1},
    "inpainting": {"steps": 11, "n": 2},
    "likelihood_and_inversion": {"resolution": 16, "n": 50, "calls": 4},
    "mnist": {"steps": 3, "training_steps": 30, "interrupt_after": 60.0},
    "sbi": {"simulations": 200, "epochs": 2, "n": 100, "steps": 10, "observations": 2},
    "swiss_roll": {"training_steps": 200, "n": 50, "n_distance": 100, "most_calls": 20},
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text())
    return notebook


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def tagged(notebook: dict[str, Any], tag: str) -> list[dict[str, Any]]:
    return [cell for cell in code_cells(notebook) if tag in cell["metadata"].get("tags", [])]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def check_outputs(notebook: dict[str, Any], pictures: int) -> None:
    """Fails for errors, for anything on stderr, such as a warning, and for too few pictures."""
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not ["".join(output["text"]) for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= pictures


def test_every_notebook_has_small_parameters_and_is_on_the_site() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(PARAMETERS)
    page = SITE.read_text()
    for path in NOTEBOOKS:
        assert f"https://{BLOB}/{path.name}" in page
        assert BADGE.replace("NAME", path.name) in page
        assert f"(../assets/notebooks/{path.stem}.png)" in page


@each_notebook
def test_what_is_committed_is_one_whole_run(path: Path) -> None:
    notebook = read(path)
    check_outputs(notebook, pictures=3)
    ran = [cell for cell in code_cells(notebook) if cell not in tagged(notebook, "skip-execution")]
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    assert path.stat().st_size <= 700_000


@each_notebook
def test_what_is_committed_has_nothing_of_the_machine(path: Path) -> None:
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"].keys() <= {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
        assert cell["metadata"].keys() <= {"tags"}
        for output in cell.get("outputs", []):
            texts = [output.get("text", ""), *(t for kind, t in output.get("data", {}).items() if "image" not in kind)]
            for text in texts:
                assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|Users)\b| at 0x", "".join(text)), text


@each_notebook
def test_a_notebook_begins_with_its_badge_an_installation_and_its_parameters(path: Path) -> None:
    notebook = read(path)
    title = source(notebook["cells"][0])
    assert title.startswith("# ")
    assert BADGE.replace("NAME", path.name) in title
    (install,) = tagged(notebook, "skip-execution")
    assert "git+https://github.com/fastsde/fastsde" in source(install)
    assert not install["outputs"]
    (parameters,) = tagged(notebook, "parameters")
    names = {
        ast.unparse(node.targets[0]) for node in ast.parse(source(parameters)).body if isinstance(node, ast.Assign)
    }
    assert PARAMETERS[path.stem].keys() <= names


@each_notebook
def test_the_site_shows_a_picture_of_the_notebook(path: Path) -> None:
    shown = ROOT / f"docs/assets/notebooks/{path.stem}.png"
    expected = runpy.run_path(str(ROOT / "notebooks/pictures.py"))["picture"](path).convert("RGB")
    with Image.open(shown) as picture:
        difference = np.abs(np.asarray(picture.convert("RGB"), float) - np.asarray(expected, float))
    assert difference.mean() < 2, "run python notebooks/pictures.py"
    assert shown.stat().st_size <= 80_000


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # papermill's own; the notebook's are on its stderr
@each_notebook
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    papermill = pytest.importorskip("papermill", reason="needs papermill and ipykernel: pip install '.[test]'")
    code = "\n".join(source(cell) for cell in code_cells(read(path)))
    for library in set(re.findall(r"^ *(?:from|import) (\w+)", code, re.MULTILINE)) & LIBRARIES:
        pytest.importorskip(library, reason=f"needs {library}", exc_type=ImportError)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    out = tmp_path / path.name
    papermill.execute_notebook(
        path, out, parameters=PARAMETERS[path.stem], kernel_name="python3", cwd=tmp_path, progress_bar=False
    )
    check_outputs(read(out), pictures=3)
