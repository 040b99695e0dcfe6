"""What a search has found out so far, kept in a file: after an interruption it goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core import atomic

SCHEMA_VERSION = 1


class Findings:
    """Named values that are costly to find, in one JSON file.

    Args:
        folder: of all searches.
        key: what the values hang on; another key is another file.

    Attributes:
        reused: how many values were read from the file instead of found anew.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / f"{key[:32]}.json"
        self._values: dict[str, Any] = {}
        self.reused = 0
        try:
            stored = json.loads(self.path.read_text())
            if stored.get("schema_version") == SCHEMA_VERSION and stored.get("key") == key:
                self._values = dict(stored["values"])
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            # Absent, cut off or not ours: it is found out anew.
            self._values = {}
        self._key = key

    def get(self, name: str, find: Callable[[], Any]) -> Any:
        """A value of plain JSON, found now if it was not before."""
        if name in self._values:
            self.reused += 1
            return self._values[name]
        self._values[name] = find()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(self.path, {"schema_version": SCHEMA_VERSION, "key": self._key, "values": self._values})
        return self._values[name]


def fingerprint(parts: Iterable[str], batches: Sequence[Sequence[Any]]) -> str:
    """A hash of texts and of the tensors of some batches."""
    digest = hashlib.sha256("\0".join(parts).encode())
    for batch in batches:
        for value in batch:
            if isinstance(value, torch.Tensor):
                digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest()
