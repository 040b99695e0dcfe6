"""A Report as a table for the terminal."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .report import Report, format_value


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
    parts += [Text(f"note  {note}", style="cyan") for note in report.notes]
    parts += [Text(f"skipped  {what}: {why}", style="yellow") for what, why in report.skipped]
    return Group(*parts)


def text(report: Report, width: int = 110) -> str:
    """The report as plain text."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(render(report))
    return out.getvalue().rstrip()


def show(report: Report) -> None:
    """Print the report on standard output."""
    Console().print(render(report))
