"""Checkpoints on disk: a directory each, whole or not there, tensors in safetensors and everything else in JSON.

    step-00000120/
        model.safetensors      the model's state dict (a tensor under several names is stored once)
        training.safetensors   optimizer, generators and whatever else has tensors
        state.json             the structure around both
        manifest.json          schema version, step, SHA-256 of every file

Nothing is pickled. Knows nothing about what the state means.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core import ArtifactError, ConfigError, DeepSeekError, InputError, atomic
from ..core.manifest_json import check_digest, digest, parse

SCHEMA_VERSION = 1
KIND = "deepseek-r1 training checkpoint"
MODEL, TRAINING, STATE, MANIFEST = "model.safetensors", "training.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(DeepSeekError, OSError):
    """A checkpoint could not be written (disk full, no permission). What was there before is unharmed."""


def checkpoint_name(step: int) -> str:
    """The directory name of the checkpoint at `step`.

    Example:
        >>> checkpoint_name(120)
        'step-00000120'
    """
    return f"step-{step:08d}"


def write_checkpoint(path: Path, model: Mapping[str, Any], state: Mapping[str, Any], step: int) -> Path:
    """Write a checkpoint at `path`, whole or not at all.

    Args:
        model: a state dict.
        state: nested dicts, lists and tuples of tensors, arrays and plain values.

    Raises:
        CheckpointError: the file system refuses; an earlier checkpoint at `path` stands.
        InputError: something in the state can be neither a tensor nor JSON, or `path` holds other things.
    """
    if path.exists() and not (path / MANIFEST).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is no checkpoint; give a new directory.")
    tensors: dict[str, Tensor] = {}
    plain = pack(dict(state), tensors, "state")
    weights: dict[str, Tensor] = {}
    structure = pack(dict(model), weights, "")
    try:
        with atomic.atomic_dir(path) as tmp:
            save_file(weights, tmp / MODEL, metadata={"format": "pt"})
            save_file(tensors, tmp / TRAINING)
            atomic.write_json(tmp / STATE, {"model": structure, "state": plain})
            files = {
                name: {"bytes": (tmp / name).stat().st_size, "sha256": atomic.sha256_file(tmp / name)}
                for name in (MODEL, TRAINING, STATE)
            }
            manifest = {
                "kind": KIND,
                "schema_version": SCHEMA_VERSION,
                "step": step,
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "versions": {"torch": str(torch.__version__), "numpy": np.__version__},
                "files": files,
            }
            atomic.write_json(tmp / MANIFEST, {**manifest, "digest": digest(manifest)})
    except (OSError, SafetensorError) as e:
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {path}: {e}. Earlier checkpoints are unharmed; "
            "free space or give another save_dir, then resume from the latest."
        ) from e
    return path


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read and check a checkpoint: (model state dict, state), on the CPU.

    Raises:
        ArtifactError: no checkpoint, a later schema version, a missing, truncated or altered file; it is named.
    """
    verify(path)
    document = json.loads((path / STATE).read_text())
    try:
        model = unpack(document["model"], load_file(path / MODEL))
        state = unpack(document["state"], load_file(path / TRAINING))
    except (KeyError, TypeError, ValueError, SafetensorError) as e:
        raise ArtifactError(f"{path / STATE} and the tensors beside it do not fit together: {e!r}.") from e
    return model, state


def verify(path: Path) -> None:
    """Raise ArtifactError unless the checkpoint at `path` is whole; the message names the file."""
    atomic.recover_dir(path)
    if not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path} is no checkpoint: there is no {MANIFEST} in it.")
    where = str(path / MANIFEST)
    manifest = parse((path / MANIFEST).read_text(), where, kind=KIND, schema_version=SCHEMA_VERSION)
    check_digest(manifest, where)
    for name in (MODEL, TRAINING, STATE):
        file, entry = path / name, manifest["files"].get(name, {})
        if not file.is_file():
            raise ArtifactError(f"{file} is missing.")
        if file.stat().st_size != entry.get("bytes"):
            raise ArtifactError(f"{file} is damaged: {file.stat().st_size:,} bytes instead of {entry.get('bytes')}.")
        if atomic.sha256_file(file) != entry.get("sha256"):
            raise ArtifactError(f"{file} was altered after it was written (its SHA-256 does not match).")


def checkpoints(folder: Path) -> dict[int, Path]:
    """Checkpoints in a directory by step, in order. Says nothing about their health."""
    if not folder.is_dir():
        return {}
    for old in folder.glob(".step-*.old"):
        atomic.recover_dir(folder / old.name[1 : -len(".old")])
    found = ((_NAME.fullmatch(p.name), p) for p in folder.iterdir() if p.is_dir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def latest(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The whole checkpoint with the highest step, and why each higher one was refused."""
    refused: dict[Path, str] = {}
    for path in reversed(checkpoints(folder).values()):
        try:
            verify(path)
        except ArtifactError as e:
            refused[path] = str(e)
        else:
            return path, refused
    return None, refused


def find(path: Path, missing_ok: bool = False) -> tuple[Path | None, dict[Path, str]]:
    """`path` itself if it is a checkpoint, else the latest whole one in it; and why later ones were refused.

    Raises:
        ArtifactError: all in the directory are damaged.
        InputError: there is none (unless `missing_ok`).
    """
    if is_checkpoint(path):
        return path, {}
    found, refused = latest(path)
    if found is None and refused:
        raise ArtifactError("no checkpoint can be used: " + " ".join(refused.values()))
    if found is None and not missing_ok:
        raise InputError(f"there is no checkpoint in {path}; give the directory a run wrote, or begin with train().")
    return found, refused


def advice(save_dir: str | None) -> str:
    """What a user whose run broke off can go back to, in one sentence."""
    path = None if save_dir is None else latest(Path(save_dir))[0]
    if path is not None:
        return f"The last good checkpoint is {path}; trainer.resume() goes back to it."
    why = "there is no save_dir" if save_dir is None else "none was due yet"
    return f"No checkpoint was written ({why}); the parameters in memory are those before the step."


def refuse_later(folder: Path, step: int, known: set[str]) -> None:
    """Raise ConfigError if `folder` has checkpoints beyond `step`, other than the `known` damaged ones."""
    later = [path for number, path in checkpoints(folder).items() if number > step and str(path) not in known]
    if later:
        raise ConfigError(
            f"save_dir has checkpoints of another run, up to {later[-1]}, beyond this one's step {step}. Call "
            "trainer.resume() to go on from the latest, or give an empty save_dir."
        )


def prune(folder: Path, keep: int | None, upto: int) -> None:
    """Delete all but the last `keep` checkpoints with a step of at most `upto`, and what killed writes left."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    if keep is None:
        return
    mine = [path for step, path in checkpoints(folder).items() if step <= upto]
    for path in mine[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def pack(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """A JSON form of `value`; tensors go into `tensors` under the path at which they stand.

    Tensors that are the same memory are stored once; views of common memory are copied apart.

    Example:
        >>> out = {}
        >>> pack({"a": torch.zeros(1), 3: (1, None)}, out, "s")
        {'dict': [['a', {'tensor': 's.a'}], [3, {'tuple': [1, None]}]]}
        >>> list(out)
        ['s.a']
    """
    return _pack(value, tensors, where, {})


def _pack(value: Any, tensors: dict[str, Tensor], where: str, seen: dict[Any, str]) -> Any:
    if isinstance(value, Tensor):
        return _pack_tensor(value, tensors, where, seen)
    if isinstance(value, Mapping):
        prefix = f"{where}." if where else ""
        return {"dict": [[_key(k, where), _pack(v, tensors, f"{prefix}{k}", seen)] for k, v in value.items()]}
    if isinstance(value, tuple | list):
        parts = [_pack(v, tensors, f"{where}.{i}", seen) for i, v in enumerate(value)]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(
        f"{where} is of type {type(value).__name__}, which a checkpoint cannot hold; tensors, arrays, numbers, texts, "
        "lists, tuples and dicts can be saved."
    )


def _key(key: Any, where: str) -> Any:
    if isinstance(key, str | int) and not isinstance(key, bool):
        return key
    raise InputError(f"{where} has the key {key!r}; a checkpoint's keys are texts or integers.")


def _pack_tensor(value: Tensor, tensors: dict[str, Tensor], where: str, seen: dict[Any, str]) -> dict[str, Any]:
    same: Any = id(value)
    if value.numel() and value.layout == torch.strided:
        same = (value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
    if same not in seen:
        kept = value.detach().to("cpu").contiguous()
        storage = ("storage", kept.untyped_storage().data_ptr())
        # Views into memory that others use as well are copied apart: safetensors stores no shared memory.
        if storage in seen or kept.untyped_storage().nbytes() != kept.numel() * kept.element_size():
            kept = kept.clone()
        name = where
        while name in tensors:  # {"a.b": ...} beside {"a": {"b": ...}}
            name += "_"
        seen[same] = seen[storage] = name
        tensors[name] = kept
    return {"tensor": seen[same]}


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given. Raises KeyError or ValueError if the parts do not fit together."""
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "dict" in value:
        return {k: unpack(v, tensors) for k, v in value["dict"]}
    if "tuple" in value:
        return tuple(unpack(v, tensors) for v in value["tuple"])
    if "array" in value:
        return np.array(value["array"], dtype=value["dtype"])
    raise ValueError(f"an entry with the keys {list(value)} is unknown")


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` looks like one checkpoint (not a directory of them)."""
    return (Path(path) / MANIFEST).is_file()
