"""Names from the user's own Python files, given as `file.py:name`. Knows nothing about what the name stands for.

A user's file is run as `python file.py` would run it: its own directory can be imported from.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import DeepSeekError, InputError


def load_file(path: str | os.PathLike[str]) -> ModuleType:
    """Run a Python file and give the module.

    Raises:
        InputError: there is no such file, or it failed; the message has its line.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file} does not exist; give the path of a Python file.")
    # A name made of the whole path: two users' `model.py` must not overwrite each other in sys.modules.
    name = f"_dr1_{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
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
    except Exception as e:
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


def _line(error: Exception, file: Path) -> str:
    if isinstance(error, SyntaxError):
        return f" in line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).resolve() == file.resolve()]
    return f" in line {lines[-1]}" if lines else ""
