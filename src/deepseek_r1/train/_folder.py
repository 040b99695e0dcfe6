"""A directory of checkpoints: which are there, which is the latest whole one, which are kept. Knows no training."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..core import ArtifactError, ConfigError, InputError, atomic
from ._checkpoint import CheckpointError, is_checkpoint, read_manifest, verify

_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay: the last so many, and those with the best values of a metric.

    Attributes:
        keep_last: how many of the latest; None: all.
        keep_best: how many with the best metric, beside those. Only checkpoints that carry the metric take part.
        metric: a name in the manifests' metrics.
        mode: "min" if smaller is better, else "max".
    """

    keep_last: int | None = 3
    keep_best: int = 0
    metric: str = "val_loss"
    mode: str = "min"


def checkpoint_name(step: int) -> str:
    """The directory name of the checkpoint at `step`.

    Example:
        >>> checkpoint_name(120)
        'step-00000120'
    """
    return f"step-{step:08d}"


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


def check_writable(folder: Path) -> None:
    """Make `folder` if need be, and write a file in it; both are deleted again, as the run may fail before it saves.

    Raises:
        CheckpointError: the file system refuses.
    """
    try:
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as probe:
            probe.write(b"0")
            probe.flush()
        for place in made:
            # Another run may have begun to save there.
            with contextlib.suppress(OSError):
                place.rmdir()
    except OSError as e:
        raise CheckpointError(
            f"save_dir={str(folder)!r} cannot be written in: {e.strerror or e}. Give another save_dir, free space, or "
            "mend its permissions; no step was taken."
        ) from e


def prune(folder: Path, upto: int, retention: Retention) -> None:
    """Delete the checkpoints that do not stay, of those with a step of at most `upto`, and what kills left behind."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for old in folder.glob(".step-*.old"):
        # Its successor stands; once that is deleted, this one must not come back in its place.
        if (folder / old.name[1 : -len(".old")]).exists():
            atomic.remove_dir(old)
    if retention.keep_last is None:
        return
    mine = [path for step, path in checkpoints(folder).items() if step <= upto]
    best = set(_best(mine, retention))
    for path in mine[: -retention.keep_last]:
        if path not in best:
            atomic.remove_dir(path)


def _best(paths: list[Path], retention: Retention) -> list[Path]:
    if not retention.keep_best:
        return []
    values: list[tuple[float, Path]] = []
    for path in paths:
        try:
            value = read_manifest(path).get("metrics", {}).get(retention.metric)
        except (ArtifactError, OSError):
            continue
        if isinstance(value, int | float) and value == value:
            values.append((-value if retention.mode == "max" else value, path))
    return [path for _, path in sorted(values, key=lambda pair: pair[0])[: retention.keep_best]]
