"""The checkpoints of a run: written at once or in the background, retained, and what happens if the disk refuses.

Knows checkpoints and a configuration. Knows nothing about how the state came to be.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from ._background import Background, Staging
from ._checkpoint import CheckpointError, Contents, write
from ._config import TrainingConfig
from ._folder import Retention, advice, check_writable, checkpoint_name, prune, refuse_later
from ._pack import Copy


class Saver:
    """Writes the checkpoints of one Trainer.

    Attributes:
        saved_step: the step of the last checkpoint in the run's own directory; None before the first.
        skipped: checkpoints that could not be written while the run went on, each with the reason.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.saved_step: int | None = None
        self.skipped: list[tuple[str, str]] = []
        self._config = config
        self._work = Background()
        self._staging = Staging() if config.async_save else None
        self._retention = Retention(
            keep_last=config.keep_last, keep_best=config.keep_best,
            metric=config.early_stop_metric, mode=config.early_stop_mode,
        )  # fmt: skip

    @property
    def folder(self) -> Path:
        """The run's own directory."""
        assert self._config.save_dir is not None, "asked where there is a save_dir"
        return Path(self._config.save_dir)

    def path_of(self, step: int) -> Path:
        """Where the run's own checkpoint of a step is."""
        return self.folder / checkpoint_name(step)

    def begin(self, step: int, known: set[str]) -> None:
        """Before a run's first step: refuse a directory with checkpoints of a later one, but for `known` bad ones.

        Raises:
            CheckpointError: nothing can be written in the directory (with on_save_error="continue" a warning).
        """
        if self._config.save_dir is not None:
            refuse_later(self.folder, step, known)
            with self._tolerating():
                check_writable(self.folder)

    def write(self, path: Path, gather: Callable[[Copy | None], Contents]) -> None:
        """Write a checkpoint where the user wants it, and wait for it.

        Raises:
            CheckpointError: the disk refuses this one, or refused one that was being written.
        """
        self.finish()
        write(path, gather(None), self._shard_bytes())

    def write_own(self, step: int, gather: Callable[[Copy | None], Contents], *, wait: bool = False) -> None:
        """Write the run's own checkpoint of a step; behind the run's back if so configured, unless `wait`.

        At most one is in the making: the next waits for it.

        Raises:
            CheckpointError: the disk refuses this one (now, or at a later `check`), or refused the one before; with
                on_save_error="continue" only if `wait`.
        """
        self.finish()
        if self._staging is None or wait:
            with self._tolerating(not wait):
                self._publish(gather(None))
            return
        self._staging.begin()
        contents = gather(self._staging.copy)
        self._staging.end()
        self._work.start(lambda: self._publish(contents))

    def check(self) -> None:
        """Raise what went wrong in the background, if it has ended. Costs nothing else."""
        with self._tolerating():
            self._work.check()

    def finish(self) -> None:
        """Wait for what is in the making. Raises CheckpointError if it could not be written."""
        with self._tolerating():
            self._work.wait()

    def close(self) -> None:
        """Wait for what is in the making, where another error is under way already; that of the disk is a note."""
        try:
            self._work.wait()
        except CheckpointError as e:
            self._note(e)

    def advice(self) -> str:
        """What a user whose run broke off can go back to, in one sentence."""
        self.close()
        return advice(self._config.save_dir)

    def _publish(self, contents: Contents) -> None:
        if self._staging is not None:
            self._staging.wait()
        write(self.path_of(contents.step), contents, self._shard_bytes())
        self.saved_step = contents.step
        prune(self.folder, contents.step, self._retention)

    def _shard_bytes(self) -> int:
        return max(1, int(self._config.shard_gb * 1e9))

    def _tolerating(self, tolerant: bool = True) -> _Tolerating:
        return _Tolerating(self, tolerant and self._config.on_save_error == "continue")

    def _note(self, error: CheckpointError) -> None:
        self.skipped.append(("a checkpoint", str(error)))
        warnings.warn(f"training goes on without it: {error}", RuntimeWarning, stacklevel=4)


class _Tolerating:
    """Inside the block a CheckpointError becomes a warning and a line of the Report, if the run shall go on."""

    def __init__(self, saver: Saver, tolerant: bool) -> None:
        self._saver, self._tolerant = saver, tolerant

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if self._tolerant and isinstance(error, CheckpointError):
            self._saver._note(error)
            return True
        return False
