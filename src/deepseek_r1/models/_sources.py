"""Where models come from: the registry of sources, and the user's own files. Knows nothing about what is done next."""

from __future__ import annotations

import inspect
import traceback
from pathlib import Path
from typing import Any

import torch

from ..core import DeepSeekError, InputError, Registry
from ..core.userfile import load_file

#: Functions that turn what stands after `scheme:` into a module.
SOURCES = Registry(
    "model source",
    "deepseek_r1.sources",
    {
        "file": "deepseek_r1.models:load_factory",
        "hf": "deepseek_r1.models:load_hf",
        "keras": "deepseek_r1.models:load_keras",
        "onnx": "deepseek_r1.models:load_onnx",
        "tensorflow": "deepseek_r1.models:load_tensorflow",
    },
)


def load_factory(spec: str) -> torch.nn.Module:
    """The module that a function (or a class) without arguments in a user's file builds.

    Args:
        spec: "path/file.py:factory".

    Raises:
        InputError: not of that form, no such file or factory, the factory failed, or gave no torch.nn.Module.

    Example:
        >>> load_factory("absent.py:build")
        Traceback (most recent call last):
        deepseek_r1.core.errors.InputError: absent.py does not exist; give the path of a Python file.
    """
    path, colon, name = str(spec).rpartition(":")
    if not colon or not path or not name:
        raise InputError(f"{spec!r} is not of the form file.py:factory; write for example model.py:build.")
    module = load_file(path)
    factory = getattr(module, name, None)
    if not callable(factory):
        own = [n for n, v in vars(module).items() if inspect.getmodule(v) is module and callable(v)]
        what = "is not callable" if hasattr(module, name) else "does not exist"
        raise InputError(f"{path}: {name!r} {what}; functions and classes there: {', '.join(own) or 'none'}.")
    try:
        model = factory()
    except DeepSeekError:
        raise
    except (Exception, SystemExit) as e:
        raise InputError(f"{spec} failed: {_where(e, Path(path))}{type(e).__name__}: {e}") from e
    if isinstance(model, torch.nn.Module):
        return model
    raise InputError(f"{spec} gave a {_kind(model)}; it must return a torch.nn.Module.")


def _kind(value: Any) -> str:
    return f"class ({value.__name__})" if isinstance(value, type) else type(value).__name__


def _where(error: BaseException, file: Path) -> str:
    """The last line of the user's file that led to the error."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == file.resolve()]
    return f"line {frames[-1].lineno} ({frames[-1].line}): " if frames else ""
