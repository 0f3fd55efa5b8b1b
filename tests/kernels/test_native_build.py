"""How the native kernels are compiled, kept, found again and done without."""

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

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")


def _environment(cache: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "CXX")}
    return kept | {"FASTSDE_CACHE_DIR": str(cache), "PYTHONPATH": ROOT, **more}


def _run(cache: Path, code: str = SAMPLE, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=_environment(cache, **more), capture_output=True, text=True)


@needs_compiler
def test_several_processes_at_once_leave_one_library(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAMPLE]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, env=_environment(tmp_path), **pipes) for _ in range(3)]
    for run in runs:
        out, err = run.communicate()
        assert (run.returncode, out, err) == (0, "persistent True\n", "")
    (library,) = tmp_path.iterdir()
    written = library.stat().st_mtime_ns
    assert _run(tmp_path).stdout == "persistent True\n"
    assert library.stat().st_mtime_ns == written  # the next process compiles nothing


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        (
            "/nonexistent/g++",
            "no C++ compiler was found (/nonexistent/g++); install one, such as g++, or name it in CXX",
        ),
        ("false", "false did not compile them"),
    ],
)
def test_without_a_compiler_one_warning_says_so_and_pytorch_takes_over(
    tmp_path: Path, compiler: str, message: str
) -> None:
    run = _run(tmp_path, CXX=compiler)
    assert (run.returncode, run.stdout) == (0, "eager True\n")
    assert run.stderr.count("RuntimeWarning") == 1
    assert message in run.stderr
    assert not list(tmp_path.iterdir())


def test_they_can_be_turned_off_without_a_warning(tmp_path: Path) -> None:
    run = _run(tmp_path, FASTSDE_NATIVE="0")
    assert (run.returncode, run.stdout, run.stderr) == (0, "eager True\n", "")
    reason = "from fastsde.engines import unavailable_reason as reason; import torch\n"
    run = _run(tmp_path, reason + "print(reason('persistent', torch.device('cpu')))", FASTSDE_NATIVE="0")
    assert "needs Triton and a CUDA GPU, or the CPU and a C++ compiler" in run.stdout


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_compiled_again(tmp_path: Path) -> None:
    assert _run(tmp_path).stdout == "persistent True\n"
    (library,) = tmp_path.iterdir()
    size = library.stat().st_size
    library.write_bytes(b"\0" * size)  # as after a power cut
    run = _run(tmp_path)
    assert (run.stdout, run.stderr) == ("persistent True\n", "")
    assert library.stat().st_size == size


@needs_compiler
def test_where_nothing_can_be_kept_it_is_compiled_for_the_process(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("not a folder")
    run = _run(taken, TMPDIR=str(tmp_path))
    assert (run.stdout, run.stderr) == ("persistent True\n", "")
    assert taken.read_text() == "not a folder"


@needs_compiler
def test_what_a_killed_process_has_left_is_deleted_in_time(tmp_path: Path) -> None:
    old, new = tmp_path / "tmp-old", tmp_path / "tmp-new"
    old.mkdir()
    new.mkdir()
    before = time.time() - 2 * build._STALE_S
    os.utime(old, (before, before))
    _run(tmp_path)
    assert not old.exists()
    assert new.exists()


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


@needs_compiler
@pytest.mark.skipif(torch.backends.openmp.is_available() is False, reason="this PyTorch has no OpenMP")
def test_there_is_one_openmp_runtime_and_torch_rules_it(tmp_path: Path) -> None:
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
    assert _run(tmp_path, code).stdout == "True True\n"
