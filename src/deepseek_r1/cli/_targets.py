"""Whether what a verb shall write can be written, asked before its work starts. Imports nothing heavy.

What is found out only after the work would waste hours of training.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..core import InputError
from ..core.artifact import is_artifact


def check_report(option: str, name: str, ending: str = "") -> None:
    """Raise InputError unless a report can be written to the file `name`."""
    if not name:
        raise InputError(f"{option} {name!r}: no name was given; give the name of a file{_DASH.get(option, '')}.")
    path = Path(name)
    if path.is_dir():
        raise InputError(f"{option} {name}: that is a directory; give the name of a file.")
    if not name.endswith(ending):
        raise InputError(f"{option} {name}: the name must end in {ending}.")
    _check_file(option, path)


_DASH = {"--json": ", or - for standard output"}


def check_out(out: Path, endings: tuple[str, ...] | None) -> None:
    """Raise InputError unless a verb's result can be written to `out`.

    Args:
        endings: of the files that the verb can write, and "" for an artifact's folder; None: any folder.
    """
    if endings is None:
        _check_folder(out)
        return
    if out.suffix not in endings:
        files = " or ".join(f"a name ending in {e}" for e in endings if e)
        folder = ", or a folder's name without an ending," if "" in endings else ""
        raise InputError(f"--out {out}: {files}{folder} is needed.")
    if out.suffix:
        if out.is_dir():
            raise InputError(f"--out {out}: that is a directory; give the name of a file.")
        _check_file("--out", out)
        return
    _check_folder(out)
    if out.is_dir() and any(out.iterdir()) and not is_artifact(out):
        raise InputError(f"--out {out}: the folder has other things in it; give a new folder, or an artifact's.")


def _check_file(option: str, path: Path) -> None:
    if path.exists() and not path.is_file():
        raise InputError(f"{option} {path}: that is no ordinary file; give another name.")
    _check_parent(option, path, path.parent)


def _check_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path}: that is a file; give the name of a folder.")
    _check_parent("--out", path, path)


def _check_parent(option: str, path: Path, folder: Path) -> None:
    """What exists of `folder` must be a folder in which files and folders can be made."""
    there = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    if not there.is_dir():
        raise InputError(f"{option} {path}: {there} is a file, so nothing can be in it; give another name.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: {there} cannot be written to; give another place, or its permissions.")
