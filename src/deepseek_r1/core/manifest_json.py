"""The first look at a JSON description from outside: is it one, of which kind and version, and unaltered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from .errors import ArtifactError


def parse(text: str | bytes, where: str, *, kind: str, schema_version: int) -> dict[str, Any]:
    """The description in `text`, which must be of `kind` and of a version that this release reads.

    Raises:
        ArtifactError: damaged, of another kind, or of a later version; the message begins with `where`.

    Example:
        >>> parse('{"kind": "box", "schema_version": 1}', "box.json", kind="box", schema_version=1)["kind"]
        'box'
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ArtifactError(f"{where} is damaged (no JSON: {e}); write it again.") from e
    if not isinstance(data, dict) or data.get("kind") != kind:
        raise ArtifactError(f"{where} does not describe a {kind}.")
    version = data.get("schema_version")
    if not isinstance(version, int) or version > schema_version:
        raise ArtifactError(
            f"{where} has schema version {version!r}; this release reads up to {schema_version}. Update deepseek-r1."
        )
    return data


def digest(data: Mapping[str, Any]) -> str:
    """SHA-256 over a description without its own entry `digest`."""
    kept = {k: v for k, v in data.items() if k != "digest"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def check_digest(data: Mapping[str, Any], where: str) -> None:
    """Raise ArtifactError if a description was altered after its digest was taken."""
    if data.get("digest") != digest(data):
        raise ArtifactError(f"{where} was altered after it was written (its digest does not match).")
