"""`DSCheckpoint`: the checkpoint format without a Trainer - save, check, load, and the layout of Hugging Face."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..core import InputError, atomic
from ._background import Background, Staging
from ._checkpoint import (
    CONFIG,
    MODEL,
    SHARD_BYTES,
    Contents,
    config_of,
    gather,
    read,
    read_frozen,
    read_tensors,
    verify,
    write,
)
from ._checkpoint import write_shards as _write_shards
from ._fit import check_model, check_optimizer
from ._frozen import taken
from ._pack import Copy, pack
from ._rng import rng_state, set_rng_state


class DSCheckpoint:
    """A checkpoint on disk: a directory of safetensors and JSON, whole or not there, checked when it is opened.

    Nothing in it is pickled, so that opening one from a stranger runs no code. `Trainer` writes the same format, and
    its checkpoints can be opened here.

    Args:
        path: the directory.

    Attributes:
        path: the directory.
        step: the step it was saved at.
        metrics: the numbers it was saved with.

    Raises:
        ArtifactError: there is none, it is of a later version, or a file is missing, truncated or altered.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> folder = tempfile.mkdtemp()
        >>> saved = DSCheckpoint.save(f"{folder}/a", model, optimizer, state={"epoch": 3}, step=120)
        >>> other = nn.Linear(4, 2)
        >>> DSCheckpoint(saved.path).load(other), torch.equal(model.weight, other.weight)
        ({'epoch': 3}, True)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._manifest = verify(self.path)

    @property
    def step(self) -> int:
        """The step it was saved at."""
        return int(self._manifest["step"])

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers it was saved with."""
        return dict(self._manifest.get("metrics", {}))

    @classmethod
    def save(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        state: Mapping[str, Any] | None = None,
        step: int = 0,
        metrics: Mapping[str, float] | None = None,
        rng: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> DSCheckpoint:
        """Write a checkpoint at `path`, whole or not at all; one that is there already is replaced.

        Args:
            path: a directory that is new, empty or a checkpoint.
            model: its state dict is saved, and its `config` where it has one.
            optimizer: its state is saved too.
            state: anything else: nested dicts, lists and tuples of tensors, arrays, numbers and texts.
            step: a number to know it by.
            metrics: numbers that judge the state.
            rng: also save the states of python's, numpy's and torch's random generators.
            shard_bytes: larger tensors together go into several files of at most that size.

        Raises:
            CheckpointError: the file system refuses.
            InputError: something cannot be saved; its place is named. Or `path` holds other things.
        """
        contents = _contents(model, optimizer, state, step, metrics, rng, None)
        return cls._written(Path(path), write(Path(path), contents, shard_bytes))

    @classmethod
    def save_async(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        state: Mapping[str, Any] | None = None,
        step: int = 0,
        metrics: Mapping[str, float] | None = None,
        rng: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> PendingCheckpoint:
        """Like `save`, but returns as soon as everything is copied into host memory; a thread writes it.

        What happens to the model afterwards does not reach the file. Call `wait` on the result to have the checkpoint,
        or the error.

        Example:
            >>> import tempfile
            >>> model = nn.Linear(4, 2)
            >>> pending = DSCheckpoint.save_async(tempfile.mkdtemp(), model, step=7)
            >>> pending.wait().step
            7
        """
        staging = Staging()
        staging.begin()
        contents = _contents(model, optimizer, state, step, metrics, rng, staging.copy)
        staging.end()
        return PendingCheckpoint(Path(path), contents, staging, shard_bytes)

    def load(
        self, model: nn.Module | None = None, optimizer: Optimizer | None = None, *, rng: bool = False
    ) -> dict[str, Any]:
        """Put the saved state into a model and an optimizer, in place; gives what else was saved.

        Args:
            model: is given the weights; they go where its parameters are. What a Trainer left out of the checkpoint
                (`TrainingConfig.save_frozen`) it must have already, with the values that the run was given.
            optimizer: is given its state.
            rng: also put back the states of the random generators.

        Raises:
            InputError: the checkpoint is of another architecture or optimizer (the first mismatch is named: name,
                shape in the checkpoint, shape in the model), or lacks what was asked for. Then nothing was changed.
            ArtifactError: it was damaged since it was opened.
        """
        weights, saved = read(self.path)
        left = read_frozen(self.path)
        if model is not None:
            check_model(model, weights, str(self.path), left)
        if optimizer is not None:
            if saved.get("optimizer") is None:
                raise InputError(f"{self.path} has no optimizer's state; save it with save(path, model, optimizer).")
            check_optimizer(optimizer, saved["optimizer"], saved.get("optimizer_class"), str(self.path))
        if rng and saved.get("rng") is None:
            raise InputError(f"{self.path} has no states of random generators; save them with save(..., rng=True).")
        if model is not None:
            model.load_state_dict(weights, strict=not left)
        if optimizer is not None:
            optimizer.load_state_dict(saved["optimizer"])
        if rng:
            set_rng_state(saved["rng"], _device(model))
        rest: dict[str, Any] = saved.get("extra", saved)
        return rest

    def model_state(self, base: nn.Module | None = None) -> dict[str, Any]:
        """The model's state dict, on the CPU.

        Args:
            base: the model as the run was given it, where a Trainer left frozen tensors out of the checkpoint.

        Raises:
            InputError: tensors were left out, and `base` was not given or is another.
        """
        weights = read(self.path)[0]
        weights |= {name: t.cpu() for name, t in taken(read_frozen(self.path), base, str(self.path)).items()}
        return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in weights.items()}

    def export_hf(
        self, path: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES, base: nn.Module | None = None
    ) -> list[Path]:
        """Write the weights as Hugging Face lays them out; the files that were written.

        These are `model.safetensors`, or shards with `model.safetensors.index.json`; and `config.json`, if the model
        that was saved has a configuration. A tensor under several names is written under the first.

        Args:
            path: a directory that is new or empty.
            base: as for `model_state`.

        Raises:
            InputError: there are other things in `path`; or as `model_state`.
            OSError: the file system refuses.
        """
        target = Path(path)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"{target} exists and is not empty; give a new directory.")
        manifest = verify(self.path)
        tensors = read_tensors(self.path, manifest, MODEL)
        pack(taken(read_frozen(self.path), base, str(self.path)), tensors, "")
        with atomic.atomic_dir(target) as tmp:
            names = _write_shards(tmp, MODEL, tensors, shard_bytes, metadata={"format": "pt"})
            if CONFIG in manifest["files"]:
                (tmp / CONFIG).write_bytes((self.path / CONFIG).read_bytes())
                names.append(CONFIG)
        return [target / name for name in names]

    @classmethod
    def _written(cls, path: Path, manifest: dict[str, Any]) -> DSCheckpoint:
        made = cls.__new__(cls)
        made.path, made._manifest = path, manifest
        return made

    def __repr__(self) -> str:
        return f"DSCheckpoint({str(self.path)!r}, step={self.step})"


class PendingCheckpoint:
    """A checkpoint that a thread is writing; made by `DSCheckpoint.save_async`.

    Example:
        >>> import tempfile
        >>> DSCheckpoint.save_async(tempfile.mkdtemp(), nn.Linear(2, 2)).wait().metrics
        {}
    """

    def __init__(self, path: Path, contents: Contents, staging: Staging, shard_bytes: int) -> None:
        self._path, self._manifest = path, dict[str, Any]()
        self._work = Background()

        def work() -> None:
            staging.wait()
            self._manifest = write(path, contents, shard_bytes)

        self._work.start(work)

    @property
    def done(self) -> bool:
        """Whether the thread has ended, with or without an error."""
        return not self._work.busy

    def wait(self) -> DSCheckpoint:
        """Wait until the checkpoint is there.

        Raises:
            CheckpointError: it could not be written.
        """
        self._work.wait()
        return DSCheckpoint._written(self._path, self._manifest)


def _contents(
    model: nn.Module, optimizer: Optimizer | None, state: Mapping[str, Any] | None, step: int,
    metrics: Mapping[str, float] | None, rng: bool, copy: Copy | None,
) -> Contents:  # fmt: skip
    if not isinstance(model, nn.Module):
        raise InputError(f"save(model={type(model).__name__}): an nn.Module is needed.")
    whole = {
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "optimizer_class": None if optimizer is None else type(optimizer).__name__,
        "rng": rng_state(_device(model)) if rng else None,
        "extra": dict(state or {}),
    }
    return gather(model.state_dict(), whole, step, config=config_of(model), metrics=metrics, copy=copy)


def _device(model: nn.Module | None) -> torch.device:
    parameter = None if model is None else next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
