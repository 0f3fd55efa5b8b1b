"""``.ci/gpu``, with a stand-in for Python that logs its arguments, and fails or runs forever when told to."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/bash
echo "$*" >>"$CALLS"
case "$*" in
    -c*) echo "$XDIST"; [ -z "$NO_GPU" ]; exit ;;
    *info*) exit ;;
esac
echo "a line of $*, OMP_NUM_THREADS=$OMP_NUM_THREADS"
if [[ -n $HANGS && $* == *"$HANGS"* ]]; then
    { sleep 30; echo worker >>"$CALLS"; } &  # which holds the output open for as long as it lives
    trap 'echo summary; exit 2' INT
    wait
fi
[[ -z $FAILS || $* != *"$FAILS"* ]] || exit 3
"""
TESTS = {
    "kernels": ["-m gpu and not alone", "tests/kernels tests/models"],
    "engines": ["-m gpu and not alone", "tests --ignore=tests/kernels --ignore=tests/models"],
    "alone": ["-m gpu and alone"],
}


@pytest.fixture
def gpu(tmp_path: Path) -> Gpu:
    if shutil.which("bash") is None or not Path("/usr/bin/env").is_file():
        pytest.skip("the script needs bash and env")
    return Gpu(tmp_path)


class Gpu:
    """Runs the script; knows what it called and where its results are."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        self._calls = folder / "calls"
        python = folder / "bin" / "python3"
        python.parent.mkdir()
        python.write_text(PYTHON)
        python.chmod(0o755)
        self._path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"

    def __call__(self, *steps: str, **told: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": self._path,
            "CALLS": str(self._calls),
            "OUT": str(self.out),
            "XDIST": "True",
            "WORKERS": "3",
            "OMP_NUM_THREADS": "5",
            **told,
        }
        # Like a job in the background, which ignores SIGINT, as do its children.
        command = ["bash", "-c", 'trap "" INT; exec "$@"', "-", str(ROOT / ".ci" / "gpu"), *steps]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    @property
    def steps(self) -> list[str]:
        """Returns the calls after the queries at the beginning."""
        info, question, *steps = re.split(r"\n(?=-)", self._calls.read_text())
        assert info == "-m fastsde info"
        assert question.startswith("-c ")
        return steps


def test_kernels_come_before_engines_and_engines_before_benchmarks(gpu: Gpu) -> None:
    done = gpu()
    assert done.returncode == 0, done.stdout + done.stderr
    *tests, bench = gpu.steps
    for call, (step, arguments) in zip(tests, TESTS.items(), strict=True):
        assert call.startswith("-m pytest ")
        assert f"--junitxml={gpu.out / step}.xml" in call
        assert all(argument in call for argument in arguments)
        assert ("-n 3 --dist worksteal" in call) == (step != "alone")
        log = (gpu.out / f"{step}.log").read_text()
        assert log.startswith("a line of -m pytest")
        assert ("OMP_NUM_THREADS=1\n" in log) == (step != "alone")
    minutes = re.fullmatch(rf"-m fastsde bench --device cuda --minutes (\S+) --out {gpu.out}/gpu\.json\n?", bench)
    assert minutes is not None
    assert 6 < float(minutes[1]) <= 8.75  # 570 seconds less 45, since no step has used any
    verdicts = (gpu.out / "steps.txt").read_text()
    assert re.findall(r"^(\w+): passed", verdicts, re.MULTILINE) == [*TESTS, "bench"]
    assert done.stdout.endswith(verdicts)


@pytest.mark.slow
def test_a_step_that_overruns_is_interrupted_and_the_next_runs_but_the_whole_is_not_green(gpu: Gpu) -> None:
    done = gpu(HANGS="tests/kernels tests/models", LIMIT_S="4")
    assert done.returncode == 1
    assert (gpu.out / "kernels.log").read_text().endswith("summary\n")
    verdicts = (gpu.out / "steps.txt").read_text().splitlines()
    assert verdicts[0].startswith("kernels: CUT: more than 1 s")
    assert [verdict.split(":")[1].split(",")[0] for verdict in verdicts[1:]] == [" passed"] * 3
    assert not any("worker" in step for step in gpu.steps)  # it was killed


@pytest.mark.parametrize("step", ["tests/kernels tests/models", "gpu and alone", "fastsde bench"])
def test_a_step_that_fails_leaves_the_others_to_run(gpu: Gpu, step: str) -> None:
    assert gpu(FAILS=step).returncode == 1
    assert len(gpu.steps) == 4
    assert (gpu.out / "steps.txt").read_text().count("FAILED with code 3") == 1


def test_some_steps_alone_have_all_the_time(gpu: Gpu) -> None:
    done = gpu("bench", "engines", LIMIT_S="540", XDIST="False")
    assert done.returncode == 0
    engines, bench = gpu.steps
    assert "--ignore=tests/kernels" in engines
    assert "-n " not in engines
    assert "fastsde bench" in bench
    # A share of 24 out of 24 + 30, and all of the time, less what the script itself takes on a busy machine.
    shares = dict(re.findall(r"== (\w+), at most (\d+) s", done.stdout))
    assert 200 <= int(shares["engines"]) <= 240
    assert 500 <= int(shares["bench"]) <= 540


@pytest.mark.parametrize("name", ["LIMIT_S", "WORKERS"])
@pytest.mark.parametrize("value", ["0", "-5", "abc", "1e3", "0900", "10m"])
def test_numbers_are_checked_before_anything_runs(gpu: Gpu, name: str, value: str) -> None:
    done = gpu(**{name: value})
    assert done.returncode == 2
    assert done.stderr == f"{name} must be a positive integer, got '{value}'\n"
    assert not gpu.out.exists()


def test_two_runs_do_not_share_a_folder_and_help_runs_nothing(gpu: Gpu) -> None:
    assert gpu("bench").returncode == 0
    with (gpu.out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = gpu("bench")
    assert done.returncode == 1
    assert done.stderr == f"another run writes to {gpu.out}\n"
    assert "bench: passed" in (gpu.out / "steps.txt").read_text()
    done = gpu("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("What only a GPU can show")
    assert "LIMIT_S   seconds for all steps" in done.stdout
    assert len(gpu.steps) == 1


def test_an_unknown_step_and_a_machine_without_a_gpu_are_errors(gpu: Gpu) -> None:
    for step in ("kernel", "", "kernels engines"):
        done = gpu(step)
        assert done.returncode == 2
        assert done.stderr == f"unknown step '{step}': it is one of kernels engines alone bench\n"
    assert not gpu.out.exists()
    done = gpu(NO_GPU="1")
    assert done.returncode == 1
    assert "without a CUDA GPU" in done.stderr
    assert not gpu.steps
