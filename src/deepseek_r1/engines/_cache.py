"""The cache of choices: which engine won for which model on which machine, with its compiled files.

An entry is a directory that is made whole under another name and then renamed, so that two processes may write at once
and a kill leaves no half of one. What is damaged is discarded. Entries are opened by this user only: compiled files
may hold machine code.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..core import ArtifactError, ConfigError, Report, atomic
from ..core.manifest_json import parse
from ..core.places import user_cache
from ..graph import Signature

SCHEMA_VERSION = 1
KIND = "deepseek-r1 cached choice"
DEFAULT_LIMIT_BYTES = 10 * 10**9
_ABOUT, _SETTINGS, _FILES = "entry.json", "settings.json", "files"
_OLD_SECONDS = 86_400


def default_root() -> Path:
    """The directory of the user's own choices."""
    return user_cache() / "choices"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A remembered choice.

    Attributes:
        folder: its directory; the engine's files are in `files`.
        source: "own" if the winner runs the program itself, "parent" if it runs its float parent.
        raced: when, as ISO 8601.
    """

    folder: Path
    model: str
    engine: str
    precision: str
    source: str
    signature: Signature
    raced: str

    @property
    def files(self) -> Path:
        """What the engine built."""
        return self.folder / _FILES

    @property
    def bytes(self) -> int:
        """Bytes on the disk."""
        return _bytes(self.folder)

    def report(self) -> Report:
        """What the race measured."""
        return Report.load(self.folder / "report.json")


class ChoiceCache:
    """A directory of entries, bounded in size; the least recently used go first.

    Example:
        >>> import tempfile
        >>> cache = ChoiceCache(tempfile.mkdtemp())
        >>> cache.entries(), cache.limit_bytes
        ([], 10000000000)
    """

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = default_root() if root is None else Path(root)

    @property
    def limit_bytes(self) -> int:
        """How large it may grow."""
        try:
            return int(json.loads((self.root / _SETTINGS).read_text())["limit_bytes"])
        except (OSError, ValueError, KeyError, TypeError):
            return DEFAULT_LIMIT_BYTES

    def set_limit(self, limit_bytes: int) -> None:
        """Bound its size from now on; what is too much leaves at once. Raises ConfigError for a negative limit."""
        if limit_bytes < 0:
            raise ConfigError(f"a cache limit of {limit_bytes} bytes: 0 or more is needed.")
        self._make_root()
        atomic.write_json(self.root / _SETTINGS, {"limit_bytes": int(limit_bytes)})
        self._evict()

    def _make_root(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def find(self, key: str) -> Entry | None:
        """The entry for a key, None if there is none.

        Raises:
            ArtifactError: there is one, and it is damaged, of another version or of another user.
        """
        folder = self.root / key
        if not folder.is_dir():
            return None
        entry = _read(folder)
        (folder / _ABOUT).touch()
        return entry

    def put(self, key: str, files: Path | None, report: Report, **about: Any) -> None:
        """Add an entry; if another process was first, its entry stays.

        Args:
            files: directory of the engine's files; None if it needs none.
            about: model, engine, precision, source, signature.
        """
        self._make_root()
        with tempfile.TemporaryDirectory(prefix=".new-", dir=self.root, ignore_cleanup_errors=True) as temporary:
            new = Path(temporary) / key
            new.mkdir()
            if files is None:
                (new / _FILES).mkdir()
            else:
                shutil.copytree(files, new / _FILES)
            report.save(new / "report.json")
            signature: Signature = about.pop("signature")
            text = signature.to_json()
            stamps = {str(f.relative_to(new)): _stamp(f) for f in sorted(new.rglob("*")) if f.is_file()}
            about |= {"signature": text, "raced": datetime.now(UTC).isoformat(timespec="seconds"), "files": stamps}
            atomic.write_json(new / _ABOUT, {"kind": KIND, "schema_version": SCHEMA_VERSION, **about})
            for file in new.rglob("*"):
                if file.is_file():
                    _sync(file)
            try:
                os.rename(new, self.root / key)
            except OSError:
                if not (self.root / key).is_dir():
                    raise
        self._evict(keep=key)

    def discard(self, key: str) -> None:
        """Remove an entry; nothing happens if there is none."""
        folder = self.root / key
        # It vanishes in one step; deleting file by file would show others half of it.
        gone = Path(tempfile.mkdtemp(prefix=".gone-", dir=self.root)) if folder.exists() else None
        if gone is not None:
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, gone / key)
            shutil.rmtree(gone, ignore_errors=True)

    def entries(self) -> list[Entry]:
        """All entries that can be read, the most recently used first."""
        found = []
        for folder in self._folders():
            try:
                found.append(_read(folder, verify=False))
            except ArtifactError:
                continue
        return found

    def _folders(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        folders = [f for f in self.root.iterdir() if f.is_dir() and not f.name.startswith(".")]
        return sorted(folders, key=_used, reverse=True)

    def clear(self) -> int:
        """Remove everything; returns how many entries there were."""
        folders = self._folders()
        for folder in folders:
            self.discard(folder.name)
        self._sweep(0)
        return len(folders)

    def _evict(self, keep: str = "") -> None:
        total = 0
        for folder in sorted(self._folders(), key=lambda f: f.name != keep):
            total += _bytes(folder)
            if total > self.limit_bytes:
                self.discard(folder.name)
        self._sweep(_OLD_SECONDS)

    def _sweep(self, older_than_s: float) -> None:
        """Remove what killed processes left."""
        for folder in self.root.glob(".*-*") if self.root.is_dir() else ():
            if folder.is_dir() and time.time() - _used(folder) >= older_than_s:
                shutil.rmtree(folder, ignore_errors=True)


def _used(folder: Path) -> float:
    for path in (folder / _ABOUT, folder):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return 0.0


def _bytes(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total


def _sync(file: Path) -> None:
    with file.open("rb+") as f:
        os.fsync(f.fileno())


def _stamp(file: Path) -> list[Any]:
    about = file.stat()
    return [about.st_size, about.st_mtime_ns, atomic.sha256_file(file)]


def _read(folder: Path, verify: bool = True) -> Entry:
    if hasattr(os, "geteuid") and folder.stat().st_uid != os.geteuid():
        raise ArtifactError(f"{folder} belongs to another user; compiled files of others are not opened.")
    try:
        text = (folder / _ABOUT).read_bytes()
        about = parse(text, str(folder / _ABOUT), kind=KIND, schema_version=SCHEMA_VERSION)
        if verify:
            _verify(folder, about["files"])
        return Entry(
            folder=folder, model=about["model"], engine=about["engine"], precision=about["precision"],
            source=about["source"], signature=Signature.from_json(about["signature"]), raced=about["raced"],
        )  # fmt: skip
    except ArtifactError:
        raise
    except Exception as e:  # whatever a damaged description leads to
        raise ArtifactError(f"{folder} is damaged: {type(e).__name__}: {e}") from e


def _verify(folder: Path, stamps: dict[str, list[Any]]) -> None:
    """Sizes and times always; the content where the time is not the one that was written, as a full hash is slow."""
    there = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - {_ABOUT}
    if there != set(stamps):
        raise ArtifactError(f"{folder} lacks or has unknown files: {sorted(there ^ set(stamps))}.")
    for name, (size, changed, digest) in stamps.items():
        about = (folder / name).stat()
        if about.st_size != size or (about.st_mtime_ns != changed and atomic.sha256_file(folder / name) != digest):
            raise ArtifactError(f"{folder / name} was altered or truncated.")
