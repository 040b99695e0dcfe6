"""A Report as a table for the terminal."""

from __future__ import annotations

import io
import os
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .report import Report, format_value

#: Columns where there is no terminal to ask.
_WIDTH = 110


def render(report: Report) -> Any:
    """The report as something rich can print."""
    parts: list[Any] = []
    if report.rows:
        table = Table(title=escape(report.title), title_justify="left", title_style="bold", expand=False)
        table.add_column("metric")
        has_before = any(row.before is not None for row in report.rows)
        if has_before:
            table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        table.add_column("unit")
        table.add_column("how measured", style="dim")
        for row in report.rows:
            cells = [row.metric] + ([format_value(row.before)] if has_before else [])
            table.add_row(*map(escape, [*cells, format_value(row.after), row.unit, row.how]))
        parts.append(table)
    else:
        parts.append(Text(report.title, style="bold"))
    for check in report.checks:
        mark, style = ("pass", "green") if check.passed else ("FAIL", "bold red")
        line = Text(f"{mark}  ", style=style)
        line.append(check.name, style="default")
        if check.detail:
            line.append(f": {check.detail}", style="default")
        parts.append(line)
    parts += [Text(f"skipped  {what}: {why}", style="yellow") for what, why in report.skipped]
    parts += [Text(f"note  {note}", style="cyan") for note in report.notes]
    return Group(*parts)


def text(report: Report, width: int = _WIDTH) -> str:
    """The report as plain text."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(render(report))
    return out.getvalue().rstrip()


def show(report: Report) -> None:
    """Print the report on standard output."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=_WIDTH)
    console.print(render(report))
