"""Callbacks: what a user wants done at points of a run, and stopping early. Knows the Trainer only as an argument."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..core import ConfigError, DeepSeekError, InputError


class Callback:
    """Base of callbacks; override what you need. Every hook is given the Trainer.

    `trainer.step`, `trainer.epoch`, `trainer.history`, `trainer.losses`, `trainer.model`, `trainer.optimizer` can be
    read, and `trainer.stop(reason)` ends the run after the present step.

    Example:
        >>> class Names(Callback):
        ...     def on_epoch_end(self, trainer):
        ...         self.last = trainer.history[-1]["train_loss"]
    """

    def on_train_start(self, trainer: Any) -> None:
        """Before the first step of a run, or of its resumption."""

    def on_step_end(self, trainer: Any) -> None:
        """After every optimizer step."""

    def on_epoch_end(self, trainer: Any) -> None:
        """After an epoch's validation; `trainer.history[-1]` has its numbers."""

    def on_train_end(self, trainer: Any) -> None:
        """After a run that ended without an error."""

    def state_dict(self) -> dict[str, Any]:
        """What must be in a checkpoint so that a resumed run goes on alike: plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class EarlyStopping(Callback):
    """Stop when a metric has not improved for `patience` epochs.

    Args:
        patience: epochs without a better value after which the run ends.
        metric: a key of `Trainer.history` entries ("val_loss", "val_accuracy", "train_loss").
        mode: "min" if smaller is better, else "max".
        min_delta: how much better a value must be to count.

    Raises:
        ConfigError: an argument is not allowed.
        InputError: (while training) the history has no such metric.
    """

    def __init__(self, patience: int, metric: str = "val_loss", mode: str = "min", min_delta: float = 0.0) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ConfigError(f"EarlyStopping(patience={patience!r}): an integer >= 1 is needed.")
        if mode not in ("min", "max"):
            raise ConfigError(f"EarlyStopping(mode={mode!r}): 'min' or 'max' is needed.")
        if not min_delta >= 0:
            raise ConfigError(f"EarlyStopping(min_delta={min_delta!r}): a number >= 0 is needed.")
        self.patience, self.metric, self.mode, self.min_delta = patience, metric, mode, min_delta
        self._reset()

    def _reset(self) -> None:
        self.best = math.inf if self.mode == "min" else -math.inf
        self.waited = 0

    def on_train_start(self, trainer: Any) -> None:
        """Start afresh, unless a run is being resumed."""
        if not trainer.resumed:
            self._reset()

    def on_epoch_end(self, trainer: Any) -> None:
        """Compare the epoch's value with the best so far."""
        entry = trainer.history[-1]
        if self.metric not in entry:
            raise InputError(
                f"early stopping watches {self.metric!r}, which the history does not have; it has {sorted(entry)}. "
                "Give a val_loader for val_* metrics, or watch another."
            )
        value = entry[self.metric]
        gain = self.best - value if self.mode == "min" else value - self.best
        if gain > self.min_delta:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            trainer.stop(f"{self.metric} has not been better than {self.best:.6g} for {self.waited} epochs")

    def state_dict(self) -> dict[str, Any]:
        """The best value and how long ago it was."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.best, self.waited = state["best"], state["waited"]


def check_callbacks(callbacks: Iterable[Any]) -> list[Callback]:
    """The callbacks as a list. Raises ConfigError if one of them is no Callback."""
    found = list(callbacks)
    for callback in found:
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"callbacks has {callback!r}, which is no Callback; derive a class from deepseek_r1.train.Callback and "
                "give an instance of it."
            )
    return found


def overriding(callbacks: Iterable[Callback], hook: str) -> list[Callback]:
    """The callbacks that do something at `hook`."""
    return [c for c in callbacks if getattr(type(c), hook) is not getattr(Callback, hook)]


def call(callbacks: Iterable[Callback], hook: str, trainer: Any) -> None:
    """Run one hook of every callback.

    Raises:
        InputError: a callback failed; the message names it. Errors of this package pass as they are.
    """
    for callback in callbacks:
        try:
            getattr(callback, hook)(trainer)
        except DeepSeekError as e:
            e.add_note(f"raised in the callback {type(callback).__name__}.{hook} at step {trainer.step}")
            raise
        except Exception as e:
            raise InputError(
                f"the callback {type(callback).__name__}.{hook} failed at step {trainer.step}: {type(e).__name__}: {e}"
            ) from e
