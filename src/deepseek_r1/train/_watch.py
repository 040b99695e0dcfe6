"""What is seen of a run while it goes on: the log on disk, and the view on the terminal.

Reads the Trainer's counters. Waits for no device: losses come when they have arrived on the host.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core import progress
from ..data import tensors, unpack_batch
from ._flops import device_peak, step_flops
from ._logs import RunLog

if TYPE_CHECKING:
    from ._trainer import Trainer

#: Seconds between two drawings on a terminal, and between two lines elsewhere.
_DRAW_S, _LINE_S = 0.1, 30.0


class Watch:
    """Follows one call of `Trainer.train`; a context.

    Args:
        total: steps of the run, or None.
        continued: whether the run goes on from a checkpoint, or stands where one would be that was never written: the
            log then keeps what belongs to the state and loses the rest.
    """

    def __init__(self, trainer: Trainer, total: int | None, continued: bool) -> None:
        self._trainer, self._total = trainer, total
        c, state = trainer.config, trainer._progress
        self._every = c.log_every
        self._log: RunLog | None = None
        if c.log_dir is not None:
            points = {step for step, _ in state.points}
            epochs = state.epoch

            def keep(entry: Any) -> bool:
                return entry["epoch"] <= epochs if entry.get("kind") == "epoch" else entry["step"] in points

            self._log = RunLog(Path(c.log_dir), state.step, keep if continued else None)
        self._written = len(state.points)
        self._marks: dict[int, dict[str, Any]] = {}
        self._peak = device_peak(trainer.device, c.precision)
        self._flops: float | None = None
        # A resumed run has samples behind it.
        self._view, self._rate = Rate(state.samples), Rate(state.samples)
        self._unshown, self._drawn = 0, 0.0
        self._shown_rate = ""

    def __enter__(self) -> Watch:
        state = self._trainer._progress
        self._bar = progress.bar("training", self._total, done=state.step - state.first_step, lines_s=_LINE_S)
        self._advance = self._bar.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._unshown:
            self._advance(self._unshown, self._note())
        self._bar.__exit__(*exception)
        if self._log is not None:
            if exception[0] is None:
                self._trainer._progress.read()
            self.flush()
            self._log.close()
            if self._log.refused:
                self._trainer._skipped.append(("the rest of the log", self._log.refused))

    def after_step(self, window: list[Any]) -> None:
        """Count a step on these batches; write and draw what is due."""
        state = self._trainer._progress
        if self._peak is not None and self._flops is None:
            # Not known stays 0.0, so that it is counted once; by the model as the user made it.
            self._trainer._stepper.release()
            self._flops = step_flops(self._trainer.model, window[0]) or 0.0
        if self._log is not None:
            self._rate.tokens += sum(tokens_in(batch) for batch in window)
            if state.step % self._every == 0:
                self._mark()
            self.flush()
        self._unshown += 1
        if time.monotonic() - self._drawn > _DRAW_S:
            self._draw()

    def before_last_point(self) -> None:
        """The last steps of an epoch are about to make a point of their own."""
        if self._log is not None and self._trainer.step not in self._marks and self._trainer.step % self._every:
            self._mark()

    def after_epoch(self, entry: dict[str, Any]) -> None:
        """Write an epoch's numbers, and start the clocks anew: validation was no training."""
        if self._log is not None:
            self.flush()
            tags = {f"epoch/{k}": float(v) for k, v in entry.items() if k.startswith("val_") or k == "train_loss"}
            self._log.write({"kind": "epoch", **entry}, tags)
        self._rate, self._view = Rate(self._trainer._progress.samples), Rate(self._trainer._progress.samples)

    def flush(self) -> None:
        """Write the points of the loss curve that have arrived."""
        state = self._trainer._progress
        if self._log is None:
            return
        for step, loss in state.points[self._written :]:
            mark = self._marks.pop(step, {})
            entry = {"kind": "step", "step": step, "epoch": mark.pop("epoch", None), "loss": loss, **mark}
            if (norm := state.norms.pop(step, None)) is not None:
                entry["grad_norm"] = norm
            tags = {f"train/{k}": float(v) for k, v in entry.items() if k not in ("kind", "step", "epoch")}
            self._log.write(entry, tags)
        self._written = len(state.points)

    def _mark(self) -> None:
        trainer = self._trainer
        state = trainer._progress
        samples, tokens = self._rate.since(state.samples)
        mark = {"epoch": state.epoch + 1, "lr": trainer._stepper.rate}
        mark["samples_per_s"] = round(samples, 3)
        if tokens:
            mark["tokens_per_s"] = round(tokens, 1)
        mark["memory_bytes"] = memory_bytes(trainer.device)
        if self._peak and self._flops:
            mark["mfu"] = round(self._flops * samples / self._peak, 4)
        self._marks[state.step] = mark
        self._rate = Rate(state.samples)

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._advance(self._unshown, self._note())
        self._unshown = 0

    def _note(self) -> str:
        state = self._trainer._progress
        if self._view.seconds > 1 or not self._shown_rate:
            rate, _ = self._view.since(state.samples)
            self._shown_rate = f"{rate:,.0f} samples/s" if rate >= 10 else f"{rate:.2f} samples/s"
            if self._peak and self._flops:
                self._shown_rate += f"  MFU {self._flops * rate / self._peak:.0%}"
            self._view = Rate(state.samples)
        loss = f"loss {state.recent:.4g}  " if state.recent is not None else ""
        return f"{loss}{self._shown_rate}  {memory_bytes(self._trainer.device) / 1e9:.1f} GB"


class Rate:
    """Samples and tokens a second from its making on; `samples` is the count at that time."""

    def __init__(self, samples: int = 0) -> None:
        self._began, self._samples, self.tokens = time.monotonic(), samples, 0

    @property
    def seconds(self) -> float:
        """Seconds since its making."""
        return time.monotonic() - self._began

    def since(self, samples: int) -> tuple[float, float]:
        """Samples and tokens a second up to now, where `samples` are counted."""
        seconds = max(self.seconds, 1e-9)
        return (samples - self._samples) / seconds, self.tokens / seconds


def tokens_in(batch: Any) -> int:
    """Tokens in a batch of token numbers, padding included; 0 for any other batch.

    Example:
        >>> tokens_in({"input_ids": torch.zeros(2, 5, dtype=torch.long)}), tokens_in((torch.zeros(2, 5), None))
        (10, 0)
    """
    args, kwargs, _ = unpack_batch(batch)
    first: Any = next(_inputs(args, kwargs), None)
    if first is None or first.ndim != 2 or first.is_floating_point() or first.is_complex() or first.dtype == torch.bool:
        return 0
    return int(first.numel())


def _inputs(args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    return tensors(kwargs.get("input_ids", (args, kwargs)))


def memory_bytes(device: torch.device) -> int:
    """Memory in use: the peak of what torch holds on a GPU, else what the process has in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
