"""One checkpoint on disk: a directory, whole or not there, tensors in safetensors and everything else in JSON.

    step-00000120/
        model.safetensors      the model's state dict (a tensor under several names is stored once)
        training.safetensors   optimizer, generators and whatever else has tensors
        state.json             the structure around both
        config.json            the model's own configuration, where it has one
        manifest.json          schema version, step, metrics, SHA-256 of every file

Tensors that training leaves as they are may be left out: state.json then has the shape, type and fingerprint of each
under "frozen", and the manifest (of schema version 2) how many there are under "left_out". What is larger than a shard
goes into several files, model-00001-of-00003.safetensors and so on, with an index beside them in the layout of Hugging
Face. Nothing is pickled. Knows nothing about what the state means.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core import ArtifactError, DeepSeekError, InputError, atomic
from ..core.manifest_json import check_digest, digest, parse
from ._pack import Copy, pack, unpack

#: Version 1 holds every tensor of the model. It is written still where nothing is left out.
SCHEMA_VERSION = 2
KIND = "deepseek-r1 training checkpoint"
MODEL, TRAINING = "model.safetensors", "training.safetensors"
STATE, CONFIG, MANIFEST = "state.json", "config.json", "manifest.json"
#: Bytes of tensors in one file, unless said otherwise.
SHARD_BYTES = 4 * 10**9


class CheckpointError(DeepSeekError, OSError):
    """A checkpoint could not be written (disk full, no permission). What was there before is unharmed."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What goes into a checkpoint, ready to be written.

    Attributes:
        weights, training: the tensors of the model and of everything else, by the names in their files.
        document: the structure around them, plain values only.
        config: the model's own configuration, or None.
        metrics: numbers that judge the state, for retention.
        frozen: what of the model is left out; see `_frozen.Left`.
    """

    step: int
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    document: dict[str, Any]
    config: dict[str, Any] | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    frozen: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def gather(
    model: Mapping[str, Any],
    state: Mapping[str, Any],
    step: int,
    *,
    config: dict[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    copy: Copy | None = None,
    frozen: Mapping[str, dict[str, Any]] | None = None,
) -> Contents:
    """Put together what a checkpoint holds.

    Args:
        model: a state dict.
        state: nested dicts, lists and tuples of tensors, arrays and plain values.
        copy: makes a tensor's own copy. None: tensors on the CPU are those of the model, so it may not change
            before they are written.
        frozen: what the model has beside its state dict here, by name.

    Raises:
        InputError: something in the state can be neither a tensor nor JSON.
    """
    training: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    plain = pack(dict(state), training, "state", copy)
    document = {"model": pack(dict(model), weights, "", copy), "state": plain}
    return Contents(
        step=step, weights=weights, training=training, document=document, config=config, metrics=dict(metrics or {}),
        frozen=dict(frozen or {}),
    )  # fmt: skip


def config_of(model: Any) -> dict[str, Any] | None:
    """A model's own configuration as plain values: its `config`, if that is a dict or dataclass or has `to_dict()`."""
    config = getattr(model, "config", None)
    if callable(getattr(config, "to_dict", None)):
        config = config.to_dict()  # type: ignore[union-attr]
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    if not isinstance(config, Mapping):
        return None
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(config)))
    except (TypeError, ValueError):
        return None
    return plain


def write(path: Path, contents: Contents, shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Write a checkpoint at `path`, whole or not at all; its manifest.

    Raises:
        CheckpointError: the file system refuses; an earlier checkpoint at `path` stands.
        InputError: `path` holds other things.
    """
    if path.exists() and not is_checkpoint(path) and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is no checkpoint; give a new directory.")
    try:
        with atomic.atomic_dir(path) as tmp:
            names = write_shards(tmp, MODEL, contents.weights, shard_bytes, metadata={"format": "pt"})
            names += write_shards(tmp, TRAINING, contents.training, shard_bytes)
            left = {"frozen": contents.frozen} if contents.frozen else {}
            atomic.write_json(tmp / STATE, {**contents.document, **left})
            if contents.config is not None:
                atomic.write_json(tmp / CONFIG, contents.config)
            names += [STATE, *([CONFIG] if contents.config is not None else [])]
            manifest: dict[str, Any] = {
                "kind": KIND,
                "schema_version": SCHEMA_VERSION if contents.frozen else 1,
                "step": contents.step,
                "metrics": contents.metrics,
                "left_out": len(contents.frozen),
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "versions": {"torch": str(torch.__version__), "numpy": np.__version__},
                "files": {
                    name: {"bytes": (tmp / name).stat().st_size, "sha256": atomic.sha256_file(tmp / name)}
                    for name in names
                },
            }
            manifest["digest"] = digest(manifest)
            atomic.write_json(tmp / MANIFEST, manifest)
    except (OSError, SafetensorError) as e:
        there = is_checkpoint(path) or any(map(is_checkpoint, path.parent.glob("step-*")))
        way_out = "free space or give another save_dir"
        raise CheckpointError(
            f"the checkpoint of step {contents.step} could not be written to {path}: {e}. "
            + (f"Earlier checkpoints are unharmed; {way_out}, then resume from the latest." if there else "")
            + ("" if there else f"There is none before it; {way_out}.")
        ) from e
    return manifest


def write_shards(
    folder: Path, name: str, tensors: dict[str, Tensor], shard_bytes: int, metadata: dict[str, str] | None = None
) -> list[str]:
    """Write tensors as `name`, or as several files of at most `shard_bytes` with an index; the names of all files.

    A tensor is never cut, so one that is larger than a shard has a file of its own.
    """
    parts = _shards(tensors, shard_bytes)
    stem = name.removesuffix(".safetensors")
    names = [name]
    if len(parts) > 1:
        names = [f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for file, part in zip(names, parts, strict=True):
        save_file(part, folder / file, metadata=metadata)
    if len(parts) == 1:
        return names
    index = {
        "metadata": {"total_size": sum(_bytes(t) for t in tensors.values())},
        "weight_map": {key: file for file, part in zip(names, parts, strict=True) for key in part},
    }
    atomic.write_json(folder / f"{name}.index.json", index)
    return [*names, f"{name}.index.json"]


def _shards(tensors: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + _bytes(tensor) > limit:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += _bytes(tensor)
    return parts


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read and check a checkpoint: (model state dict, state), on the CPU.

    Raises:
        ArtifactError: no checkpoint, a later schema version, a missing, truncated or altered file; it is named.
    """
    manifest = verify(path)
    document = json.loads((path / STATE).read_text())
    try:
        model = unpack(document["model"], read_tensors(path, manifest, MODEL))
        # Tensors lie in the mapped file, which retention may delete while the run goes on; an optimizer keeps what it
        # is given, so it is given copies. A model copies by itself.
        training = {name: tensor.clone() for name, tensor in read_tensors(path, manifest, TRAINING).items()}
        state = unpack(document["state"], training)
    except (KeyError, TypeError, ValueError, SafetensorError) as e:
        raise ArtifactError(f"{path / STATE} and the tensors beside it do not fit together: {e!r}.") from e
    return model, state


def read_frozen(path: Path) -> dict[str, dict[str, Any]]:
    """What a checkpoint that was read already left out of the model."""
    found: dict[str, dict[str, Any]] = json.loads((path / STATE).read_text()).get("frozen", {})
    return found


def read_tensors(path: Path, manifest: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The tensors under MODEL or TRAINING, from however many files."""
    found: dict[str, Tensor] = {}
    for file in _files(manifest, name):
        found.update(load_file(path / file))
    return found


def _files(manifest: Mapping[str, Any], name: str) -> list[str]:
    shard = re.compile(re.escape(name.removesuffix(".safetensors")) + r"(-\d+-of-\d+)?\.safetensors")
    return sorted(file for file in manifest["files"] if shard.fullmatch(file))


def verify(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`. Raises ArtifactError unless all is whole; it names the file."""
    atomic.recover_dir(path)
    where = str(path / MANIFEST)
    manifest = read_manifest(path)
    check_digest(manifest, where)
    listed = manifest.get("files")
    if not isinstance(listed, dict) or not all(re.fullmatch(r"\w[\w.-]*", name) for name in listed):
        raise ArtifactError(f"{where} was altered: its list of files cannot be one that this package wrote.")
    missing = [n for n in (MODEL, TRAINING) if not _files(manifest, n)] + [n for n in (STATE,) if n not in listed]
    for name in [*missing, *listed]:
        file, entry = path / name, listed.get(name, {})
        if not file.is_file():
            raise ArtifactError(f"{file} is missing.")
        if file.stat().st_size != entry.get("bytes"):
            raise ArtifactError(f"{file} is damaged: {file.stat().st_size:,} bytes instead of {entry.get('bytes')}.")
        if atomic.sha256_file(file) != entry.get("sha256"):
            raise ArtifactError(f"{file} was altered after it was written (its SHA-256 does not match).")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, its files unchecked. Raises ArtifactError if there is none that can be read."""
    if not is_checkpoint(path):
        raise ArtifactError(f"{path} is no checkpoint: there is no {MANIFEST} in it.")
    return parse((path / MANIFEST).read_text(), str(path / MANIFEST), kind=KIND, schema_version=SCHEMA_VERSION)


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` looks like one checkpoint (not a directory of them)."""
    return (Path(path) / MANIFEST).is_file()
