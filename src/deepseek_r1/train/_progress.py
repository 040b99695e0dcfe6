"""How far a run has come: the numbers that a checkpoint keeps. Knows nothing about models or files."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

#: Losses left on a GPU before they are read together.
_UNREAD = 512


@dataclass
class Progress:
    """Counters of a Trainer's life; `first_*` say where the present run began.

    Attributes:
        step: optimizer steps so far.
        epoch: epochs finished so far.
        batch: batches taken in the epoch under way.
        samples: training samples seen in the present run.
        seconds: time spent in training steps of the present run.
        loss_sum: sum over the epoch's samples of their loss.
        log_sum, log_steps: sum of the steps' losses since the last point of the loss curve, and their number.
        stopped: why the run ended before its last epoch; empty if it did not.
        history: one entry per finished epoch.
        points: the loss curve as (step, mean loss since the point before).
        unread: losses that are still on a GPU, as (step, loss, samples, whether a point follows).
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    first_step: int = 0
    first_epoch: int = 0
    samples: int = 0
    seconds: float = 0.0
    epoch_samples: int = 0
    epoch_seconds: float = 0.0
    loss_sum: float = 0.0
    log_sum: float = 0.0
    log_steps: int = 0
    stopped: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    points: list[tuple[int, float]] = field(default_factory=list)
    unread: list[tuple[int, Tensor, int, bool]] = field(default_factory=list)

    def begin_run(self) -> None:
        """Start counting a new run."""
        self.first_step, self.first_epoch = self.step, self.epoch
        self.samples, self.seconds, self.stopped = 0, 0.0, ""
        self.log_sum, self.log_steps = 0.0, 0
        self.unread = []
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Start counting a new epoch."""
        self.batch, self.epoch_samples, self.epoch_seconds, self.loss_sum = 0, 0, 0.0, 0.0

    def count(self, loss: Tensor, batches: int, samples: int, seconds: float, log_every: int) -> None:
        """Count one optimizer step with this mean loss. Does not wait for a GPU, save once in many steps."""
        self.step += 1
        self.batch += batches
        self.samples += samples
        self.epoch_samples += samples
        self.seconds += seconds
        self.epoch_seconds += seconds
        self.unread.append((self.step, loss, samples, self.step % log_every == 0))
        if loss.device.type == "cpu" or len(self.unread) >= _UNREAD:
            self.read()

    def read(self) -> None:
        """Bring losses that are still on a GPU to the host."""
        if not self.unread:
            return
        values = (
            [self.unread[0][1].item()] if len(self.unread) == 1 else torch.stack([u[1] for u in self.unread]).tolist()
        )
        for (step, _, samples, point), value in zip(self.unread, values, strict=True):
            self.loss_sum += value * samples
            self.log_sum += value
            self.log_steps += 1
            if point:
                self.add_point(step)
        self.unread = []

    def add_point(self, step: int) -> None:
        """Add a point to the loss curve, if there were steps since the last."""
        if self.log_steps:
            self.points.append((step, self.log_sum / self.log_steps))
            self.log_sum, self.log_steps = 0.0, 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        self.read()
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Progress:
        """What `to_dict` described."""
        return cls(**data)
