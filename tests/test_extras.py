"""The core needs torch, Triton, NumPy, safetensors and tqdm; any other feature names the extra that it lacks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from fastsde import MissingExtraError
from fastsde.extras import missing, require

ROOT = Path(__file__).resolve().parent.parent
CORE = ("torch", "triton", "numpy", "safetensors", "tqdm")


def _core() -> set[str]:
    """Returns the distributions that the core's requirements bring."""
    found: set[str] = set()
    left = list(CORE)
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform
            continue
        found.add(name)
        left += [_canonical(re.split(r"[^\w.-]", each)[0]) for each in requirements if "extra ==" not in each]
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _blocked() -> Iterator[str]:
    """Yields the modules of all other distributions."""
    core = _core()
    for module, owners in metadata.packages_distributions().items():
        if module != "fastsde" and not {_canonical(owner) for owner in owners} & core and module.isidentifier():
            yield module


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What features say in a process that has the core alone."""
    folder = tmp_path_factory.mktemp("core")
    blocked = sorted(set(_blocked()) | {"click", "torchode", "openvino", "diffusers", "k_diffusion"})
    command = [sys.executable, ROOT / "tests" / "without_extras.py", json.dumps(blocked), folder]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("feature", "library", "extra"),
    [
        ("scatter", "matplotlib", "plot"),
        ("image_grid", "pillow", "plot"),
        ("sample_every", "pillow", "plot"),
        ("tensorboard", "tensorboard", "tensorboard"),
        ("digits", "scikit-learn", "data"),
        ("mnist", "torchvision", "data"),
        ("images", "pillow", "data"),
        ("adaptive", "torchode", "ode"),
        ("ddpm-unet", "diffusers", "diffusers"),
        ("k_diffusion", "k-diffusion", "k-diffusion"),
    ],
)
def test_a_feature_names_the_extra_that_it_lacks(said: Any, feature: str, library: str, extra: str) -> None:
    message = f"{library} is not installed; it is needed for WHAT: pip install 'fastsde[{extra}]'"
    assert re.sub(r"for .*: pip", "for WHAT: pip", said[feature]) == f"MissingExtraError: {message}"


@pytest.mark.slow
def test_openvino_is_an_option_that_needs_its_extra(said: Any) -> None:
    line = "openvino is not installed; it is needed for compile='openvino': pip install 'fastsde[openvino]'"
    assert said["openvino"] == f"MissingExtraError: {line}, or use compile=True"


@pytest.mark.slow
def test_the_command_says_in_one_line_what_it_lacks(said: Any) -> None:
    line = "click is not installed; it is needed for the command line: pip install 'fastsde[cli]'"
    assert said["fastsde"] == f"SystemExit: Error: {line}"
    line = "pillow is not installed; it is needed for pictures: pip install 'fastsde[plot]'"
    assert said["sample mnist"] == f"SystemExit: 1: Error: {line}\n"
    line = "scikit-learn is not installed; it is needed for the data set digits: pip install 'fastsde[data]'"
    assert said["train digits"] == f"SystemExit: 1: Error: {line}\n"
    assert said["train swiss-roll --steps 2 --quiet"] == "SystemExit: 0: "


def test_a_library_that_cannot_be_imported_is_told_from_one_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require("math", extra="none", what="nothing").pi > 3
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    message = r"^pillow cannot be imported \(.*\); it is needed for pictures: pip install 'fastsde\[plot\]'$"
    with pytest.raises(MissingExtraError, match=message):
        require("PIL.Image", extra="plot", what="pictures")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError) as caught:
        require("PIL.Image", extra="plot", what="pictures")
    assert str(caught.value) == missing("PIL", extra="plot", what="pictures")


def test_every_extra_that_is_named_exists() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no parser of TOML")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pattern = re.compile(r"""(?:extra=|"extra": |imported\("[\w.]+", )"([\w-]+)\"|fastsde\[([\w-]+)\]""")
    files = [path for folder in ("fastsde", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    named = {name for path in files for match in pattern.findall(path.read_text()) for name in match if name}
    assert named >= {"cli", "data", "ode", "plot", "engines", "sbi"}
    assert named <= set(extras)
    own = [re.match(r"fastsde\[(.*)\]", text) for each in extras.values() for text in each]
    assert {name for found in own if found for name in found[1].split(",")} <= set(extras)
