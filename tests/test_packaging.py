"""What `import fastsde` needs, and that a wheel and a bare checkout hold the same package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastsde

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, cwd: Path, *flags: str) -> str:
    command = [sys.executable, *flags, "-c", code]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light(tmp_path: Path) -> None:
    # Beyond torch only tqdm: everything else is imported by the function that needs it.
    code = (
        "import sys, torch; before = set(sys.modules); import fastsde; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    added = [name for name in python(code, tmp_path).split() if not name.startswith("__editable__")]
    assert set(added) <= {"fastsde", "tqdm"}


def test_import_and_sampling_need_no_triton_and_touch_no_gpu(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastsde\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(fastsde.sample(lambda x, t: -x, (3, 2), steps=5).shape)"
    )
    assert python(code, tmp_path) == "torch.Size([3, 2])"


@pytest.mark.parametrize("package", ["kernels", "benchmarks"])
def test_the_mapped_packages_import_only_under_fastsde(tmp_path: Path, package: str) -> None:
    code = f"import fastsde.{package} as p; print(list(p.__path__)[0])"
    assert Path(python(code, tmp_path)).name == package
    installed = python(f"import importlib.util as u; print(u.find_spec({package!r}) is None)", tmp_path)
    assert installed == "True"


def test_a_bare_checkout_imports_without_being_installed(tmp_path: Path) -> None:
    # A copy in another folder, first on the path, stands for a checkout.
    for name in ("fastsde", "kernels", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    code = "import fastsde, fastsde.kernels, fastsde.benchmarks as b; print(fastsde.__file__, list(b.__path__)[0])"
    package, benchmarks = python(code, tmp_path).split()
    assert Path(package).parent == tmp_path / "fastsde"
    assert Path(benchmarks) == tmp_path / "benchmarks"


def test_the_wheel_holds_code_kernels_benchmarks_and_models(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="building without isolation needs setuptools >= 77")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "data", "*.egg-info", "build"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    result = subprocess.run(list(map(str, build)), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("fastsde-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    packages = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert packages == {"fastsde"}
    wanted = [path.relative_to(ROOT).as_posix() for path in (ROOT / "fastsde").rglob("*.py")]
    wanted += [
        f"fastsde/{p.relative_to(ROOT).as_posix()}" for d in ("kernels", "benchmarks") for p in (ROOT / d).rglob("*.py")
    ]
    wanted += [f"fastsde/assets/{name}" for name in ("README.md", "mnist.safetensors", "swiss_roll.safetensors")]
    wanted += ["fastsde/kernels/README.md", "fastsde/py.typed"]
    assert set(wanted) <= names
    code = (
        "import fastsde.kernels, fastsde.benchmarks; from fastsde import checkpoints as c; print(c.load('mnist').data)"
    )
    assert python(code, tmp_path / "installed") == "mnist"


def test_versions_agree() -> None:
    declared = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert declared[1] == fastsde.__version__


def test_modules_are_imported_when_they_are_asked_for() -> None:
    code = (
        "import sys, fastsde; assert 'fastsde.training' not in sys.modules; "
        "fastsde.training.Trainer, fastsde.checkpoints.load, fastsde.data.load, fastsde.compat.tutorial; "
        "hasattr(fastsde, 'nothing') and sys.exit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
