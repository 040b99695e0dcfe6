"""Finding a recipe and running it. Knows nothing about what a recipe does."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core import DeepSeekError, InputError, Registry, Report
from ..core.userfile import load_file, told

#: Recipes by name: modules with `def main(*, out: Path, seed: int = 0) -> Report`, or such a function itself.
RECIPES = Registry("recipe", "deepseek_r1.recipes", {"digits": "deepseek_r1.recipes.digits"})


def run_recipe(recipe: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, seed: int = 0) -> Report:
    """Run a recipe, and leave its Report as `report.json` and `report.html` in `out`.

    Args:
        recipe: a name in RECIPES, or the path of a Python file with `def main(*, out, seed=0) -> Report`.
        out: directory for what the recipe writes; `runs/<recipe>` by default.

    Raises:
        PluginError: unknown name; the message has the known ones and the nearest.
        InputError: no such file, no such function in it, one that takes other arguments, fails or gives no Report; or
            `out` is a file.
    """
    name = str(recipe)
    main = _main_of(load_file(name) if name.endswith(".py") else RECIPES.get(name), name)
    folder = Path(out) if out is not None else Path("runs") / Path(name).stem
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give the path of a directory with out= (--out).")
    folder.mkdir(parents=True, exist_ok=True)
    report = _call(main, name, folder, seed)
    if not isinstance(report, Report):
        raise InputError(f"the recipe {name} gave {type(report).__name__}; its main must return a Report.")
    report.note(
        f"next: open {folder / 'report.html'} for the figures; for your own model and data: deepseek-r1 train --help"
    )
    try:
        report.save(folder / "report.json")
        report.save(folder / "report.html")
    except OSError as e:
        e.report = report  # type: ignore[attr-defined]  # the journey's numbers are not lost with its files
        raise
    return report


def _main_of(thing: Any, name: str) -> Callable[..., Any]:
    main = getattr(thing, "main", thing)
    if not callable(main):
        raise InputError(f"the recipe {name} has no main; write: def main(*, out, seed=0) -> Report.")
    found: Callable[..., Any] = main
    try:
        inspect.signature(found).bind(out=Path(), seed=0)
    except TypeError as e:
        given = f"main{inspect.signature(found)}"
        raise InputError(f"the recipe {name} has {given}: {e}; write: def main(*, out, seed=0) -> Report.") from e
    return found


def _call(main: Callable[..., Any], name: str, out: Path, seed: int) -> Any:
    try:
        return main(out=out, seed=seed)
    except DeepSeekError:
        raise
    except (Exception, SystemExit) as e:
        # A recipe that came with a package is no mistake of the user's: its error stays what it is.
        if not name.endswith(".py"):
            raise
        raise InputError(f"the recipe {name} failed: {told(e)}") from e
