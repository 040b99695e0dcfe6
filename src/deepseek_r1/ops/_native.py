"""This package's own C++ operators: compiled for this machine at their first use, and kept for the next process."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from ..core import DeepSeekError, probe
from ..core.places import user_cache
from ._build import build_op, include_dir, plan
from ._library import Library, own_machine
from ._register import libraries, register_custom_op

_FOLDER = Path(__file__).resolve().parent / "native"
_SOURCE = _FOLDER / "integer_linear.cc"
#: Activations are rounded as torch rounds them, which a product and a sum in one step would not do.
_FLAGS = ("-ffp-contract=off",)
#: Libraries of other releases and compilers that stay.
_KEPT = 8
#: What the library has.
OPERATORS = ("int8_dynamic_linear", "int4_dynamic_linear")
_BUSY = threading.Lock()


def native_folder() -> Path:
    """Where the compiled libraries are.

    Example:
        >>> native_folder().name
        'kernels'
    """
    return user_cache() / "kernels"


def native_library(folder: str | os.PathLike[str] | None = None) -> Path:
    """The library of this package's kernels for this machine; compiled if it is not in `folder` yet.

    Raises:
        MissingCompilerError: it must be compiled and there is no compiler; the message says what to install.
        BuildError: it does not compile.
    """
    place = native_folder() if folder is None else Path(folder)
    library = place / f"{_key()}.so"
    if not _is_whole(library):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        build_op(_SOURCE, library, flags=_FLAGS)
        _forget(place, library)
    return library


def _load() -> str:
    try:
        library = native_library()
        for name in Library(library).ops:
            register_custom_op(name, library)
    except (DeepSeekError, OSError) as e:
        return str(e)
    return ""


def native_missing() -> str:
    """Why this package's kernels cannot be compiled here; empty if there is a compiler. Compiles nothing."""
    try:
        _command()
    except DeepSeekError as e:
        return str(e)
    return ""


def native_problem() -> str:
    """Why this package's kernels cannot run here; empty if they can. Compiles and loads them the first time."""
    with _BUSY:
        # A process keeps the library that it has.
        return "" if all(name in libraries() for name in OPERATORS) else _load()


def _command() -> tuple[str, ...]:
    return plan(_SOURCE, None, cuda=False, target=None, march=None, compiler=None, flags=_FLAGS).command


def _key() -> str:
    """Of the sources, the compiler and the processor: a library for another one would end the process."""
    command = _command()
    compiler = Path(command[0]).resolve()
    about = [*command[1:-1], str(compiler), str(compiler.stat().st_mtime_ns), own_machine(), *probe().isa]
    digest = hashlib.sha256("\0".join(about).encode())
    for source in sorted([*_FOLDER.iterdir(), *include_dir().rglob("*.h")]):
        digest.update(source.read_bytes())
    return f"{_SOURCE.stem}-{digest.hexdigest()[:24]}"


def _is_whole(library: Path) -> bool:
    """Whether it is there, this user's, and opens."""
    if not library.is_file() or (hasattr(os, "geteuid") and library.stat().st_uid != os.geteuid()):
        return False
    try:
        Library(library)
    except DeepSeekError:
        return False
    return True


def _forget(place: Path, new: Path) -> None:
    others = sorted((f for f in place.glob("*.so") if f != new), key=lambda f: f.stat().st_mtime, reverse=True)
    for old in others[_KEPT:]:
        old.unlink(missing_ok=True)
