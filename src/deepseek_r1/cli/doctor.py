"""`deepseek-r1 doctor`, and the command `ds-doctor`. Works where torch is absent or broken."""

from __future__ import annotations

from typing import Annotated

import typer

from ..core import Report
from ..core.doctor import examine
from ._frame import Html, Json, new_app, verb

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "not installed": "bright_black"}


def _lines(report: Report) -> None:
    for row in report.rows:
        state = typer.style(f"{row.after:<15}", fg=_COLOURS[row.after])
        typer.echo(f"{state}{row.metric:<15}{row.how}")


@verb(show=_lines)
def doctor(
    check_compatibility: Annotated[
        bool,
        typer.Option("--check-compatibility", help="Also import torch and compute on the CPU and on each GPU."),
    ] = False,
    json: Json = None,
    html: Html = None,
) -> Report:
    """Look at this machine: a verdict and a fix a line.

    Exit code 1 if something is wrong.
    """
    return examine(check_compatibility)


def main() -> None:
    """Entry point of `ds-doctor`."""
    app = new_app()
    app.command()(doctor)
    app(prog_name="ds-doctor")
