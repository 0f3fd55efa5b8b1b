"""Every code block of the README and of the site runs."""

from __future__ import annotations

import warnings
from pathlib import Path

import code_blocks
import matplotlib as mpl
import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if not path.is_symlink()]
DOCUMENTS = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES)
    if any(block.is_run for block in code_blocks.blocks(path))
]
# Those whose blocks need a library that not everybody has.
NEEDS = {"docs/guides/loops.md": ("azula", "denoising_diffusion_pytorch", "diffusers", "k_diffusion")}


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_code_blocks_of_a_document_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in NEEDS.get(str(document.relative_to(ROOT)), ()):
        pytest.importorskip(library, reason=f"needs {library}", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    mpl.use("agg")
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # of other libraries; those of fastsde are tested elsewhere
        torch.manual_seed(0)
        code_blocks.run(document, tmp_path)


# The runner ---------------------------------------------------------------------------------------------------------


def _document(folder: Path, text: str) -> Path:
    path = folder / "document.md"
    path.write_text(text)
    return path


def test_blocks_share_a_namespace_and_a_comment_replaces_text(tmp_path: Path) -> None:
    text = (
        "# Title\n\n```python\nsteps = 2\n```\n\nText.\n\n<!-- in tests: 100_000 -> steps -->\n```python\n"
        "from pathlib import Path\nPath(FOLDER, 'out').write_text(str(100_000))\n```\n"
    )
    document = _document(tmp_path, text.replace("FOLDER", repr(str(tmp_path))))
    assert code_blocks.run(document, tmp_path) == 2
    assert (tmp_path / "out").read_text() == "2"


def test_a_failing_block_is_named_by_the_line_of_its_document(tmp_path: Path) -> None:
    document = _document(tmp_path, "Text.\n\n```python\nx = 1\nx / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        code_blocks.run(document, tmp_path)
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == (str(document), 5)


@pytest.mark.parametrize("code", ["fastsde sample nobody", "fastsde --version && false"])
def test_a_failing_command_is_an_error(tmp_path: Path, code: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"document\.md:2: "):
        code_blocks.run(_document(tmp_path, f"```sh\n{code}\n```\n"), tmp_path)


def test_a_block_is_left_out_for_a_reason(tmp_path: Path) -> None:
    document = _document(tmp_path, "<!-- not in tests: installs -->\n```sh\nfalse\n```\n\n```text\nfalse\n```\n")
    assert code_blocks.run(document, tmp_path) == 0
    assert [block.left_out for block in code_blocks.blocks(document)] == ["installs", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\nx\n```\n", "the block's language is ''"),
        ("<!-- in tests: 5 -> 6 -->\n```python\nx = 4\n```\n", "the block does not have '5'"),
        ("!!! note\n\n    ```python\n    x = 1\n    ```\n", "has 2 lines with ``` but 0 blocks"),
        ("<!-- in tests: 5 -> 6 -->\nText.\n\n```python\nx = 5\n```\n", "'<!-- in tests: 5 -> 6 -->', which is not in"),
        ("Text <!-- not in tests: slow -->\n\n```sh\nls\n```\n", "'<!-- not in tests: slow -->', which is not in"),
        ("```sh\nls\n```\n\n<!-- not in tests: slow -->\n", "'<!-- not in tests: slow -->', which is not in"),
        ("<!-- in tests: 5 => 6 -->\n```python\nx = 5\n```\n", "'<!-- in tests: 5 => 6 -->' is neither"),
        ("<!-- not in test: slow -->\n```sh\nls\n```\n", "'<!-- not in test: slow -->' is neither"),
    ],
)
def test_what_would_not_run_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        code_blocks.blocks(_document(tmp_path, text))
