"""The native kernels, compiled on first use by the machine's own C++ compiler for its own CPU.

The shared library is kept in ``$FASTSDE_CACHE_DIR``, ``$XDG_CACHE_HOME/fastsde`` or ``~/.cache/fastsde``, if nobody
else can write to that folder, under a name derived from its sources, its flags, the compiler, the CPU and the OpenMP
runtime. It is written atomically, so that any number of processes may do so at once. ``$CXX`` names a compiler,
``$FASTSDE_CXXFLAGS`` adds flags, and ``FASTSDE_NATIVE=0`` turns native kernels off.

The kernels use the OpenMP runtime that PyTorch has loaded: there is one pool of threads, and ``torch.set_num_threads``
sets its size. ctypes releases the GIL while a kernel runs.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

__all__ = ["find_compiler", "load", "unavailable_reason"]

_HERE = Path(__file__).parent
MAIN = "fastsde.cpp"
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-Wno-psabi", "-w")
_COMPILERS = ("g++", "c++", "clang++")
_TIMEOUT_S = 300
_BUILDING, _STALE_S = "fastsde-build-", 3600  # build folders; those left by killed processes are deleted later

_lock = threading.RLock()
_outcomes: dict[str, tuple[ctypes.CDLL | None, str | None]] = {}
_told: set[str] = set()
_private: list[Path] = []  # the folder of this process, if it has one


class CannotLoadError(Exception):
    """A library has been compiled but cannot be loaded."""


def load(source: str = MAIN) -> ctypes.CDLL | None:
    """Returns the library of a source, compiled if necessary; None, with a warning, if that fails."""
    if source not in _outcomes:
        with _lock:
            if source not in _outcomes:
                _outcomes[source] = _load(source)
                reason = _outcomes[source][1]
                if reason is not None and os.environ.get("FASTSDE_NATIVE") != "0":
                    _warn(f"fastsde runs without native kernels: {reason}")
    return _outcomes[source][0]


def unavailable_reason(source: str = MAIN) -> str | None:
    """Returns why there is no library, and what to do about it; None if there is one."""
    load(source)
    return _outcomes[source][1]


def _warn(message: str) -> None:
    """Warns once per message."""
    if message not in _told:
        warnings.warn(message, RuntimeWarning, stacklevel=5)
    _told.add(message)


def _load(source: str) -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("FASTSDE_NATIVE") == "0":
        return None, "FASTSDE_NATIVE is 0; unset it"
    compiler = find_compiler()
    if compiler is None:
        wanted = os.environ.get("CXX") or ", ".join(_COMPILERS)
        return None, f"no C++ compiler was found ({wanted}); install one, such as g++, or name it in CXX"
    reasons: list[str] = []
    for march, openmp in _attempts():
        try:
            library = _library(source, compiler, march, openmp)
        except subprocess.TimeoutExpired:
            return None, f"{compiler[0]} took more than {_TIMEOUT_S} s"
        except (OSError, CannotLoadError, subprocess.CalledProcessError) as error:
            reasons.append(_first_line(error))
            continue
        if not openmp:
            _warn(f"the native kernels run in one thread, without OpenMP: {reasons[0]}")
        return library, None
    return None, f"{compiler[0]} did not make {source} ({reasons[0]}); name another compiler in CXX"


def _library(source: str, compiler: list[str], march: tuple[str, ...], openmp: bool) -> ctypes.CDLL:
    """Calls `_library_in` with the cache folder or, if nothing may be executed there, with a private one."""
    folder = cache_dir()
    try:
        return _library_in(folder, source, compiler, march, openmp)
    except CannotLoadError as error:
        if "failed to map" not in str(error) or folder in _private:
            raise
    return _library_in(private_dir(), source, compiler, march, openmp)


def _attempts() -> Iterator[tuple[tuple[str, ...], bool]]:
    """Yields flags for the CPU, and whether to use OpenMP, best first."""
    for openmp in (True, False):
        yield ("-march=native",), openmp
        yield (), openmp


def _first_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, subprocess.CalledProcessError):
        text = error.stderr or f"exit status {error.returncode}"
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
    return re.sub(r"^/\S*/(\w+)-\w+\.so", r"\1", lines[0].strip()) if lines else type(error).__name__


def find_compiler() -> list[str] | None:
    """Returns the command of a C++ compiler, or None."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in _COMPILERS]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    return None


def _library_in(folder: Path, source: str, compiler: list[str], march: tuple[str, ...], openmp: bool) -> ctypes.CDLL:
    """Returns the library of a source for these flags, compiled if the folder does not have it.

    Args:
        source: the name of a file next to this one.
        compiler: the command.
        march: flags for the CPU; those of ``$FASTSDE_CXXFLAGS`` follow them.
        openmp: whether to compile with threads.

    Raises:
        CalledProcessError, TimeoutExpired, OSError: if it cannot be compiled.
        CannotLoadError: if the library cannot be loaded, now or as noted by an earlier process.
    """
    more = shlex.split(os.environ.get("FASTSDE_CXXFLAGS", ""))
    runtime = _openmp_runtime() if openmp else None
    flags = [*_FLAGS, *march, *(["-fopenmp"] if openmp else []), *more]
    # Linked by path, the runtime is the one that is already loaded; -fopenmp would link the compiler's own.
    link = [str(runtime)] if runtime is not None else ["-fopenmp"] if openmp else []
    path = folder / f"{Path(source).stem}-{_key(compiler, flags, link)}.so"
    note = path.with_suffix(".failed")
    if note.exists():
        raise CannotLoadError(note.read_text())
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # it does not exist, or is incomplete
        _compile([*compiler, *flags, "-c", str(_HERE / source)], [*compiler, "-shared", *more], link, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        if "undefined symbol" in str(error):  # permanent, so that other processes need not compile it
            note.write_text(str(error))
            path.unlink(missing_ok=True)
        raise CannotLoadError(str(error)) from error


def _compile(compile_command: list[str], link_command: list[str], link: list[str], path: Path) -> None:
    _delete_stale(path.parent)
    with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=path.parent) as folder:
        part, whole = Path(folder, "part.o"), Path(folder, "whole.so")
        _run([*compile_command, "-o", str(part)])
        _run([*link_command, str(part), *link, "-o", str(whole)])
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        whole.replace(path)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL)


def _delete_stale(cache: Path) -> None:
    for folder in cache.glob(f"{_BUILDING}*"):
        try:
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # another process was faster
            continue


def cache_dir() -> Path:
    """Returns the folder for compiled libraries if only this user can write to it, else a private one."""
    named = os.environ.get("FASTSDE_CACHE_DIR")
    try:
        home = os.environ.get("XDG_CACHE_HOME") or ("" if named else str(Path("~/.cache").expanduser()))
        folder = Path(named) if named else Path(home, "fastsde")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
        if about.st_uid != os.geteuid() or about.st_mode & 0o022:
            return private_dir()
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # no home, or not writable
        return private_dir()


def private_dir() -> Path:
    """Returns a temporary folder of this process, deleted at exit."""
    with _lock:
        if not _private:
            _private.append(Path(tempfile.mkdtemp(prefix="fastsde-")))
            atexit.register(shutil.rmtree, _private[0], ignore_errors=True)
    return _private[0]


def _key(compiler: list[str], flags: list[str], link: list[str]) -> str:
    content = hashlib.sha256()
    for source in sorted([*_HERE.glob("*.h"), *_HERE.glob("*.cpp")]):
        content.update(source.name.encode() + source.read_bytes())
    binary = Path(compiler[0]).resolve()
    stat = binary.stat()
    content.update(repr((compiler, str(binary), stat.st_size, stat.st_mtime_ns, flags, link, _cpu())).encode())
    return content.hexdigest()[:32]


def _cpu() -> tuple[str, ...]:
    """Returns what distinguishes this CPU from others that may not run the same code."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return (platform.machine(), platform.processor())
    names = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part")
    lines = [line for line in first.splitlines() if line.split("\t")[0].split(":")[0].strip() in names]
    return (platform.machine(), *lines)


def _openmp_runtime() -> Path | None:
    """Returns the OpenMP runtime of this process, preferably the one that PyTorch ships."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = dict.fromkeys(re.findall(r"(/.*/lib(?:gomp|iomp5|omp)[^/\n]*\.so[^/\n]*)$", maps, re.MULTILINE))
    torch_first = sorted(found, key=lambda path: "torch" not in path)
    return Path(torch_first[0]) if torch_first else None
