"""Files that are either wholly there or not there at all.

A file is written under a temporary name beside its target, flushed to the disk, then renamed. A crash, a full
disk or Ctrl-C leaves the previous file as it was. This module knows nothing about what is inside the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_UMASK = threading.Lock()


def _fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _fsync_file(path: Path) -> None:
    with path.open("rb+") as f:
        os.fsync(f.fileno())


def _umask() -> int:
    # It can only be read by setting it. Two threads that do so at a time would leave one's value behind.
    with _UMASK:
        umask = os.umask(0o077)
        os.umask(umask)
    return umask


@contextlib.contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Errors of the file system name the target: nobody has heard of the temporary name beside it."""
    try:
        yield
    except OSError as e:
        about_us = e.filename is None or f".{target.name}." in str(e.filename)
        if e.errno is None or not about_us:
            raise
        raise OSError(e.errno, e.strerror, str(target)) from e


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to; on success it becomes `path`, on any error it is removed.

    Raises:
        OSError: as the file system gives it (disk full, no permission). `path` is then unchanged.

    Example:
        >>> with atomic_path("/tmp/_atomic_doc.txt") as tmp:
        ...     _ = tmp.write_text("whole")
        >>> Path("/tmp/_atomic_doc.txt").read_text()
        'whole'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _naming(target):
        fd, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(fd)
        tmp = Path(name)
        try:
            yield tmp
            _fsync_file(tmp)
            tmp.chmod(0o666 & ~_umask())
            os.replace(tmp, target)
            _fsync_dir(target.parent)
        finally:
            tmp.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_path(path) as tmp:
        tmp.write_bytes(data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as readable JSON to `path`, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary directory to fill; on success it replaces `path`, on any error it is removed.

    An existing directory at `path` is set aside first and deleted only after the new one stands.

    Raises:
        OSError: as the file system gives it. What stood at `path` before is then back in its place.
        FileExistsError: if `path` is an existing file.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; give the path of a directory, or remove the file first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    recover_dir(target)
    with _naming(target), _filled_dir(target) as tmp:
        yield tmp


@contextlib.contextmanager
def _filled_dir(target: Path) -> Iterator[Path]:
    tmp = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    old = target.parent / f".{target.name}.old"
    try:
        yield tmp
        for file in tmp.rglob("*"):
            if file.is_file():
                _fsync_file(file)
        _fsync_dir(tmp)
        tmp.chmod(0o777 & ~_umask())
        if target.exists():
            # A kill may have left one; nothing can be renamed onto it.
            remove_dir(old)
            os.replace(target, old)
        try:
            os.replace(tmp, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
        _fsync_dir(target.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        if target.exists():
            remove_dir(old)


def remove_dir(path: str | os.PathLike[str]) -> None:
    """Delete a directory, if it is there: a kill leaves all of it under its name, or nothing.

    What cannot be deleted stays, without an error; under a hidden name that ends in `.tmp`, if that can be given.
    """
    target = Path(path)
    doomed = target.parent / f".{target.name.lstrip('.')}.gone.tmp"
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.replace(target, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def recover_dir(path: str | os.PathLike[str]) -> None:
    """Put back a directory that a kill between the two renames of `atomic_dir` left set aside."""
    target = Path(path)
    old = target.parent / f".{target.name}.old"
    if old.exists() and not target.exists():
        os.replace(old, target)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
