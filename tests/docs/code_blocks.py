"""The code blocks of a Markdown document, and how the tests run them.

The blocks of a document run in order, in one namespace and one folder. A comment in front of a block replaces text of
it for the tests, such as a number of steps that takes hours::

    <!-- in tests: steps=100_000 -> steps=20 -->

and ``<!-- not in tests: REASON -->`` leaves the block out, if it installs something or needs other hardware. Neither is
shown to a reader. Blocks in a language other than ``python`` and ``sh`` are not run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from markdown_it import MarkdownIt

from fastsde.cli import main

__all__ = ["LANGUAGES", "Block", "blocks", "run"]

LANGUAGES = {"python", "sh", "text", "toml", "yaml", "bibtex", "json", "c++"}
_REPLACE = re.compile(r"<!-- in tests: (.+?) -> (.*?) ?-->")
_LEAVE_OUT = re.compile(r"<!-- not in tests: (.+?) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the line of its first line of code (from 1), and its code as the tests run it."""

    language: str
    line: int
    code: str
    left_out: str = ""  # the reason


def blocks(document: Path) -> list[Block]:
    """Returns the code blocks of a document.

    Raises:
        ValueError: for a block without a known language, a replacement of text that the block does not have, or a
            fence that is no block of its own, such as an indented one.
    """
    text = document.read_text()
    found, comments = [], ""
    for token in MarkdownIt().parse(text):
        if token.type == "html_block":
            comments += token.content
        elif token.type == "fence":
            assert token.map is not None
            line = token.map[0] + 2
            if token.info.split(" ")[0] not in LANGUAGES:
                raise ValueError(f"{document}:{line}: the block's language is {token.info!r}, not one of {LANGUAGES}")
            code = token.content
            for old, new in _REPLACE.findall(comments):
                if old not in code:
                    raise ValueError(f"{document}:{line}: the block does not have {old!r}")
                code = code.replace(old, new)
            reason = _LEAVE_OUT.search(comments)
            found.append(Block(token.info.split(" ")[0], line, code, reason[1] if reason else ""))
            comments = ""
        elif token.type.endswith("_open"):
            comments = ""
    fences = len(re.findall(r"^\s*```", text, re.MULTILINE))
    if fences != 2 * len(found):
        raise ValueError(f"{document} has {fences} lines with ``` but {len(found)} blocks that can be run")
    return found


def run(document: Path, folder: Path) -> int:
    """Runs the blocks of a document, which may write into ``folder``, the current one. Returns how many ran."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    ran = 0
    for block in blocks(document):
        if block.left_out or block.language not in ("python", "sh"):
            continue
        ran += 1
        if block.language == "python":
            # Blank lines in front, so that tracebacks name the line of the document.
            exec(compile("\n" * (block.line - 1) + block.code, str(document), "exec"), namespace)
        else:
            _run_in_shell(document, block, folder)
    return ran


def _run_in_shell(document: Path, block: Block, folder: Path) -> None:
    commands = [shlex.split(line, comments=True) for line in block.code.replace("\\\n", " ").splitlines()]
    commands = [command for command in commands if command]
    if all(command[0] == "fastsde" and not {"&&", "|", ">"} & set(command) for command in commands):
        for command in commands:  # in this process, which has imported torch
            done = CliRunner().invoke(main, command[1:], catch_exceptions=False)
            if done.exit_code:
                pytest.fail(f"{document}:{block.line}: {shlex.join(command)}\n{done.output}")
        return
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    shell = ["bash", "-euo", "pipefail", "-c", block.code]
    result = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    if result.returncode:
        pytest.fail(f"{document}:{block.line}: exit code {result.returncode}\n{result.stdout}{result.stderr}")
