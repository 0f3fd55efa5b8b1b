"""Writes docs/reference/cli.md: the help of the command and of its subcommands, as click knows it.

python tools/command_line.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from fastsde.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "cli.md"
_START = """# Command line

`fastsde COMMAND`, or `python -m fastsde COMMAND` under torchrun. Results go to stdout, everything else to stderr. The
exit code is 0, 1 after an error, 2 for wrong usage and 130 after Ctrl-C. `-h` and `--help` show these texts.

<!-- Written by tools/command_line.py: change fastsde/cli, and run it. -->
"""


def page() -> str:
    """Returns the page."""
    names = main.commands
    table = ["| command | what it does |", "| --- | --- |"]
    table += [f"| [`fastsde {name}`](#fastsde-{name}) | {_text(names[name]).splitlines()[0]} |" for name in names]
    return "\n".join([_START, *table, *(line for command in names.values() for line in _section(command))]) + "\n"


def _section(command: click.Command) -> Iterator[str]:
    """Yields the lines of a command: what it does, how it is called, and its options."""
    context = click.Context(command, info_name=f"fastsde {command.name}")
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield from ("", f"## fastsde {command.name}", "", _text(command), "", "```text", usage, "```", "")
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            yield _option(option)


def _text(command: click.Command) -> str:
    """Returns a command's help in Markdown, one line a paragraph."""
    paragraphs = (command.help or "").replace("\b", "").split("\n\n")
    return "\n\n".join(" ".join(_escaped(each).split()) for each in paragraphs)


def _option(option: click.Option) -> str:
    """Returns the line of an option: its names, its values, its help and its default."""
    names = ", ".join(f"`{name}`" for name in option.opts)
    if option.secondary_opts:
        names += f" / `{option.secondary_opts[0]}`"
    text, _, default = _escaped(option.help or "").partition("[default: ")
    default = default.strip().removesuffix("]")
    if not default and option.show_default and not option.is_flag and option.default is not None:
        default = f"`{option.default}`"
    parts = [text.strip(), f"Default: {default}." if default else ""]
    return f"- {names}{_values(option)}: {' '.join(part for part in parts if part)}".rstrip(": ")


def _values(option: click.Option) -> str:
    """Returns what values an option takes, in parentheses; nothing for a flag."""
    kind = option.type
    if option.is_flag:
        return ""
    if isinstance(kind, click.Choice):
        return f" (one of {', '.join(f'`{choice}`' for choice in kind.choices)})"
    if option.metavar:
        return f" `{option.metavar}`"
    what = {"integer range": "integer", "float range": "number", "float": "number"}.get(kind.name, kind.name)
    if isinstance(kind, (click.IntRange, click.FloatRange)) and kind.min is not None:
        what += f" {'above' if kind.min_open else 'of at least'} {kind.min:g}"
    return f" ({what})"


def _escaped(text: str) -> str:
    """Returns text in which option names are code, so that Markdown makes no dashes of them."""
    return re.sub(r"(?<![\w`-])(--[a-z][a-z-]*)", r"`\1`", text)


if __name__ == "__main__":
    PAGE.write_text(page())
