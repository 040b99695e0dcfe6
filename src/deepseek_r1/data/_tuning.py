"""How many workers, and how far ahead they read: found by trying between passes. Knows times only."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

#: Less than this share of the time spent waiting is not worth a trial.
_STARVED = 0.05
#: Seconds of waiting in a pass below which starting processes costs more than it can save.
_LEAST_WAIT_S = 1.0
#: What a batch out of a worker costs the reader even if it lies ready (queue, shared memory): 0.2 to 0.5 ms.
_HANDOVER_S = 5e-4
#: A trial is kept if waiting falls to this share of what it was.
_KEPT = 0.9
_MOST_PREFETCH = 8
#: Batches below which a pass tells nothing.
_LEAST_BATCHES = 4


@dataclass(frozen=True)
class Setting:
    """Worker processes, and batches each reads ahead (0 without workers)."""

    workers: int = 0
    prefetch: int = 0

    def __str__(self) -> str:
        return f"{self.workers} workers" + (f", {self.prefetch} batches ahead each" if self.workers else "")


@dataclass
class Tuner:
    """Proposes a setting for each pass from the times of the passes before.

    A trial is kept only if the reader waits at least a tenth less for a batch, and a pass as a whole takes no longer;
    otherwise the setting before comes back and the trial is not repeated.

    Attributes:
        setting: for the next pass.
        first_prefetch: batches ahead with which workers are tried first.
        decisions: what was tried and became of it, in sentences.

    Example:
        >>> tuner = Tuner(Setting(), workers=True, prefetch=True, cores=4)
        >>> tuner.ended(waited_s=8.0, computed_s=4.0, batches=100)
        >>> tuner.setting
        Setting(workers=2, prefetch=2)
        >>> tuner.ended(waited_s=1.0, computed_s=4.0, batches=100)
        >>> tuner.decisions[0]
        'tried 2 workers, 2 batches ahead each: waiting 80 -> 10 ms a batch; kept'
    """

    setting: Setting
    workers: bool = False
    prefetch: bool = False
    cores: int = field(default_factory=lambda: usable_cores())
    first_prefetch: int = 2
    decisions: list[str] = field(default_factory=list)
    _best: Setting | None = None
    _wait: float = 0.0
    _compute: float = 0.0
    _tried: set[Setting] = field(default_factory=set)
    _settled: str = ""

    @property
    def trial(self) -> bool:
        """Whether the next pass is a trial."""
        return self._best is not None and self._best != self.setting

    def ended(self, waited_s: float, computed_s: float, batches: int) -> None:
        """Take the times of a whole pass with `setting`, and choose the next one."""
        if not self.active or batches < _LEAST_BATCHES:
            return
        wait, compute = waited_s / batches, computed_s / batches
        if self.trial:
            self._judge(wait, compute)
        else:
            self._best, self._wait, self._compute = self.setting, wait, compute
        self._propose(batches)

    def _judge(self, wait: float, compute: float) -> None:
        assert self._best is not None, "a trial has something to be compared with"
        better = wait < _KEPT * self._wait and wait + compute <= self._wait + self._compute
        told = f"tried {self.setting}: waiting {_ms(self._wait)} -> {_ms(wait)} ms a batch; "
        if better:
            self.decisions.append(told + "kept")
            self._best, self._wait, self._compute = self.setting, wait, compute
            return
        slower = "" if wait >= _KEPT * self._wait else ", but the work between batches became slower"
        self.decisions.append(f"{told}back to {self._best}{slower}")
        self.setting = self._best

    @property
    def active(self) -> bool:
        """Whether there is anything to choose."""
        return self.workers or self.prefetch

    def failed(self, why: str) -> None:
        """The trial could not be run: go back, and try no more workers."""
        assert self._best is not None, "only a trial fails"
        self.decisions.append(f"tried {self.setting}: {why}; back to {self._best}")
        self.setting = self._best
        self.workers = self.prefetch = False

    def _propose(self, batches: int) -> None:
        assert self._best is not None, "a pass has ended"
        why = self._enough(batches)
        wanted = None if why else self._next(self._best)
        if wanted is None:
            text = f"{self._best}: {why or 'nothing else to try'}"
            if text != self._settled:
                self.decisions.append(text)
                self._settled = text
            return
        self._tried.add(wanted)
        self.setting = wanted

    def _enough(self, batches: int) -> str:
        total = self._wait + self._compute
        share = self._wait / total if total else 0.0
        if share < _STARVED:
            return f"waiting takes {share:.1%} of the time"
        if self._best == Setting() and self._wait <= 2 * _HANDOVER_S:
            return f"reading a batch takes {_ms(self._wait)} ms, about what handing one over from a worker costs"
        if self._wait * batches < _LEAST_WAIT_S:
            return f"waiting takes {self._wait * batches:.2f} s of a pass, less than starting workers costs"
        return ""

    def _next(self, best: Setting) -> Setting | None:
        options = []
        if self.workers:
            if best.workers == 0:
                need = math.ceil(self._wait / self._compute) if self._compute > 0 else self.cores
                options.append(Setting(max(1, min(need, self.cores)), self.first_prefetch))
            elif best.workers < self.cores:
                options.append(Setting(min(2 * best.workers, self.cores), best.prefetch))
        if self.prefetch and best.workers and best.prefetch < _MOST_PREFETCH:
            options.append(Setting(best.workers, max(2, 2 * best.prefetch)))
        return next((o for o in options if o not in self._tried), None)


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"
