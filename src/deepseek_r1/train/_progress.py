"""How far a run has come: the numbers that a checkpoint keeps. Knows nothing about models or files."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor


@dataclass
class Progress:
    """Counters of a Trainer's life; `first_*` say where the present run began.

    Attributes:
        step: optimizer steps so far.
        epoch: epochs finished so far.
        batch: batches taken in the epoch under way.
        samples: training samples seen in the present run.
        seconds: time spent in training steps of the present run.
        loss_sum: sum over the epoch's samples of their loss; a tensor on the GPU until it is read.
        log_sum, log_steps: the same over steps since the last point of the loss curve.
        stopped: why the run ended before its last epoch; empty if it did not.
        history: one entry per finished epoch.
        points: the loss curve as (step, mean loss since the point before).
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
    loss_sum: float | Tensor = 0.0
    log_sum: float | Tensor = 0.0
    log_steps: int = 0
    stopped: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    points: list[tuple[int, float | Tensor]] = field(default_factory=list)

    def begin_run(self) -> None:
        """Start counting a new run."""
        self.first_step, self.first_epoch = self.step, self.epoch
        self.samples, self.seconds, self.stopped = 0, 0.0, ""
        self.log_sum, self.log_steps = 0.0, 0
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Start counting a new epoch."""
        self.batch, self.epoch_samples, self.epoch_seconds, self.loss_sum = 0, 0, 0.0, 0.0

    def count(self, loss: float | Tensor, batches: int, samples: int, seconds: float) -> None:
        """Count one optimizer step with this mean loss."""
        self.step += 1
        self.batch += batches
        self.samples += samples
        self.epoch_samples += samples
        self.seconds += seconds
        self.epoch_seconds += seconds
        self.loss_sum = self.loss_sum + loss * samples
        self.log_sum = self.log_sum + loss
        self.log_steps += 1

    def add_point(self) -> None:
        """Add a point to the loss curve."""
        self.points.append((self.step, self.log_sum / self.log_steps))
        self.log_sum, self.log_steps = 0.0, 0

    def read(self) -> None:
        """Bring numbers that are still on a GPU to the host."""
        self.loss_sum, self.log_sum = float(self.loss_sum), float(self.log_sum)
        self.points = [(step, float(loss)) for step, loss in self.points]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        self.read()
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Progress:
        """What `to_dict` described."""
        return cls(**data)
