"""The course of a run: epochs, windows of batches, validation, checkpoints when due, and what ends it early.

Works on a Trainer, whose public verbs lie in `_trainer.py`. Knows nothing about how a step is computed or a file made.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core import InputError
from ..data import DSDataLoader
from ._callbacks import call, overriding
from ._configured import acting
from ._epoch import batches, empty_loader, epoch_start, loader_length, windows, worker_died
from ._folder import checkpoints
from ._interrupt import Terminated

if TYPE_CHECKING:
    from ._trainer import Trainer
    from ._watch import Watch


def run(trainer: Trainer, last_epoch: int, total: int | None, watch: Watch) -> None:
    """Train up to the end of `last_epoch`, or until somebody stops the run."""
    call(overriding(trainer.callbacks, "on_train_start"), "on_train_start", trainer)
    trainer._stepper.look()
    while trainer.epoch < last_epoch and not trainer._progress.stopped:
        try:
            _run_epoch(trainer, total, watch)
        except RuntimeError as e:
            if (died := worker_died(e, trainer.epoch)) is None:
                raise
            raise died from e
    if trainer.config.save_dir is not None:
        _finish_saving(trainer)
        if trainer._saver.saved_step != trainer.step:
            save_due(trainer)
            _finish_saving(trainer)
        trainer._interrupts.check()
    call(overriding(trainer.callbacks, "on_train_end"), "on_train_end", trainer)


def expect_largest(trainer: Trainer) -> None:
    """Show the largest batch of the run to what limits memory, where the loader knows it before it comes."""
    memory, loader = trainer._stepper.memory, trainer.train_loader
    if memory is None or not memory.wants_largest or not isinstance(loader, DSDataLoader):
        return
    # What fails here fails again when its turn comes, and is then told with its place.
    with contextlib.suppress(Exception):
        if (batch := loader.largest_batch()) is not None:
            memory.expect(batch)


def _finish_saving(trainer: Trainer) -> None:
    with trainer._interrupts.held():
        trainer._saver.finish()


def save_due(trainer: Trainer) -> None:
    """The run's own checkpoint of this step. A signal waits for it."""
    trainer._check_whole()
    trainer._progress.read()
    if trainer._watch is not None:
        # The log is never behind a checkpoint, from which it would go on with a gap.
        trainer._watch.flush()
    with trainer._interrupts.held():
        trainer._saver.write_own(trainer.step, trainer._contents)


def _run_epoch(trainer: Trainer, total: int | None, watch: Watch) -> None:
    state, place, config = trainer._progress, trainer._place, trainer.config
    if place is None:
        state.begin_epoch()
        trainer._epoch_start = epoch_start(trainer.train_loader, trainer.device)
    else:
        trainer._epoch_start = place.start
    trainer._place = None
    after_step = overriding(trainer.callbacks, "on_step_end")
    looks = acting(after_step)
    stream = batches(trainer.train_loader, trainer.epoch, trainer.device, place)
    # Batches that workers make take nothing from this process's generators.
    drawn_elsewhere = bool(getattr(trainer.train_loader, "num_workers", 0))
    trainer._whole = drawn_elsewhere
    for window in windows(stream, config.gradient_accumulation_steps):
        trainer._whole = False
        if state.batch == 0 and not isinstance(getattr(trainer.train_loader, "batch_size", None), int):
            trainer._stepper.check_micro_batch(window)
        trainer._stepper.step(window, total)
        call(after_step, "on_step_end", trainer)
        if looks:
            trainer._stepper.look()
        trainer._whole = True
        watch.after_step(window)
        if config.save_dir is not None and config.save_every_steps and trainer.step % config.save_every_steps == 0:
            save_due(trainer)
        trainer._saver.check()
        trainer._interrupts.check()
        if state.stopped:
            return
        trainer._whole = drawn_elsewhere
    trainer._whole = True
    trainer._interrupts.check()
    if state.batch == 0:
        raise empty_loader(trainer.train_loader)
    _end_epoch(trainer, watch)


def _end_epoch(trainer: Trainer, watch: Watch) -> None:
    state = trainer._progress
    trainer._stepper.settle()
    state.read()
    watch.before_last_point()
    state.add_point(state.step)
    values: Mapping[str, float] = {}
    if trainer.val_loader is not None:
        trainer._validating = True  # and so ends before its next batch if somebody asks
        try:
            values = trainer.evaluate()
        finally:
            trainer._validating = False
    entry: dict[str, Any] = {
        "epoch": state.epoch + 1,
        "step": state.step,
        "lr": trainer._stepper.rate,
        "train_loss": state.loss_sum / state.epoch_samples,
        **{f"val_{name}": value for name, value in values.items()},
        "seconds": state.epoch_seconds,
    }
    _note_early_end(trainer)
    state.history.append(entry)
    state.epoch += 1
    state.begin_epoch()
    trainer._epoch_start = None
    watch.after_epoch(entry)
    call(overriding(trainer.callbacks, "on_epoch_end"), "on_epoch_end", trainer)
    trainer._stepper.look()
    every = trainer.config.save_every_epochs
    if trainer.config.save_dir is not None and every and state.epoch % every == 0:
        save_due(trainer)
    trainer._interrupts.check()


def _note_early_end(trainer: Trainer) -> None:
    promised, seen = loader_length(trainer.train_loader), trainer._progress.batch
    if promised is not None and seen < promised:
        what = f"batches {seen + 1} to {promised} of epoch {trainer.epoch + 1}"
        why = f"the loader has {promised} by its length and ended after {seen}"
        trainer._skipped.append((what, why))


def by_signal(trainer: Trainer, error: BaseException) -> bool:
    """Whether `error` is a signal's, or what a signal did to the loader's workers, of which the run was told too."""
    if isinstance(error, KeyboardInterrupt | Terminated):
        return True
    workers = getattr(trainer.train_loader, "num_workers", 0)
    return bool(workers) and isinstance(error, InputError) and trainer._interrupts.asked is not None


def interrupted(trainer: Trainer, epochs: int, error: BaseException) -> BaseException:
    """What to raise for a Ctrl-C or SIGTERM, after a checkpoint was saved where that is possible.

    Raises:
        CheckpointError: the disk refuses it.
    """
    saver, step = trainer._saver, trainer.step
    text, can_resume = f"stopped at step {step}; nothing was saved, as there is no save_dir.", False
    with trainer._interrupts.held():
        if trainer.config.save_dir is not None and trainer._whole:
            saver.finish()
            if saver.saved_step != step:
                trainer.save()
            text, can_resume = f"stopped at step {step}; saved {saver.path_of(step)}.", True
        elif trainer.config.save_dir is not None:
            text = f"stopped in the middle of step {step + 1}. {saver.advice()}"
            can_resume = bool(checkpoints(saver.folder))
    again = trainer.resume_with or f"trainer.resume(), then trainer.train(epochs={epochs})"
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(f"{text} Resume with: {again}" if can_resume else text)
    text = f"{text}\nresume with: {again}" if can_resume else text
    # What ends a process by SystemExit is not shown by python.
    sys.stderr.write(text + "\n")
    return Terminated(text, code=0) if can_resume else Terminated(text)
