"""How OpenMP's threads wait: programs set it before torch is loaded, libraries never, and users come first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastsde import openmp

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
SHOW = "from fastsde.openmp import wait_policy; print(wait_policy(), os.environ.get('OMP_WAIT_POLICY'), sep='; ')"


def shown(code: str, **given: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    command = [sys.executable, "-c", f"import os; {code}; {SHOW}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.slow
def test_programs_wait_passively_unless_told_otherwise() -> None:
    wait = "from fastsde.openmp import wait_passively; wait_passively()"
    assert shown(wait) == "passive after 1000 spins (set by fastsde); passive"
    assert shown(wait, OMP_WAIT_POLICY="active") == "active (OMP_WAIT_POLICY); active"
    assert shown(wait, GOMP_SPINCOUNT="9", KMP_BLOCKTIME="0") == "9 (GOMP_SPINCOUNT), 0 (KMP_BLOCKTIME); None"
    assert shown(f"import torch; {wait}") == "the runtime's default; None"  # it has already read its environment
    command = "from click.testing import CliRunner; from fastsde.cli import main; CliRunner().invoke(main, ['train'])"
    assert shown(command) == "passive after 1000 spins (set by fastsde); passive"


@pytest.mark.slow
def test_a_library_leaves_the_environment_alone() -> None:
    assert shown("import fastsde; fastsde.sample") == "the runtime's default; None"
    assert shown("import fastsde.cli") == "the runtime's default; None"


@pytest.mark.parametrize("module", ["fastsde", "fastsde.benchmarks.quality"])
def test_programs_set_it_before_torch_is_loaded(module: str) -> None:
    """A finder checks the variables when torch is imported."""
    code = (
        "import sys, runpy\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch': print(os.environ.get('OMP_WAIT_POLICY'), flush=True); os._exit(0)\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.argv[1:] = ['info' if {module!r} == 'fastsde' else 'swiss-roll']\n"
        f"runpy.run_module({module!r}, run_name='__main__')"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run([sys.executable, "-c", f"import os\n{code}"], env=environment, capture_output=True, text=True)
    assert done.stdout == "passive\n", done.stderr


def test_the_suite_itself_waits_as_it_should() -> None:
    assert openmp.wait_policy() != "the runtime's default"
