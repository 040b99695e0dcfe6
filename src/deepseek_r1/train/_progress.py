"""How far a run has come: the numbers that a checkpoint keeps. Knows nothing about models or files."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Losses left on a GPU before they are sent to the host together.
_UNREAD = 512
#: Fields that say nothing about the run, or nothing that is not known otherwise.
_PASSING = {"unread", "moving", "norms", "recent"}


class Unread(NamedTuple):
    """What is known of a step whose loss was not read yet; `norm` is its gradients' norm, for a point of the curve."""

    step: int
    loss: Tensor
    samples: int
    point: bool
    norm: Tensor | None


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
        recent: the last loss that was read.
        norms: norms of the gradients at points of the curve, by step, until somebody takes them.
        unread: losses that are still on a GPU.
        moving: losses on their way to the host: what they are, where they will be, and the event of their arrival.
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
    recent: float | None = None
    norms: dict[int, float] = field(default_factory=dict)
    unread: list[Unread] = field(default_factory=list)
    moving: list[tuple[list[Unread], Tensor, Any]] = field(default_factory=list)

    def begin_run(self) -> None:
        """Start counting a new run."""
        self.first_step, self.first_epoch = self.step, self.epoch
        self.samples, self.seconds, self.stopped = 0, 0.0, ""
        self.log_sum, self.log_steps = 0.0, 0
        self.unread, self.moving = [], []
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Start counting a new epoch."""
        self.batch, self.epoch_samples, self.epoch_seconds, self.loss_sum = 0, 0, 0.0, 0.0

    def count(
        self, loss: Tensor, batches: int, samples: int, seconds: float, log_every: int, norm: Tensor | None = None
    ) -> None:
        """Count one optimizer step with this mean loss, and this norm of its gradients. Does not wait for a GPU."""
        self.step += 1
        self.batch += batches
        self.samples += samples
        self.epoch_samples += samples
        self.seconds += seconds
        self.epoch_seconds += seconds
        point = self.step % log_every == 0
        self.unread.append(Unread(self.step, loss, samples, point, norm if point else None))
        if loss.device.type == "cpu":
            self.read()
        else:
            if point or len(self.unread) >= _UNREAD:
                self._send()
            self._receive(wait=False)

    def read(self) -> None:
        """Bring losses that are still on a GPU to the host."""
        if self.unread and self.unread[0].loss.device.type != "cpu":
            self._send()
        self._receive(wait=True)
        for entry in self.unread:
            self._take(entry, entry.loss.item(), None if entry.norm is None else entry.norm.item())
        self.unread = []

    def _send(self) -> None:
        losses = torch.stack([u.loss for u in self.unread]).double()
        norms = [u.norm for u in self.unread if u.norm is not None]
        values = torch.cat([losses, torch.stack(norms).double()]) if norms else losses
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(values.device))
        self.moving.append((self.unread, host, event))
        self.unread = []

    def _receive(self, *, wait: bool) -> None:
        while self.moving:
            entries, host, event = self.moving[0]
            if wait:
                event.synchronize()
            elif not event.query():
                return
            values = host.tolist()
            norms = iter(values[len(entries) :])
            for entry, value in zip(entries, values):
                self._take(entry, value, None if entry.norm is None else next(norms))
            self.moving.pop(0)

    def _take(self, entry: Unread, value: float, norm: float | None) -> None:
        self.recent = value
        self.loss_sum += value * entry.samples
        self.log_sum += value
        self.log_steps += 1
        if entry.point:
            if norm is not None:
                self.norms[entry.step] = norm
            self.add_point(entry.step)

    def add_point(self, step: int) -> None:
        """Add a point to the loss curve, if there were steps since the last."""
        if self.log_steps:
            self.points.append((step, self.log_sum / self.log_steps))
            self.log_sum, self.log_steps = 0.0, 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        self.read()
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _PASSING}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Progress:
        """What `to_dict` described."""
        return cls(**data)
