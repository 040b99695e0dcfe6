"""`deepseek-r1 run`: a recipe by name or file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core import Report
from ._frame import Html, Json, Seed, verb


@verb()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (digits), or a file.py with main(*, out, seed).")],
    out: Annotated[Path | None, typer.Option(help="Folder for what it writes; runs/<recipe> by default.")] = None,
    seed: Seed = 0,
    json: Json = None,
    html: Html = None,
) -> Report:
    """Run a recipe: a whole journey, data to artifact.

    Its report is also written to --out, as report.json and report.html.
    """
    from ..recipes import run_recipe

    return run_recipe(recipe, out=out, seed=seed)
