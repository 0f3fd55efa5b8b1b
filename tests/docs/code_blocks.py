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
from markdown_it.token import Token

from fastsde.cli import main

__all__ = ["LANGUAGES", "Block", "blocks", "run"]

LANGUAGES = {"python", "sh", "text", "toml", "yaml", "bibtex", "json", "c++"}
_REPLACE = re.compile(r"<!-- in tests: (.+?) -> (.*?) ?-->")
_LEAVE_OUT = re.compile(r"<!-- not in tests: (.+?) -->")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_MEANT = re.compile(r"\bin\s+tests?\b|\btests?:", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the line of its first line of code (from 1), and its code as the tests run it."""

    language: str
    line: int
    code: str
    left_out: str = ""  # the reason

    @property
    def is_run(self) -> bool:
        return not self.left_out and self.language in ("python", "sh")


def blocks(document: Path) -> list[Block]:
    """Returns the code blocks of a document.

    Raises:
        ValueError: for a block without a known language, a replacement of text that the block does not have, a comment
            that is misspelt or not in front of a block, or a fence that is no block of its own, such as an indented
            one.
    """
    text, comments = document.read_text(), []
    found: list[Block] = []
    for token in MarkdownIt().parse(text):
        if token.type == "fence":
            found.append(_block(document, token, comments))
            comments = []
        elif token.type == "html_block":
            comments += _meant(token)
        elif comments:
            break
        elif token.type == "inline":
            comments += [comment for child in token.children or () for comment in _meant(child)]
    if comments:
        raise ValueError(f"{document} has {comments[0]!r}, which is not in front of a block")
    fences = len(re.findall(r"^\s*```", text, re.MULTILINE))
    if fences != 2 * len(found):
        raise ValueError(f"{document} has {fences} lines with ``` but {len(found)} blocks that can be run")
    return found


def _meant(token: Token) -> list[str]:
    """Returns the comments in HTML that are about the tests, as far as one can tell if they are misspelt."""
    comments = _COMMENT.findall(token.content) if token.type.startswith("html") else []
    return [comment for comment in comments if _MEANT.search(comment)]


def _block(document: Path, token: Token, comments: list[str]) -> Block:
    """Returns the block of a fence, changed as the comments in front of it say."""
    assert token.map is not None
    language, line, code, reason = token.info.split(" ")[0], token.map[0] + 2, token.content, ""
    if language not in LANGUAGES:
        raise ValueError(f"{document}:{line}: the block's language is {token.info!r}, not one of {LANGUAGES}")
    for comment in comments:
        if left_out := _LEAVE_OUT.fullmatch(comment):
            reason = left_out[1]
        elif replaced := _REPLACE.fullmatch(comment):
            if replaced[1] not in code:
                raise ValueError(f"{document}:{line}: the block does not have {replaced[1]!r}")
            code = code.replace(replaced[1], replaced[2])
        else:
            raise ValueError(f"{document}:{line}: {comment!r} is neither a replacement nor a reason to leave it out")
    return Block(language, line, code, reason)


def run(document: Path, folder: Path) -> int:
    """Runs the blocks of a document, which may write into ``folder``, the current one. Returns how many ran."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    to_run = [block for block in blocks(document) if block.is_run]
    for block in to_run:
        if block.language == "python":
            # Blank lines in front, so that tracebacks name the line of the document.
            exec(compile("\n" * (block.line - 1) + block.code, str(document), "exec"), namespace)
        else:
            _run_in_shell(document, block, folder)
    return len(to_run)


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
