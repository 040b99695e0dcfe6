"""`deepseek-r1 cache`: the choices that `optimize` remembers, and the room they take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core import ConfigError, Report
from ._frame import Html, Json, verb


@verb()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all choices.")] = False,
    limit_gb: Annotated[float | None, typer.Option(help="Bound the size from now on; the least used go first.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Another cache than the user's own.")] = None,
    json: Json = None,
    html: Html = None,
) -> Report:
    """Show, bound or clear what optimize remembers: the engine chosen for a model, and its compiled files."""
    from ..engines import ChoiceCache

    if limit_gb is not None and limit_gb < 0:
        raise ConfigError(f"--limit-gb {limit_gb:g}: 0 or more is needed.")
    choices = ChoiceCache(folder)
    report = Report("cache of choices")
    if limit_gb is not None:
        choices.set_limit(int(limit_gb * 1e9))
    if clear:
        report.note(f"removed {choices.clear()} choices")
    total = 0
    for entry in choices.entries():
        total += entry.bytes
        what = f"{entry.engine} {entry.precision}, raced on {entry.raced}, {entry.folder.name}"
        report.add(entry.model, entry.bytes / 1e6, unit="MB", how=what)
    report.facts["folder"] = str(choices.root)
    report.facts["limit"] = f"{choices.limit_bytes / 1e9:g} GB"
    report.facts["used"] = f"{total / 1e6:.3f} MB"
    report.note(
        f"{len(choices.entries())} choices, {total / 1e6:.3f} MB of {choices.limit_bytes / 1e9:g} GB in {choices.root}"
    )
    return report
