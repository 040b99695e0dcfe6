"""Saving behind a run's back: host copies of tensors, and one piece of work at a time on a thread.

Knows nothing about checkpoints.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Staging:
    """Host memory into which a state is copied; it is kept, so that the next copy need not ask for new pages.

    Copies of tensors on a GPU go into pinned memory and are only queued: later work on the GPU comes behind them, so
    that no later step can leak into them, and the host does not wait. Call `wait` before they are read.

    Example:
        >>> staging, live = Staging(), torch.ones(2)
        >>> kept = staging.copy("a", live)
        >>> _ = live.zero_()
        >>> staging.wait()
        >>> kept
        tensor([1., 1.])
    """

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}
        self._now: dict[str, Tensor] = {}
        self._events: dict[torch.device, Any] = {}

    def begin(self) -> None:
        """Start a new state: its copies may use the memory of the one before, which must have been read by then."""
        self._before, self._now = self._now, {}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """A contiguous copy on the CPU, in memory of its own."""
        device = tensor.device
        kept = self._before.pop(name, None)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device.type == "cuda")
        kept.copy_(tensor, non_blocking=device.type == "cuda")
        if device.type == "cuda":
            self._events.setdefault(device, None)
        self._now[name] = kept
        return kept

    def end(self) -> None:
        """All of the state was copied: what is still unused is given back, and the queued copies are marked."""
        self._before = {}
        for device in self._events:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._events[device] = event

    def wait(self) -> None:
        """Wait until every queued copy is there. May be called from another thread."""
        for event in self._events.values():
            if event is not None:
                event.synchronize()


class Background:
    """At most one piece of work on a thread of its own. What it raises is raised at the next `check` or `wait`.

    Example:
        >>> work = Background()
        >>> work.start(lambda: 1 / 0)
        >>> work.wait()
        Traceback (most recent call last):
        ...
        ZeroDivisionError: division by zero
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether there is work that has not ended."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], object]) -> None:
        """Begin a piece of work; waits for the one before, and raises what that raised."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as e:
                self._error = e

        # No daemon: a process that ends normally finishes what it began to write.
        self._thread = threading.Thread(target=run, name="deepseek-r1 checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what the work raised, if it has ended."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the work to end, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
