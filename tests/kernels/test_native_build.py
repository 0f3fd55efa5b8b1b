"""How the native kernels are compiled, cached and found again, and what happens without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastsde
from fastsde.kernels.cpu import build

ROOT = str(Path(fastsde.__file__).parents[1])
SAMPLE = """
import torch, fastsde
from fastsde.models import MLP
torch.manual_seed(0)
model = MLP()
sampler = fastsde.Sampler(model, (2,), steps=3)
same = torch.allclose(sampler(70), fastsde.sample(model, (70, 2), steps=3, backend="reference"), atol=1e-4, rtol=1e-4)
print(sampler.backend, same)
"""
# The build itself does not import torch, and a small source takes it a tenth of a second.
ANSWER = """
import sys
from pathlib import Path
from fastsde.kernels.cpu import build
build._HERE = Path(sys.argv[1])
print(build.load().answer())
assert "torch" not in sys.modules
"""

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")


def _environment(cache: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "CXX")}
    return kept | {"FASTSDE_CACHE_DIR": str(cache), "PYTHONPATH": ROOT, **more}


def _run(cache: Path, code: str, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=_environment(cache, **more), capture_output=True, text=True)


@pytest.fixture
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small source, instead of the kernels'."""
    folder = tmp_path_factory.mktemp("source")
    (folder / build.MAIN).write_text('extern "C" int answer() { return 42; }')
    return folder


def _compiler(path: Path, *lines: str) -> str:
    """Writes a compiler that runs lines of a shell before it compiles."""
    real = " ".join(build.find_compiler() or [])
    path.write_text("\n".join(("#!/bin/sh", *lines, f'exec {real} "$@"')))
    path.chmod(0o700)
    return str(path)


@pytest.mark.slow
@needs_compiler
def test_several_processes_at_once_leave_one_library(tmp_path: Path, source: Path) -> None:
    cache, compiler = tmp_path / "cache", _compiler(tmp_path / "compiler", "sleep 0.5")  # all start before one is done
    command = [sys.executable, "-c", ANSWER, source]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, env=_environment(cache, CXX=compiler), **pipes) for _ in range(3)]
    for run in runs:
        out, err = run.communicate()
        assert (run.returncode, out, err) == (0, "42\n", "")
    (library,) = cache.iterdir()
    written = library.stat().st_mtime_ns
    assert _run(cache, ANSWER, source, CXX=compiler).stdout == "42\n"
    assert library.stat().st_mtime_ns == written  # the next process compiles nothing


@pytest.mark.slow
def test_without_a_compiler_one_warning_says_so_and_pytorch_takes_over(tmp_path: Path) -> None:
    run = _run(tmp_path, SAMPLE, CXX="false")
    assert (run.returncode, run.stdout) == (0, "eager True\n")
    assert run.stderr.count("RuntimeWarning") == 1
    assert "false did not make fastsde.cpp (exit status 1); name another compiler in CXX" in run.stderr
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_outcomes", {})
    monkeypatch.setattr(build, "_told", set())
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    message = "no C++ compiler was found (/nonexistent/g++); install one, such as g++, or name it in CXX"
    with pytest.warns(RuntimeWarning) as told:
        assert build.load() is None
    assert [str(each.message) for each in told] == [f"fastsde runs without native kernels: {message}"]
    assert build.unavailable_reason() == message  # a second warning would be an error here


@pytest.mark.slow
def test_they_can_be_turned_off_without_a_warning(tmp_path: Path) -> None:
    reason = "from fastsde.plan import unavailable_reason as reason\nprint(reason('persistent', torch.device('cpu')))"
    run = _run(tmp_path, SAMPLE + reason, FASTSDE_NATIVE="0")
    sampled, told = run.stdout.splitlines()
    assert (run.returncode, sampled, run.stderr) == (0, "eager True", "")
    assert "got device cpu (no: FASTSDE_NATIVE is 0; unset it); use 'eager' or 'reference'" in told


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_compiled_again(tmp_path: Path, source: Path) -> None:
    assert _run(tmp_path, ANSWER, source).stdout == "42\n"
    (library,) = tmp_path.iterdir()
    size = library.stat().st_size
    library.write_bytes(b"\0" * size)  # as after a power cut
    run = _run(tmp_path, ANSWER, source)
    assert (run.stdout, run.stderr) == ("42\n", "")
    assert library.stat().st_size == size


@needs_compiler
@pytest.mark.parametrize("taken", ["a file", "open to others"])
def test_where_nothing_can_be_kept_it_is_compiled_for_the_process(tmp_path: Path, source: Path, taken: str) -> None:
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    if taken == "a file":
        cache.write_text("not a folder")
    else:
        cache.mkdir()
        cache.chmod(0o777)
    run = _run(cache, ANSWER, source, TMPDIR=str(temporary))
    assert (run.stdout, run.stderr) == ("42\n", "")
    assert cache.is_file() or not list(cache.iterdir())
    assert not [each for each in temporary.iterdir() if each.name.startswith("fastsde-")]


@needs_compiler
def test_a_user_without_a_home_has_them_too(tmp_path: Path, source: Path) -> None:
    code = "from pathlib import Path\nPath.expanduser = lambda self: exec('raise RuntimeError')\n" + ANSWER
    environment = {"XDG_CACHE_HOME": "", "FASTSDE_CACHE_DIR": "", "TMPDIR": str(tmp_path)}
    run = _run(tmp_path, code, source, **environment)
    assert (run.stdout, run.stderr) == ("42\n", "")


@pytest.mark.slow
@needs_compiler
def test_what_one_source_lacks_the_others_have(tmp_path: Path) -> None:
    # A compiler that fails for the U-Net and for training, and the sources themselves, with the flags of users.
    fails = 'case "$*" in *unet.cpp*|*mlp_training.cpp*) exit 1;; esac'
    code = (
        SAMPLE
        + """
import dataclasses, tempfile
from fastsde.models import UNet
from fastsde.training import Trainer, default_config
print(fastsde.sample(UNet(1, 4, (16, 16)), (1, 1, 4, 4), steps=2).shape)
config = dataclasses.replace(default_config("swiss-roll"), steps=2, data_size=50)
print(Trainer(config, tempfile.mkdtemp()).train(progress=False).record["step"])
"""
    )
    run = _run(tmp_path / "cache", code, CXX=_compiler(tmp_path / "compiler", fails))
    assert run.stdout == "persistent True\ntorch.Size([1, 1, 4, 4])\n2\n", run.stderr
    assert run.stderr.count("RuntimeWarning") == 2


@needs_compiler
def test_what_a_killed_process_has_left_is_deleted_in_time(tmp_path: Path, source: Path) -> None:
    old, new, other = (tmp_path / name for name in ("fastsde-build-old", "fastsde-build-new", "tmp-other"))
    before = time.time() - 2 * build._STALE_S
    for folder in (old, new, other):
        folder.mkdir()
        if folder is not new:
            os.utime(folder, (before, before))
    assert _run(tmp_path, ANSWER, source).stdout == "42\n"
    assert not old.exists()
    assert new.exists()
    assert other.exists()  # not ours


@needs_compiler
def test_flags_sources_and_cpu_make_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSDE_CACHE_DIR", str(tmp_path))
    compiler = build.find_compiler()
    assert compiler is not None

    def key(*flags: str) -> str:
        return build._key(compiler, list(flags), [])

    keys = {key(), key("-O1")}
    monkeypatch.setattr(build, "_cpu", lambda: ("another",))
    keys.add(key())
    copy = tmp_path / "sources"
    copy.mkdir()
    (copy / "simd.h").write_text("// another")
    monkeypatch.setattr(build, "_HERE", copy)
    keys.add(key())
    assert len(keys) == 4


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(torch.backends.openmp.is_available() is False, reason="this PyTorch has no OpenMP")
def test_there_is_one_openmp_runtime_and_torch_rules_it() -> None:
    code = """
import re, torch, fastsde
from fastsde import noise, ops
def runtimes():
    with open("/proc/self/maps") as maps:
        return set(re.findall(r"/lib(?:gomp|iomp5|omp)[^/]*[.]so", maps.read()))
def threads():
    with open("/proc/self/status") as status:
        return int(re.search(r"Threads:\\s*(\\d+)", status.read())[1])
x, keys = torch.randn(1000, 1000), noise.sample_keys(0, 1000)
torch.set_num_threads(3)
(x @ x).exp()
before = runtimes(), threads()
ops.normal(keys, 0, (1000,))
print(ops.has_native(x.device), (runtimes(), threads()) == before)
"""
    # In the cache of the suite, which has the library already.
    assert _run(build.cache_dir(), code).stdout == "True True\n"
