"""The log of a run on disk: `log.jsonl`, one JSON object a line, and TensorBoard event files. Knows no training."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..core import ConfigError, atomic
from ._events import EventFile

NAME = "log.jsonl"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; what a kill cut off in the middle of a line is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found


class RunLog:
    """Appends to the log in a directory. A disk that refuses ends the logging with a warning, not the run.

    Args:
        folder: the directory, made if it is not there.
        step: the step that the run stands at; the log goes on behind it.
        keep: whether an entry that is already there belongs to this run's past; None: all up to `step` do, and later
            ones are refused.

    Attributes:
        refused: why the log ended early; empty if it did not.

    Raises:
        ConfigError: the directory cannot be written to, or has a log of another run that went further.
    """

    def __init__(self, folder: Path, step: int, keep: Callable[[Mapping[str, Any]], bool] | None) -> None:
        self.refused = ""
        path = folder / NAME
        there = read_lines(path)
        later = max((entry["step"] for entry in there), default=0)
        if keep is None and later > step:
            raise ConfigError(
                f"log_dir has the log of another run in {path}, up to step {later}, beyond this one's step {step}. "
                "Call trainer.resume() to go on with that run, or give an empty log_dir."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if there or path.exists():
                kept = there if keep is None else [entry for entry in there if keep(entry)]
                atomic.write_bytes(path, b"".join(_line(entry) for entry in kept))
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            self._events = EventFile(folder, first_step=step + 1 if there else None)
        except OSError as e:
            raise ConfigError(f"log_dir {folder} cannot be written to: {e}. Give another directory.") from e

    def write(self, entry: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        """Append one line, and the scalars by tag to the event file."""
        if self.refused:
            return
        entry = {**entry, "time": round(time.time(), 3)}
        try:
            line = _line(entry)
            if os.write(self._file, line) != len(line):
                raise OSError("only a part of the line could be written (disk full?)")
            self._events.add(int(entry["step"]), scalars, entry["time"])
        except OSError as e:
            self.refused = f"the disk refused step {entry['step']}: {e}"
            warnings.warn(f"the log ends here, training goes on: {self.refused}", RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        """Close the files."""
        os.close(self._file)
        self._events.close()


def _line(entry: Mapping[str, Any]) -> bytes:
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode()
