"""The `--help` pages as text, and their place in the documentation.

`python -m deepseek_r1.cli._helppages docs/cli.md` writes the pages into the file's marked blocks anew.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import typer

from . import app

_BLOCK = re.compile(r"(<!-- help:([\w -]*) -->\n```text\n).*?(```\n)", re.DOTALL)


def pages() -> dict[str, str]:
    """Each help page by its command: "" for the whole, "train" and so on."""
    whole = typer.main.get_command(app)
    context = whole.make_context("deepseek-r1", [], resilient_parsing=True)
    found = {"": whole.get_help(context)}
    for name in whole.list_commands(context):  # type: ignore[attr-defined]
        command = whole.get_command(context, name)  # type: ignore[attr-defined]
        below = command.make_context(name, [], parent=context, resilient_parsing=True)
        found[name] = command.get_help(below)
    return found


def refresh(text: str) -> str:
    """A document with every marked block made anew.

    Raises:
        KeyError: a block is marked for a command that does not exist.
    """
    known = pages()
    return _BLOCK.sub(lambda m: m[1] + known[m[2].strip()] + "\n" + m[3], text)


if __name__ == "__main__":
    for _name in sys.argv[1:]:
        Path(_name).write_text(refresh(Path(_name).read_text()))
