"""Names from the user's own Python files, given as `file.py:name`. Knows nothing about what the name stands for.

A user's file is run as `python file.py` would run it: its own directory can be imported from.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import DeepSeekError, InputError

#: Modules of users' files have names that begin so.
_PREFIX = "_dr1_"
_PACKAGE = Path(__file__).resolve().parents[1]
_STDLIB = Path(sysconfig.get_paths()["stdlib"]).resolve()


def load_file(path: str | os.PathLike[str]) -> ModuleType:
    """Run a Python file and give the module.

    Raises:
        InputError: there is no such file, or it failed; the message has its line.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file} does not exist; give the path of a Python file.")
    # A name made of the whole path: two users' `model.py` must not overwrite each other in sys.modules.
    name = f"{_PREFIX}{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InputError(f"{file} is no Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except DeepSeekError:
        sys.modules.pop(name, None)
        raise
    except (Exception, SystemExit) as e:
        sys.modules.pop(name, None)
        raise InputError(f"{file} could not be run: {type(e).__name__}{_line(e, file)}: {e}") from e
    return module


def load_attribute(spec: str, *, example: str) -> Any:
    """What `file.py:name` stands for.

    Args:
        example: a right spec, for the message ("model.py:build").

    Raises:
        InputError: not of that form, no such file, the file failed, or it has no such name (the nearest is said).
    """
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py") or not name:
        raise InputError(f"{spec!r} is not of the form file.py:name; write for example {example}.")
    module = load_file(path)
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        near = difflib.get_close_matches(name, public, n=1)
        hint = f" Did you mean {path}:{near[0]}?" if near else ""
        raise InputError(f"{path} has no {name!r}.{hint} Write for example {example}.")
    return getattr(module, name)


def place(error: BaseException) -> str:
    """The last line of the user's own code that led to an error, as "file.py, line 3 (return self.x)"; or "".

    The user's own code is what `load_file` ran and what lies in the same folder, save installed packages.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename).resolve()
        if not frame.filename.startswith("<") and _is_own(file):
            code = f" ({frame.line})" if frame.line else ""
            return f"{_short(file)}, line {frame.lineno}{code}"
    return ""


def told(error: BaseException) -> str:
    """An error's kind and message on one line, with the place in the user's code where there is one.

    Example:
        >>> told(KeyError("x"))
        "KeyError: 'x'"
    """
    kind = "sys.exit was called" if isinstance(error, SystemExit) else type(error).__name__
    text = " ".join(str(error).split())
    return ": ".join(part for part in (place(error), kind, text) if part)


def _is_own(file: Path) -> bool:
    if "site-packages" in file.parts or file.is_relative_to(_PACKAGE) or file.is_relative_to(_STDLIB):
        return False
    folders = {Path(str(m.__file__)).resolve().parent for n, m in list(sys.modules.items()) if n.startswith(_PREFIX)}
    return any(file.is_relative_to(folder) for folder in folders)


def _short(file: Path) -> str:
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


def _line(error: BaseException, file: Path) -> str:
    if isinstance(error, SyntaxError):
        return f" in line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).resolve() == file.resolve()]
    return f" in line {lines[-1]}" if lines else ""
