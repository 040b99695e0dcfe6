"""Directories in the layout of Hugging Face: where a name's files are on this machine, and the tensors in them.

Knows nothing about architectures, and nothing about networks: what is not on this machine is an error that says where
it was looked for.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core import ArtifactError, InputError, UnsafeFileError, atomic

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def hub_cache() -> Path:
    """Where programs of Hugging Face keep what they have downloaded (their own environment variables say so)."""
    if found := os.environ.get("HF_HUB_CACHE"):
        return Path(found).expanduser()
    if found := os.environ.get("HF_HOME"):
        return Path(found).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def find_directory(source: str | os.PathLike[str], repositories: Mapping[str, Sequence[str]]) -> Path:
    """The directory that a path, a repository `org/name` or a short name stands for.

    Args:
        repositories: short name -> the repositories it stands for, the likeliest first.

    Raises:
        InputError: nothing is there; the message lists the places.
    """
    text = os.fspath(source)
    local = Path(text).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise InputError(f"{text} is a file; give the directory that holds {CONFIG} and {WEIGHTS}.")
    tried = [f"the directory {local.absolute()}"]
    for name in repositories.get(text, (text,)):
        folder = hub_cache() / f"models--{name.replace('/', '--')}"
        snapshot = _snapshot(folder)
        if snapshot is not None:
            return snapshot
        tried.append(f"a snapshot of {name} in {folder / 'snapshots'}")
    known = f" Short names known here: {', '.join(sorted(repositories))}." if repositories else ""
    raise InputError(
        f"{text!r} was not found on this machine. Looked for: {'; '.join(tried)}. Nothing is downloaded: fetch the "
        f"repository with `hf download`, or give the path of a directory with {CONFIG} and {WEIGHTS}.{known}"
    )


def _snapshot(folder: Path) -> Path | None:
    """The snapshot that `main` stands for, or the only one."""
    if (folder / "refs" / "main").is_file():
        named = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
        if (named / CONFIG).is_file():
            return named
    found = [p for p in folder.glob("snapshots/*") if (p / CONFIG).is_file()]
    if len(found) > 1:
        raise InputError(
            f"{folder} holds several snapshots and no refs/main; give one's path: {', '.join(map(str, found))}."
        )
    return found[0] if found else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: there is no such file.
        ArtifactError: the file is no JSON object.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; a directory in the layout of Hugging Face has one.")
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ArtifactError(f"{path} is no JSON: {e}") from e
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} holds a {type(value).__name__}; an object is needed.")
    return value


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in the weight files, one at a time, so that two copies never exist of all.

    Raises:
        InputError: there is no weight file.
        ArtifactError: a file is damaged, or a shard is missing.
        UnsafeFileError: a pickled file asks for code.
    """
    if (folder / WEIGHTS).is_file():
        yield from _safetensors(folder / WEIGHTS)
    elif (folder / INDEX).is_file():
        for file in _shards(folder / INDEX):
            yield from _safetensors(file)
    elif (folder / PICKLED).is_file():
        yield from _pickled(folder / PICKLED)
    elif (folder / PICKLED_INDEX).is_file():
        for file in _shards(folder / PICKLED_INDEX):
            yield from _pickled(file)
    else:
        raise InputError(f"{folder} holds none of {WEIGHTS}, {INDEX}, {PICKLED} and {PICKLED_INDEX}.")


def _shards(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(f, str) for f in places.values()):
        raise ArtifactError(f"{index} has no weight_map of tensor names to files.")
    files = sorted(set(places.values()))
    for file in files:
        if Path(file).name != file:
            raise ArtifactError(f"{index} names the file {file!r}; only files beside it are read.")
        if not (index.parent / file).is_file():
            raise ArtifactError(f"{index} names {file}, which is not there.")
    return [index.parent / file for file in files]


def _safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118 - the handle is no dict and cannot be iterated
                yield name, f.get_tensor(name)
    except SafetensorError as e:
        raise ArtifactError(f"{path} is damaged or no safetensors file: {e}") from e


def _pickled(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise UnsafeFileError(
            f"{path} holds more than tensors, and opening it could run code. It was not opened."
        ) from e
    except (RuntimeError, EOFError, ValueError, OSError) as e:
        raise ArtifactError(f"{path} is damaged: {type(e).__name__}: {e}") from e
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ArtifactError(f"{path} is no dict of tensors.")
    yield from state.items()


def write_model(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """Write `config.json` and the weights, in shards if they take more than `shard_bytes`; other files stay."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(tensors, shard_bytes)
    if len(shards) == 1:
        _write_shard(folder / WEIGHTS, shards[0])
    else:
        places: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(folder / file, shard)
            places.update(dict.fromkeys(shard, file))
        total = sum(t.nbytes for t in tensors.values())
        atomic.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    atomic.write_json(folder / CONFIG, dict(config))
    _remove_others(folder, len(shards))


def _split(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    taken = 0
    for name, tensor in tensors.items():
        if shards[-1] and taken + tensor.nbytes > shard_bytes:
            shards.append({})
            taken = 0
        shards[-1][name] = tensor
        taken += tensor.nbytes
    return shards


def _write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Every tensor in memory of its own: safetensors stores no shared memory, and tied ones are stored once already.
    own = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    with atomic.atomic_path(path) as tmp:
        save_file(own, tmp, metadata={"format": "pt"})


def _remove_others(folder: Path, shards: int) -> None:
    """Weights of an earlier save in another number of shards would be read in place of these."""
    for path in folder.glob("model-*-of-*.safetensors"):
        if shards == 1 or not path.name.endswith(f"-of-{shards:05d}.safetensors"):
            path.unlink()
    (folder / (INDEX if shards == 1 else WEIGHTS)).unlink(missing_ok=True)
