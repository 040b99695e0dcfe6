"""The Artifact: a directory that holds a model ready to run, and the reader that trusts none of it.

    manifest.json   what the files are, their hashes, the model's inputs and outputs, how to prepare data
    model.onnx ...  the files themselves
    report.json     what was measured when it was made

Every file is named in the manifest with its size and SHA-256, and the manifest carries a digest of itself. Nothing in
an artifact is ever unpickled. The digest tells damage and careless edits; it is no signature against a forger.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import atomic
from .errors import ArtifactError
from .manifest_json import check_digest, digest, parse
from .report import Report

SCHEMA_VERSION = 1
KIND = "deepseek-r1 artifact"
MANIFEST = "manifest.json"
REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, numpy dtype name and shape of one input or output; a dynamic dimension is its name as a string."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorSpec:
        """The spec that `to_dict` described."""
        return cls(name=data["name"], dtype=data["dtype"], shape=tuple(data["shape"]))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        engine: the runtime that executes the model file ("onnxruntime").
        precision: a name from `core.formats.PRECISIONS`, or "int8-dynamic".
        model_file: the file the engine opens.
        labels: class names in the order of the last output dimension, or None.
        preprocessing: steps from raw input to model input, see `runtime.preprocess`.
        hardware: `Hardware.to_dict()` of the machine that measured the report.
        extra: whatever else serving needs (a tokenizer's file name, the metric's name).
    """

    name: str
    engine: str
    precision: str
    model_file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...] | None = None
    preprocessing: tuple[Mapping[str, Any], ...] = ()
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the files' hashes."""
        return {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "engine": self.engine,
            "precision": self.precision,
            "model_file": self.model_file,
            "inputs": [s.to_dict() for s in self.inputs],
            "outputs": [s.to_dict() for s in self.outputs],
            "labels": None if self.labels is None else list(self.labels),
            "preprocessing": [dict(p) for p in self.preprocessing],
            "hardware": dict(self.hardware),
            "versions": dict(self.versions),
            "extra": dict(self.extra),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """The manifest that `to_dict` described."""
        return cls(
            name=data["name"],
            engine=data["engine"],
            precision=data["precision"],
            model_file=data["model_file"],
            inputs=tuple(TensorSpec.from_dict(s) for s in data["inputs"]),
            outputs=tuple(TensorSpec.from_dict(s) for s in data["outputs"]),
            labels=None if data["labels"] is None else tuple(data["labels"]),
            preprocessing=tuple(data["preprocessing"]),
            hardware=data["hardware"],
            versions=data["versions"],
            extra=data["extra"],
        )


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """An artifact on disk whose files were found whole."""

    path: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        """The file the engine opens."""
        return self.path / self.manifest.model_file

    @property
    def report(self) -> Report:
        """What was measured when the artifact was made."""
        return Report.load(self.path / REPORT)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(f.stat().st_size for f in self.path.iterdir() if f.is_file())


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether `path` looks like an artifact (a directory with a manifest); says nothing about its health."""
    return (Path(path) / MANIFEST).is_file()


def write_artifact(path: str | os.PathLike[str], manifest: Manifest, files: Sequence[Path], report: Report) -> Artifact:
    """Write an artifact: all of it or nothing. An older artifact at `path` is replaced only at the end.

    Args:
        files: files to copy in under their own names; `manifest.model_file` must be among them.

    Raises:
        ArtifactError: `path` is a directory that is no artifact, or the model file is missing from `files`.
        OSError: the disk is full or refuses; what stood at `path` is unchanged.
    """
    target = Path(path)
    names = [f.name for f in files]
    if manifest.model_file not in names:
        raise ArtifactError(f"the model file {manifest.model_file!r} is not among the files to write: {names}.")
    if target.is_dir() and any(target.iterdir()) and not is_artifact(target):
        raise ArtifactError(f"{target} is a directory with other things in it; give a new or an empty one.")
    with atomic.atomic_dir(target) as tmp:
        for file in files:
            shutil.copyfile(file, tmp / file.name)
        atomic.write_json(tmp / REPORT, report.to_dict())
        entries = {
            f.name: {"bytes": f.stat().st_size, "sha256": atomic.sha256_file(f)}
            for f in sorted(tmp.iterdir())
            if f.is_file()
        }
        data = {**manifest.to_dict(), "files": entries}
        data["digest"] = digest(data)
        atomic.write_json(tmp / MANIFEST, data)
    return Artifact(path=target, manifest=manifest)


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Open an artifact and check every file in it.

    Raises:
        ArtifactError: no artifact, a later schema version, a missing, truncated or altered file; the message names it.
    """
    root = Path(path)
    atomic.recover_dir(root)
    if not root.exists():
        raise ArtifactError(f"{root} does not exist; give the directory that an export wrote.")
    if not is_artifact(root):
        raise ArtifactError(f"{root} is no artifact: there is no {MANIFEST} in it.")
    where = str(root / MANIFEST)
    data = parse((root / MANIFEST).read_text(), where, kind=KIND, schema_version=SCHEMA_VERSION)
    check_digest(data, where)
    files = data.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and {"bytes", "sha256"} <= {*e} for e in files.values()
    ):
        raise ArtifactError(f"{root / MANIFEST} lacks or misstates a field: 'files'.")
    for name, entry in files.items():
        _check_file(root, name, entry)
    try:
        manifest = Manifest.from_dict(data)
    except (KeyError, TypeError, AttributeError) as e:
        raise ArtifactError(f"{root / MANIFEST} lacks or misstates a field: {e!r}.") from e
    if manifest.model_file not in files:
        raise ArtifactError(f"{root / MANIFEST} names {manifest.model_file!r}, which is not among its files.")
    return Artifact(path=root, manifest=manifest)


def _check_file(root: Path, name: str, entry: Mapping[str, Any]) -> None:
    if Path(name).name != name or name in ("", ".", ".."):
        raise ArtifactError(f"{root / MANIFEST} names the file {name!r}, which is outside the artifact.")
    file = root / name
    if not file.is_file() or file.is_symlink():
        raise ArtifactError(f"{file} is missing or no plain file; export the model again.")
    size = file.stat().st_size
    if size != entry["bytes"]:
        what = "truncated" if size < entry["bytes"] else "altered"
        raise ArtifactError(f"{file} is {what}: {size:,} bytes instead of {entry['bytes']:,}; export the model again.")
    if atomic.sha256_file(file) != entry["sha256"]:
        raise ArtifactError(f"{file} was altered after it was written (its SHA-256 does not match).")
