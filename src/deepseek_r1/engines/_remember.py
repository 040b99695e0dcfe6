"""Remembering a choice: the key under which it is kept, keeping it, and making an Executable of it again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..core import ArtifactError, Budget, InputError, Report, probe
from ..graph import Program, capture
from ._cache import ChoiceCache, Entry
from ._config import RaceConfig
from ._fingerprint import Fingerprint, NoFingerprint, sources
from .base import ENGINES
from .executable import Executable, falls_behind

#: Packages whose version decides what is captured, compiled and how fast it is.
_PACKAGES = (
    "torch", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino", "executorch", "tensorrt", "triton",
    "transformers",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Where one call of `optimize` looks for its choice and keeps it.

    Attributes:
        key: empty if nothing can be kept.
        reason: why nothing can be kept.
        tensors: the model's own, whose change makes a kept choice stale.
        passes: what the model is simplified with when its weights have changed.
    """

    cache: ChoiceCache | None = None
    key: str = ""
    reason: str = ""
    tensors: list[torch.Tensor] = field(default_factory=list)
    passes: tuple[str, ...] | None = None


def memory_of(
    model: torch.nn.Module | Program, inputs: Any, engines: Sequence[str], budget: Budget, batches: list[Any],
    config: RaceConfig,
) -> Memory:  # fmt: skip
    """The memory for one call of `optimize`; takes no capture."""
    if config.cache is False:
        return Memory()
    if local := [name for name in engines if ENGINES.is_local(name)]:
        return Memory(reason=f"{', '.join(local)}: registered in this process only")
    marks = Fingerprint()
    try:
        if isinstance(model, Program):
            marks.add([p.content_hash() + p.precision for p in (model, model.parent) if p is not None])
            what = [v for v in model.exported.state_dict.values() if isinstance(v, torch.Tensor)]
        else:
            marks.add(model, type(model).__name__)
            what = list(marks.tensors)
        marks.add(batches, "dataset")
    except NoFingerprint as e:
        return Memory(reason=str(e))
    leaves, tree = pytree.tree_flatten(inputs)
    about = {
        "model": marks.hexdigest(),
        "inputs": [_about(leaf) for leaf in leaves],
        "tree": str(tree),
        "engines": {name: sources(ENGINES.get(name).__module__) for name in sorted(engines)},
        "budget": budget.limits(),
        "race": [config.rounds, config.seconds, config.memory_gb, config.timeout_s, config.passes, config.task],
        "hardware": probe().key,
        "threads": torch.get_num_threads(),
        "versions": _versions(),
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:40]
    root = None if config.cache is True else config.cache
    return Memory(cache=ChoiceCache(root), key=key, tensors=what, passes=config.passes)


def _about(leaf: Any) -> list[Any]:
    if isinstance(leaf, torch.Tensor):
        return [str(leaf.dtype), list(leaf.shape), list(leaf.stride()), str(leaf.device)]
    return [repr(leaf)]


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    found["own sources"] = str([(f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    return found


def recall(memory: Memory, model: torch.nn.Module | Program, inputs: Any) -> tuple[Executable | None, str]:
    """The kept choice as an Executable, or None and a note if something damaged was discarded."""
    if memory.cache is None:
        return None, f"nothing is kept in the cache: {memory.reason}" if memory.reason else ""
    try:
        entry = memory.cache.find(memory.key)
        return (_open(entry, memory, model, inputs) if entry is not None else None), ""
    except Exception as e:  # an engine may fail in any way on damaged files; the race then runs again
        try:
            memory.cache.discard(memory.key)
        except OSError as problem:
            return None, f"a damaged entry of the cache could not be removed: {problem}"
        return None, f"a damaged entry of the cache was discarded, and the engines were raced again: {str(e)[:300]}"


def _open(entry: Entry, memory: Memory, model: torch.nn.Module | Program, inputs: Any) -> Executable:
    report = entry.report()
    report.note(f"from the cache; raced on {entry.raced}")
    args, kwargs = inputs

    @cache
    def program() -> Program:
        if not isinstance(model, Program):
            return capture(model, kwargs or args)
        return model.parent if entry.source == "parent" and model.parent is not None else model

    if entry.engine == "eager" and not isinstance(model, Program):
        return Executable(
            program, "eager", None, report, precision=entry.precision, signature=entry.signature, module=model
        )
    plugin = ENGINES.get(entry.engine)()
    if reason := plugin.unavailable():
        raise ArtifactError(reason)
    runner = plugin.open(entry.files, program)
    watch = memory.tensors if not isinstance(model, Program) or falls_behind(entry.engine, program()) else ()
    return Executable(
        program, entry.engine, runner, report, precision=entry.precision, signature=entry.signature, watch=watch,
        passes=memory.passes,
    )  # fmt: skip


def keep(memory: Memory, executable: Executable, source: str, files: Path | None, report: Report) -> None:
    """Keep a choice; a full disk or a home that cannot be written costs a note only."""
    if memory.cache is None:
        return
    program = executable.program
    try:
        memory.cache.put(
            memory.key, files, report, model=program.name, engine=executable.engine, precision=executable.precision,
            source=source, signature=program.signature,
        )  # fmt: skip
    except (OSError, InputError) as e:
        report.note(f"the choice could not be kept in the cache {os.fspath(memory.cache.root)}: {e}")
