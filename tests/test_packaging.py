"""What `import fastsde` needs and exports, and that a wheel and a bare checkout contain the same package."""

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


@pytest.mark.parametrize(
    ("before", "use", "allowed"),
    [("", "", set()), pytest.param("torch", "fastsde.sample", {"safetensors", "tqdm"}, marks=pytest.mark.slow)],
)
def test_import_is_light(tmp_path: Path, before: str, use: str, allowed: set[str]) -> None:
    # The import alone needs nothing; sampling needs, besides torch, only what imports in a millisecond. Everything else
    # is imported by the function that needs it.
    code = (
        f"import sys, {before or 'math'}; before = set(sys.modules); import fastsde; {use}\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    added = [name for name in python(code, tmp_path).split() if not name.startswith("__editable__")]
    assert set(added) <= {"fastsde"} | allowed


@pytest.mark.slow
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
    # A checkout on the path, as in an editable install, hides no other package of that name, not even a later one.
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("name = 'another'")
    code = f"import sys; sys.path.append(sys.path.pop(0)); import {package}, fastsde.{package}; print({package}.name)"
    assert python(code, tmp_path) == "another"


def test_a_bare_checkout_imports_without_being_installed(tmp_path: Path) -> None:
    # A copy in another folder, first on the path, stands for a checkout.
    for name in ("fastsde", "kernels", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    code = "import fastsde, fastsde.kernels, fastsde.benchmarks as b; print(fastsde.__file__, list(b.__path__)[0])"
    package, benchmarks = python(code, tmp_path).split()
    assert Path(package).parent == tmp_path / "fastsde"
    assert Path(benchmarks) == tmp_path / "benchmarks"


@pytest.mark.slow
def test_the_wheel_holds_code_kernels_benchmarks_and_models(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="building without isolation needs setuptools >= 77")
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "build")

    def ignored(folder: str, names: list[str]) -> set[str]:
        own = {"runs", "data"} if Path(folder) == ROOT else set()  # a user's; fastsde/data is the package's
        return unwanted(folder, names) | own

    shutil.copytree(ROOT, source, ignore=ignored)
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
    # An editable install is a path, which type checkers can follow.
    code = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path / 'editable')!r})"
    python(code, source)
    with zipfile.ZipFile(next((tmp_path / "editable").glob("*.whl"))) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".pth"))
        assert archive.read(path).decode().strip() == str(source)
        assert not [name for name in archive.namelist() if name.endswith(".py")]


@pytest.mark.slow
def test_a_script_elsewhere_is_type_checked_against_the_package(tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\nallow_untyped_decorators = True\nallow_subclassing_any = True\n"
        "[mypy-torch.*,numpy.*,safetensors.*,tqdm.*,PIL.*]\nfollow_imports = skip\nignore_missing_imports = True\n"
    )
    (tmp_path / "script.py").write_text(
        "import fastsde\n"
        "from fastsde.training import default_config\n"
        "steps: int = default_config('swiss-roll').steps\n"
        "number: int = fastsde.VPSDE()\n"
        "fastsde.nothing\n"
        "pair: int = fastsde.sample('mnist', (4, 1, 28, 28), trajectory=2)\n"
        "fastsde.Sampler('mnist')(3, sead=1)\n"
    )
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "script.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    wrong = [line for line in result.stdout.splitlines() if "error:" in line]
    assert [line.split(":")[1] for line in wrong[:-1]] == ["4", "5", "6", "7"], result.stdout + result.stderr
    assert wrong[0].startswith('script.py:4: error: Incompatible types in assignment (expression has type "VPSDE"')
    assert wrong[1].startswith('script.py:5: error: Module has no attribute "nothing"')
    assert 'expression has type "tuple[Any, Any]", variable has type "int"' in wrong[2]
    assert 'Unexpected keyword argument "sead"' in wrong[3]


def test_versions_agree() -> None:
    declared = {
        "pyproject.toml": r'^version = "(.*)"$',
        "CITATION.cff": r"^version: (.*)$",
        "docs/about/citation.md": r"^  version = {(.*)},$",
    }
    for name, pattern in declared.items():
        assert re.findall(pattern, (ROOT / name).read_text(), re.MULTILINE) == [fastsde.__version__], name


@pytest.mark.slow
def test_names_are_imported_when_they_are_asked_for(tmp_path: Path) -> None:
    code = (
        "import pickle, sys, fastsde; names = dir(fastsde); assert 'torch' not in sys.modules\n"
        "assert all(getattr(fastsde, name) is getattr(fastsde, name) for name in names)\n"
        "assert not hasattr(fastsde, 'nothing')\n"
        "fastsde.training.Trainer, fastsde.checkpoints.load, fastsde.data.load, fastsde.compat.tutorial\n"
        "assert pickle.loads(pickle.dumps(fastsde.VPSDE())) == fastsde.VPSDE()\n"
        "from fastsde import *\n"
        "assert (StepTable, sample, noise) == (fastsde.solvers.StepTable, fastsde.sampler.sample, fastsde.noise)\n"
        "print(*names)"
    )
    modules = "checkpoints compat data distributed inverse models noise ops plotting reference sde solvers tracing "
    modules += "training verify"
    names = ["NonFiniteError", "Sampler", "StepTable", "__version__", "sample", *modules.split()]
    names += ["MismatchError", "MissingExtraError", "TraceError", "accelerate", "trace"]
    names += ["ClassifierGuidance", "DPS", "Guidance", "PiGDM", "bits_per_dim", "decode", "encode", "log_prob"]
    names += ["CosineVPSDE", "EDM", "RectifiedFlow", "SubVPSDE", "VESDE", "VPSDE"]
    assert python(code, tmp_path).split() == sorted(names)
    assert set(fastsde.__all__) <= set(names)
